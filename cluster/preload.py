"""What the process that ranks are forked from imports first: it then starts anew, with jemalloc.

multiprocessing starts that process and lets nobody choose its environment; to change this process'
own meanwhile would reach whatever else is started at that moment, Ray above all. Nothing has
happened there yet: all that it was given are its arguments and the files that they name.
"""

import sys

from cluster import allocator

if sys.version_info < (3, 14):  # later ones have read a key by now, which cannot be read again
    allocator.begin_again(allocator.environment())
