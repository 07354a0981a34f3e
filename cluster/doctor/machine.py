"""What ``babelray doctor`` looks at on this machine, but for what has to be imported to be seen.

Each check takes the place it looks at as an argument, so that a test can show it a bad one.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from cluster import allocator
from cluster.checks import Check
from cluster.doctor.limits import TimedOutError, limited, number
from data_shards.errors import UserError
from trainer.config import RunConfig

_MIB, _GIB = 1 << 20, 1 << 30

_CHECKOUT = Path(__file__).resolve().parents[2]

# Ray warns below 8,192: every worker holds connections to every node.
_WANTED_FILES, _NEEDED_FILES = 8192, 1024

# A rank with torch and DeepSpeed loaded takes about a gigabyte before it holds a model.
_WANTED_MEMORY, _NEEDED_MEMORY = 2 * _GIB, _GIB // 2

# Ray's objects (a Ray of our own takes 128 MiB); then what NCCL takes to pass data between the
# GPUs of a machine that cannot reach each other's memory.
_SHARED_FOR_RAY, _SHARED_FOR_GPU = 128 * _MIB, 64 * _MIB

_FEW_FILES = 10_000
_LOOKUP_S = 3.0

# "<folder>/ray/session_<date>_<microseconds>_<pid>/sockets/plasma_store" must fit a Unix socket's
# address.
_SOCKET_BYTES, _SOCKET_TAIL = (
    107,
    len("/ray/session_2026-01-01_00-00-00_123456_1234567/sockets/") + 12,
)


def checks(config: RunConfig, *, runs: Path, requires: Sequence[str] = ()) -> Iterator[Check]:
    """All of this machine; takes a moment, changes nothing.

    Args:
        config: for the folders and ports.
        runs: the folder of runs.
        requires: packages that babelray needs, where its code came without them.
    """
    yield system()
    yield python_version(sys.version_info[:3])
    yield packages(_CHECKOUT / "requirements.lock", requires)
    yield cores()
    yield memory()
    yield memory_allocator()
    yield shared_memory(Path("/dev/shm"), num_gpus=num_gpus())  # noqa: S108
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield temporary_folder(_ray_folder())
    yield disk("disk of the runs", runs)
    if _device(config.data.root) != _device(runs):
        yield disk("disk of the data", config.data.root)
    yield host_name(socket.gethostname())
    yield clock(Path(__file__))
    yield ports(config)


def system() -> Check:
    """The kind of machine; everything is tried on Linux alone."""
    inside = " in Kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else ""
    if not inside and any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")):
        inside = " in a container"
    found = f"{platform.system()} {platform.release()}, {platform.machine()}{inside}"
    if sys.platform != "linux":
        return Check("system", "warning", found, "nothing but Linux is tried")
    return Check("system", "ok", found)


def python_version(version: tuple[int, ...]) -> Check:
    """3.11 and 3.12 are tried."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Check("Python", "failure", found, "use Python 3.11 or 3.12")
    if version >= (3, 13):
        mend = "tried with 3.11 and 3.12: use one of them if something is odd"
        return Check("Python", "warning", found, mend)
    return Check("Python", "ok", found)


def packages(lock: Path, requires: Sequence[str] = ()) -> Check:
    """Installed packages against what babelray requires, and against the lock file if it is here.

    Args:
        lock: lines ``name==version``; may be missing, as in an image.
        requires: what whoever sent the code requires; it comes before what is known here.
    """
    from packaging.requirements import Requirement

    wanted = list(requires) or requirements()
    if wanted is None:
        return Check("packages", "ok", "not compared: babelray's own code came with the job")
    absent, outside, total = [], [], 0
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        total += 1
        found = _installed(requirement.name)
        if found is None:
            absent.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            outside.append(f"{requirement.name} {found} (wanted {requirement.specifier})")
    if absent or outside:
        wrong = "; ".join(
            ([f"missing: {_few(absent)}"] if absent else [])
            + ([f"other versions: {_few(outside)}"] if outside else [])
        )
        return Check("packages", "failure", wrong, "pip install -r requirements.lock")
    if not lock.is_file():
        return Check("packages", "ok", f"{total} as required (no lock file here to compare with)")
    locked = [line.partition("==")[::2] for line in lock.read_text().splitlines() if "==" in line]
    others = [
        f"{name} {found} (locked {version})"
        for name, version in locked
        if (found := _installed(name)) is not None and found.partition("+")[0] != version
    ]
    if others:
        return Check(
            "packages",
            "warning",
            f"{total} as required, but not as tested: {_few(others)}",
            f"pip install -r {lock.name}, if something is odd",
        )
    return Check("packages", "ok", f"{total} as required, all as in {lock.name}")


def requirements() -> list[str] | None:
    """What babelray requires, as pip reads it; None where only its code is."""
    try:
        required = metadata.requires("babelray")
    except metadata.PackageNotFoundError:
        required = None
    if required is None:  # a checkout that was not installed
        if not (_CHECKOUT / "pyproject.toml").is_file():
            return None  # code that was sent to a cluster
        project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]
        required = list(project["dependencies"])
    return [text for text in required if "extra ==" not in text]


def names(requires: Sequence[str]) -> list[str]:
    """Of the packages that these requirements want here."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, requires)
    return [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _few(items: list[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> Check:
    """What this process may use, and whether its threads are more than that."""
    from cluster.session import num_cores

    usable, present = num_cores(), os.cpu_count() or 1
    found = f"{usable}" if usable == present else f"{usable} of the machine's {present}"
    quota = _quota(quota_file)
    if quota is not None:
        found += f", at most {quota:g} at a time (cgroup)"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads:
        found += f", OMP_NUM_THREADS={threads}"
    if threads.isdecimal() and int(threads) > usable:
        mend = f"unset OMP_NUM_THREADS, or set it to at most {usable}: more threads only wait"
        return Check("CPU cores", "warning", found, mend)
    if quota is not None and quota < 1:
        return Check("CPU cores", "warning", found, "raise the container's CPU limit to 1 or more")
    return Check("CPU cores", "ok", found)


def _quota(file: Path) -> float | None:
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory(limit_folder: Path = Path("/sys/fs/cgroup")) -> Check:
    """What is free now, the container's limit counted."""
    import psutil

    state = psutil.virtual_memory()
    free, total = state.available, state.total
    try:
        limit = int((limit_folder / "memory.max").read_text())
        used = int((limit_folder / "memory.current").read_text())
    except (OSError, ValueError):
        limit = None  # "max", or another system
    if limit is not None and limit < total:
        free, total = min(free, max(0, limit - used)), limit
    found = f"{number(free)}B free of {number(total)}B"
    found += " (cgroup)" if limit is not None and limit == total else ""
    if free < _NEEDED_MEMORY:
        return Check("memory", "failure", found, "one worker takes about 1 GB: free some memory")
    if free < _WANTED_MEMORY:
        return Check(
            "memory", "warning", found, "one worker takes about 1 GB: use few, or free some"
        )
    return Check("memory", "ok", found)


def memory_allocator(
    huge_pages: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Check:
    """With what the processes that train allocate: on a CPU a tenth of a small model's step."""
    given = os.environ.get("LD_PRELOAD")
    if given is not None:
        found = f"LD_PRELOAD={given}" if given else "the system's, as LD_PRELOAD is set to nothing"
    elif "LD_PRELOAD" in allocator.environment():
        found = "jemalloc, of Ray's package"
    else:
        found = "the system's: Ray's package brings no jemalloc that starts here"
    try:
        pages = huge_pages.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        pages = "none"
    return Check("memory allocator", "ok", f"{found}; huge pages: {pages}")


def shared_memory(folder: Path, *, num_gpus: int) -> Check:
    """Where Ray keeps objects and NCCL passes data within a machine."""
    mend = (
        "docker run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory at /dev/shm, "
        "as in k8s/base"
    )
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check("shared memory", "failure", f"{folder}: {error.strerror}", mend)
    found = f"{folder}: {number(usage.free)}B free of {number(usage.total)}B"
    for_gpus = _SHARED_FOR_GPU * num_gpus if num_gpus > 1 else 0
    if not os.access(folder, os.W_OK) or usage.free < for_gpus:
        return Check("shared memory", "failure", found, mend)
    if usage.free < _SHARED_FOR_RAY + for_gpus:
        return Check("shared memory", "warning", f"{found}; Ray will use the disk instead", mend)
    return Check("shared memory", "ok", found)


def num_gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """NVIDIA GPUs that the kernel's driver knows of."""
    try:
        return len(list(folder.iterdir()))
    except OSError:
        return 0


def open_files(limit: int) -> Check:
    """How many files and connections a process may have."""
    if limit == resource.RLIM_INFINITY:
        return Check("open files", "ok", "no limit")
    found = f"at most {limit:,} a process"
    mend = "ulimit -n 65536 (docker run --ulimit nofile=65536; LimitNOFILE= of a systemd unit)"
    if limit < _NEEDED_FILES:
        return Check("open files", "failure", found, mend)
    if limit < _WANTED_FILES:
        return Check("open files", "warning", f"{found}; Ray wants {_WANTED_FILES:,}", mend)
    return Check("open files", "ok", found)


def _ray_folder() -> Path:
    """Where Ray puts sockets and logs of a session, by its own rules."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108


def temporary_folder(folder: Path) -> Check:
    """For Ray's sockets and logs: writable, with room, and of a short path."""
    name = "temporary folder"
    mend = "set RAY_TMPDIR to a local folder with a short path, such as /tmp"
    if len(str(folder)) + _SOCKET_TAIL > _SOCKET_BYTES:
        longest = _SOCKET_BYTES - _SOCKET_TAIL
        found = f"{folder}: Ray's sockets would have too long a path (more than {longest} letters)"
        return Check(name, "failure", found, mend)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check(name, "failure", f"{folder}: cannot be written to", mend)
    return _room(name, folder, folder)


def disk(name: str, folder: Path) -> Check:
    """Room and file entries where ``folder`` is or will be."""
    return _room(name, folder.absolute(), existing(folder))


def _room(name: str, folder: Path, looked_at: Path) -> Check:
    try:
        status = os.statvfs(looked_at)
    except OSError as error:
        return Check(name, "failure", f"{folder}: {error.strerror}", "give another folder")
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    found = f"{folder}: {number(free)}B free of {number(total)}B"
    if free < 100 * _MIB:
        return Check(name, "failure", found, "free some space, or give another folder")
    if status.f_files and status.f_favail < _FEW_FILES:
        found += f", room for {status.f_favail:,} more files"
        mend = "remove small files there (inodes run out), or give another folder"
        return Check(name, "failure" if status.f_favail < 100 else "warning", found, mend)
    if free < 2 * _GIB:
        return Check(name, "warning", found, "little: free some space, or give another folder")
    return Check(name, "ok", found)


def existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def remove_empty(folder: Path, *, above: Path) -> None:
    """Remove the folder and those that hold it, up to ``above``, as far as they are empty."""
    for path in (folder, *folder.parents):
        if path == above:
            return
        try:
            path.rmdir()
        except OSError:
            return


def _device(path: Path) -> int:
    return existing(path).stat().st_dev


def host_name(name: str) -> Check:
    """Ray and gloo look up the machine's own name."""
    mend = f"add a line with this machine's address and {name} to /etc/hosts"
    began = time.monotonic()
    try:
        address = limited(_LOOKUP_S, lambda: socket.gethostbyname(name))
    except TimedOutError:
        found = f"{name}: no answer from the name server within {_LOOKUP_S:g} s"
        return Check("host name", "warning", found, mend)
    except OSError as error:
        found = f"{name}: {error.strerror or error}"
        return Check("host name", "warning", found, f"{mend}, or set GLOO_SOCKET_IFNAME")
    took = time.monotonic() - began
    if took > 1:
        return Check("host name", "warning", f"{name} is {address}, after {took:.1f} s", mend)
    return Check("host name", "ok", f"{name} is {address}")


def clock(installed: Path, now: float | None = None) -> Check:
    """A clock that is behind what is installed is wrong; others are compared with --cluster."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    mend = "set the clock: sudo timedatectl set-ntp true"
    if now < installed.stat().st_mtime - 60:
        found = f"{shown}, which is before babelray was installed"
        return Check("clock", "failure", found, f"{mend} (certificates and S3 refuse a wrong one)")
    synchronised = _is_synchronised()
    if synchronised:
        return Check("clock", "ok", f"{shown}, kept by a time service")
    # On one machine nothing is compared with another clock.
    found = f"{shown}; no time service known (matters with several machines)"
    return Check("clock", "ok", found)


def _is_synchronised() -> bool | None:
    """What the kernel says by adjtimex(2), which only reads here; None: cannot be seen."""
    import ctypes

    buffer = ctypes.create_string_buffer(256)  # struct timex; modes = 0 only reads
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5  # TIME_ERROR: not synchronised


def ports(config: RunConfig) -> Check:
    """Those a run on this machine takes."""
    from cluster.session import DEFAULT_DASHBOARD_PORT, check_ports

    trainer = config.trainer
    shown = f"metrics {trainer.metrics_port}" if trainer.metrics_port else "no metrics"
    try:
        check_ports(
            dashboard_port=None,
            metrics_host=trainer.metrics_host,
            metrics_port=trainer.metrics_port,
        )
    except UserError as error:
        found, _, mend = str(error).rpartition(": ")
        return Check("ports", "failure", found, mend)
    try:
        check_ports(
            dashboard_port=DEFAULT_DASHBOARD_PORT,
            metrics_host=trainer.metrics_host,
            metrics_port=0,
        )
    except UserError:
        dashboard = f"after {DEFAULT_DASHBOARD_PORT}, which is in use"
    else:
        dashboard = str(DEFAULT_DASHBOARD_PORT)
    return Check("ports", "ok", f"{shown}, Ray dashboard {dashboard}")
