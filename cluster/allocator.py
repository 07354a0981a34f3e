"""The memory allocator of the processes that compute.

A step takes and gives back the same large blocks again and again. By default glibc returns them to
the system, which has to clear them anew each time; and where it is told to keep them it searches
long lists for one that fits. jemalloc, which Ray's package brings for its own processes, does
neither: a tenth of a small model's step on a CPU (``benchmarks/LOG.md``). Ranks have it. What
computes in Ray's workers or in a command itself has glibc with better settings.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# For processes that have glibc's allocator: keep what is freed, and in huge pages.
GLIBC = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

# The same for jemalloc; of two values for a setting the later counts.
_JEMALLOC = "thp:always,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"

_TRIAL_S = 10.0

# Set in a process that has begun again, whatever else became of its environment.
_MARK = "BABELRAY_BEGAN_AGAIN"


def environment() -> dict[str, str]:
    """Variables with which a new process gets jemalloc, or else glibc with its settings.

    What the user has set is left alone: an ``LD_PRELOAD``, were it to nothing, keeps jemalloc out,
    and settings in ``MALLOC_CONF`` count more than ours.
    """
    glibc = glibc_environment()
    library = find_jemalloc()
    # (It may be loaded already, by RAY_LD_PRELOAD_ON_WORKERS.)
    if library is None or os.environ.get("LD_PRELOAD", str(library)) != str(library):
        return glibc
    given = os.environ.get("MALLOC_CONF")
    settings = f"{_JEMALLOC},{given}" if given else _JEMALLOC
    wanted = {"LD_PRELOAD": str(library), "MALLOC_CONF": settings}
    return glibc | wanted if _runs_with(wanted) else glibc


def glibc_environment() -> dict[str, str]:
    """``GLIBC`` without what the user has set."""
    return {name: value for name, value in GLIBC.items() if name not in os.environ}


def find_jemalloc() -> Path | None:
    """Where Ray's package has the library; None where it has none."""
    ray = importlib.util.find_spec("ray")
    if sys.platform != "linux" or ray is None or ray.origin is None:
        return None
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return library if library.is_file() else None


def _runs_with(settings: Mapping[str, str]) -> bool:
    """Not so on kernels with larger pages than it was built for, or with another C library."""
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


def begin_again(settings: Mapping[str, str]) -> None:
    """Start this process' own command anew with these variables, once; may not return.

    An allocator is chosen, and reads its settings, before Python is there.
    """
    arguments = sys.argv[1:]
    # Who calls this in a process that was started as something else is left in peace.
    is_whole = not arguments or sys.orig_argv[-len(arguments) :] == arguments
    if sys.platform == "linux" and settings and is_whole and _MARK not in os.environ:
        sys.stdout.flush()
        with suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, {**os.environ, **settings, _MARK: "1"})  # noqa: S606


def current() -> str:
    """What this process allocates with, in a word or two."""
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for name in ("jemalloc", "tcmalloc", "mimalloc"):
            if f"/lib{name}" in maps:
                return name
    return "the system's allocator"
