"""Random numbers as a pure function of integers: splitmix64.

Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195. It is written out here
because an order that must outlive a run cannot hang on how a library draws its numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & MASK
    return x ^ (x >> 31)


def key_of(*numbers: int) -> int:
    """A 64-bit key of some integers, in their order."""
    key = len(numbers)
    for number in numbers:
        key = _mix((key + (number + 1) * _GOLDEN) & MASK)
    return key


def random_numbers(key: int, index: UInt64) -> UInt64:
    """Element ``index`` of the splitmix64 stream of ``key``; distinct for distinct indices."""
    x = (index + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX_2)
    x ^= x >> np.uint64(31)
    return x


def permutation(key: int, num: int) -> Int64:
    """A permutation of ``range(num)``: sorted by random numbers, of which no two are equal."""
    return np.argsort(random_numbers(key, np.arange(num, dtype=np.uint64))).astype(np.int64)
