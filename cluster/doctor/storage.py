"""Whether a storage does what a run asks of it: done for real, with files of a folder of our own.

A file is written, read back, replaced and removed; a lock is held against another process; 64 MB
show how fast it is. All of it goes through ``trainer.storage``, as checkpoints do.
"""

from __future__ import annotations

import errno
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from cluster.checks import Check
from cluster.doctor.limits import TimedOutError, duration, limited, number
from cluster.doctor.machine import existing, remove_empty
from data_shards.errors import UserError
from trainer.storage import PIECE_BYTES, FileWriter, Storage, StorageError

_PATIENCE_S = 30.0
_MOST_BYTES = 64_000_000
_LONGEST_WRITE_S = 3.0
_REMOVALS, _POLL_S = 3, 0.1
_SLOW_SYNC_S = 0.1
# A checkpoint that takes longer to write than this is in training's way, or is lost with a machine
# that gives half a minute's notice.
_LONG_CHECKPOINT_S = 30.0
_LARGEST_OFFSET_S = 1.0

# Tries for a lock that is held: 0 got it, 1 it is taken, 2 there are none.
_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(1)
    except OSError:
        sys.exit(2)
"""

_MENDS = {
    errno.ENOSPC: "free some space there, or give another place",
    errno.EDQUOT: "raise the quota there, free some space, or give another place",
    errno.EACCES: "allow this user to write there (chown, chmod), or give another place",
    errno.EPERM: "allow this user to write there (chown, chmod), or give another place",
    errno.EROFS: "mount it for writing, or give another place",
    errno.ENOTDIR: "a file is in the way: give another place",
    errno.ESTALE: "the server has forgotten the folder: mount it again",
}
_REMOTE_MEND = (
    "check the bucket's name, the credentials, the endpoint (AWS_ENDPOINT_URL) and the network"
)


def checks(
    name: str, where: str | Path, *, checkpoint_bytes: int, locks: bool, keep: int = 1
) -> Iterator[Check]:
    """All of one storage; leaves nothing behind.

    Args:
        name: what it is for, such as "runs".
        where: a folder, which need not exist yet, or a URL.
        checkpoint_bytes: what a checkpoint of the run takes.
        locks: whether runs are claimed there.
        keep: how many checkpoints stay.
    """
    try:
        storage = Storage.of(where)
    except UserError as error:
        yield Check(name, "failure", str(error), "install what is missing, or give another place")
        return
    place = str(storage.folder or where)
    try:
        yield from _checks(name, storage, checkpoint_bytes, locks=locks, keep=keep)
    except TimedOutError:
        mend = "see whether its server is up and the network lets it through, or mount it again"
        mend = _REMOTE_MEND if storage.folder is None else mend
        yield Check(name, "failure", f"{place}: no answer within {_PATIENCE_S:g} s", mend)
    except StorageError as error:
        yield _failure(name, storage, error)


def _failure(name: str, storage: Storage, error: StorageError) -> Check:
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    number_ = getattr(cause, "errno", None) or 0
    mend = _MENDS.get(number_)
    if mend is None:
        mend = _REMOTE_MEND if storage.folder is None else "see whether the disk or mount works"
    sentence = str(error).rpartition(" (recovery.storage")[0] or str(error)
    # Its own last part is a mend for those who train.
    return Check(name, "failure", sentence.rpartition(": ")[0] or sentence, mend)


def _checks(
    name: str, storage: Storage, checkpoint_bytes: int, *, locks: bool, keep: int
) -> Iterator[Check]:
    folder = storage.folder
    answers = True
    there = folder is None or folder.is_dir()
    made_from = existing(folder) if folder is not None else None
    trial = f".doctor-{os.uname().nodename}-{uuid4().hex[:8]}"
    try:
        yield _round_trip(name, storage, trial)
        if folder is not None:
            if locks:
                yield _locks(f"{name}: locks", folder / trial)
            yield _sync(f"{name}: small writes", storage, trial)
            yield _room(f"{name}: room", folder, checkpoint_bytes, keep)
        yield _speed(f"{name}: speed", storage, trial, checkpoint_bytes)
    except TimedOutError:
        answers = False
        raise
    finally:
        if answers:
            _remove(storage, trial)
        if not there and folder is not None and made_from is not None:
            remove_empty(folder, above=made_from)


def _remove(storage: Storage, trial: str) -> None:
    """With what a call that was interrupted may still be writing."""
    for _ in range(_REMOVALS):
        with suppress(StorageError, TimedOutError):
            limited(_PATIENCE_S, lambda: storage.remove(trial))
            if storage.folder is None or not (storage.folder / trial).exists():
                return
        time.sleep(_POLL_S)


def _round_trip(name: str, storage: Storage, trial: str) -> Check:
    """Write, replace, read back, list, remove."""
    file, first, second = f"{trial}/file", b"first", uuid4().bytes * 256
    before = time.time()
    limited(_PATIENCE_S, lambda: storage.write(file, first))
    after = time.time()
    written = None if storage.folder is None else (storage.folder / file)
    offset = None if written is None else _offset(written, before, after)
    limited(_PATIENCE_S, lambda: storage.write(file, second))
    found = limited(_PATIENCE_S, lambda: storage.read(file))
    where = str(storage.folder or storage.where("").rstrip("/"))
    mend = "do not keep runs there: it loses or mixes up what is written"
    if found != second:
        old = "the old content" if found == first else "other content"
        wrong = f"{where}: a file that was replaced was read back with {old}"
        return Check(name, "failure", wrong, mend)
    if "file" not in limited(_PATIENCE_S, lambda: storage.names(trial)):
        return Check(name, "failure", f"{where}: a file just written is not listed", mend)
    limited(_PATIENCE_S, lambda: storage.remove(file))
    if limited(_PATIENCE_S, lambda: storage.size(file)) is not None:
        return Check(name, "failure", f"{where}: a file that was removed is still there", mend)
    kind = "" if storage.folder is None else f" ({_file_system(storage.folder)})"
    text = f"{where}{kind}: written, replaced, read back, removed"
    if offset is not None and abs(offset) > _LARGEST_OFFSET_S:
        text += f"; its clock is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"
        return Check(name, "warning", text, "have a time service on this machine and the server")
    if _file_system_type(storage.folder) in {"tmpfs", "ramfs"}:
        mend = "it is memory: what lies there is gone with the machine; give a folder on a disk"
        return Check(name, "warning", text, mend)
    return Check(name, "ok", text)


def _offset(file: Path, before: float, after: float) -> float:
    """How far the time that the storage gave the file lies outside that of its writing."""
    stamp = file.stat().st_mtime
    return stamp - after if stamp > after else min(0.0, stamp - before)


def _locks(name: str, folder: Path) -> Check:
    """A run's folder is claimed by a lock, which another process must see."""
    import fcntl

    mend = (
        "two commands could train one run at once: mount with locks (NFS: v4, or without nolock; "
        "Lustre: flock), or give another --runs"
    )
    path = folder / "lock"
    with path.open("a") as file:
        try:
            limited(_PATIENCE_S, lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except OSError as error:
            return Check(name, "failure", f"none: {error.strerror}", mend)
        status = subprocess.run(
            [sys.executable, "-S", "-c", _TRY_LOCK, str(path)], timeout=_PATIENCE_S, check=False
        ).returncode
    if status == 0:
        return Check(name, "failure", "one process does not see the other's", mend)
    return Check(name, "ok", "a second process is kept out")


def _sync(name: str, storage: Storage, trial: str) -> Check:
    seconds = []
    for turn in range(5):
        began = time.perf_counter()
        limited(_PATIENCE_S, lambda turn=turn: storage.write(f"{trial}/{turn}", bytes(4096)))  # type: ignore[misc]
        seconds.append(time.perf_counter() - began)
    typical = statistics.median(seconds)
    found = f"{duration(typical)} for 4 kB, synced"
    if typical > _SLOW_SYNC_S:
        mend = "logs and commits will wait for it: a faster disk, or recovery.staging"
        return Check(name, "warning", found, mend)
    return Check(name, "ok", found)


def _room(name: str, folder: Path, checkpoint_bytes: int, keep: int) -> Check:
    free = shutil.disk_usage(existing(folder)).free
    # The kept ones, the best one, and the one that is being written.
    wanted = (keep + 2) * checkpoint_bytes
    found = f"{number(free)}B free; {keep + 2} checkpoints take {number(wanted)}B"
    mend = "free some space, lower trainer.keep_checkpoints, or give another place"
    if free < 2 * checkpoint_bytes:
        return Check(name, "failure", found, mend)
    return Check(name, "warning" if free < wanted else "ok", found, mend if free < wanted else None)


def _speed(name: str, storage: Storage, trial: str, checkpoint_bytes: int) -> Check:
    """Writes the more the faster it goes, 64 MB at most."""
    num_bytes, seconds = 0, 0.0
    with _scratch(storage, trial) as scratch:
        size = 4_000_000
        while True:
            seconds = limited(_PATIENCE_S, lambda: _timed_put(storage, scratch, trial, size))  # noqa: B023
            num_bytes = size
            if size >= _MOST_BYTES or seconds * 4 > _LONGEST_WRITE_S:
                break
            size *= 4
        began = time.perf_counter()
        if storage.folder is None:
            limited(_PATIENCE_S, lambda: storage.read(f"{trial}/large"))
        read_s = time.perf_counter() - began
    rate = num_bytes / seconds
    takes = checkpoint_bytes / rate
    found = f"{number(rate)}B/s written"
    if storage.folder is None:
        found += f", {number(num_bytes / read_s)}B/s read"
    found += f" ({number(num_bytes)}B); a checkpoint of {number(checkpoint_bytes)}B: "
    found += duration(takes)
    if takes > _LONG_CHECKPOINT_S:
        mend = "set recovery.staging to a fast local folder, or use a faster storage"
        return Check(name, "warning", found, mend)
    return Check(name, "ok", found)


@contextmanager
def _scratch(storage: Storage, trial: str) -> Iterator[Path]:
    if storage.folder is not None:
        yield storage.folder / trial / ".draft"
        return
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        yield Path(folder) / "draft"


def _timed_put(storage: Storage, draft: Path, trial: str, size: int) -> float:
    piece = os.urandom(min(size, PIECE_BYTES))
    began = time.perf_counter()
    try:
        with FileWriter(draft) as writer:
            left = size
            while left:
                writer.write(memoryview(piece)[: min(left, len(piece))])
                left -= min(left, len(piece))
    except OSError as error:
        raise StorageError.of("write", draft, error) from error
    if storage.folder is None:
        began = time.perf_counter()
    storage.put(draft, f"{trial}/large")
    return time.perf_counter() - began


def _file_system(folder: Path) -> str:
    return _file_system_type(folder) or "unknown file system"


def _file_system_type(folder: Path | None, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """Of the mount that holds ``folder``, as the kernel calls it."""
    if folder is None:
        return None
    best, kind = "", None
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    path = existing(folder).resolve()
    for line in lines:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
