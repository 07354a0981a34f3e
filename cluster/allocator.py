"""The memory allocator of the processes that train.

A step takes and gives back the same large blocks again and again. By default glibc returns them to
the system, which has to clear them anew each time; and where it is told to keep them it searches
long lists for one that fits. jemalloc, which Ray's package brings for its own processes, does
neither: a tenth of a small model's step on a CPU, and less memory (``benchmarks/LOG.md``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# For processes that have glibc's allocator: keep what is freed, and in huge pages.
GLIBC = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# The same for jemalloc.
_JEMALLOC = "thp:always,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"

_TRIAL_S = 10.0

_lock = threading.Lock()


def environment() -> dict[str, str]:
    """Variables with which a new process gets the allocator; what the user has set is left alone.

    An ``LD_PRELOAD`` that is set, were it to nothing, keeps jemalloc out.
    """
    wanted = dict(GLIBC)
    library = jemalloc()
    # (It may be there already, by RAY_LD_PRELOAD_ON_WORKERS.)
    if library is not None and os.environ.get("LD_PRELOAD", str(library)) == str(library):
        wanted |= {"LD_PRELOAD": str(library), "MALLOC_CONF": _JEMALLOC}
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def in_environment() -> Iterator[None]:
    """What is started in the block has the allocator.

    (multiprocessing lets nobody choose its children's environment but through this process' own.)
    """
    with _lock:
        added = environment()
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


def begin_again() -> None:
    """Start this process' own command anew with ``GLIBC``, where that is missing; may not return.

    For a command that computes by itself: glibc reads its settings before Python is there.
    """
    added = {name: value for name, value in GLIBC.items() if name not in os.environ}
    if sys.platform == "linux" and added:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **added})  # noqa: S606


@functools.cache
def jemalloc() -> Path | None:
    """The library, if it is there and a process starts with it."""
    if sys.platform != "linux":
        return None
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None:
        return None
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return library if library.is_file() and _runs_with(library) else None


def _runs_with(library: Path) -> bool:
    """Not so on kernels with larger pages than it was built for, or another C library."""
    settings = {"LD_PRELOAD": str(library), "MALLOC_CONF": _JEMALLOC}
    try:
        trial = subprocess.run(
            [sys.executable, "-I", "-S", "-c", ""],
            env={**os.environ, **settings},
            capture_output=True,
            timeout=_TRIAL_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # Both the loader and jemalloc go on after most of what they complain about.
    return trial.returncode == 0 and not trial.stderr
