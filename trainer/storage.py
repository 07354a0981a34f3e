"""Where checkpoints are published: a folder, or whatever fsspec can reach by a URL.

Names are relative paths with ``/``. A file is there whole or not at all, and once a call has
returned it survives a power cut: in a folder by draft, fsync, rename and fsync of the folder; in an
object store because an upload becomes visible at its end.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

from data_shards.blocks import sync_path
from data_shards.errors import RunFailedError, UserError

_Result = TypeVar("_Result")

PIECE_BYTES = 8 << 20

# Which package speaks a scheme, and the extra of ours that installs it.
_PACKAGES = {
    "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"),
}  # fmt: skip
# Stores without folders: making one there would at best do nothing, at worst make a bucket.
_OBJECT_STORES = {*_PACKAGES, "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}

# What another attempt would meet again; everything else may be the network's fault.
_FINAL = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ValueError, TypeError, NotImplementedError, ImportError,
)  # fmt: skip
_ATTEMPTS = 4
_BACKOFF_S = 0.5


class StorageError(RunFailedError):
    """A disk or a remote storage failed: what was tried, where, what it said, and the mend."""

    @classmethod
    def of(cls, action: str, where: str | Path, error: BaseException) -> StorageError:
        """One sentence from what the system said; ``error`` becomes the cause."""
        if isinstance(error, StorageError):
            return error
        kind = MissingError if isinstance(error, FileNotFoundError) else cls
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        mend = {
            errno.ENOSPC: "free some space there, or give a place with more",
            errno.EDQUOT: "free some space there, or raise the quota",
            errno.EACCES: "allow this user to read and write there, or give another place",
            errno.EROFS: "mount it for writing, or give another place",
        }.get(getattr(error, "errno", None) or 0, "check that the storage is there and works")
        found = kind(
            f"cannot {action} {where}: {said}: {mend} (recovery.storage, recovery.staging)"
        )
        found.__cause__ = error
        return found


class MissingError(StorageError):
    """There is no such file."""


class FileWriter:
    """A new file that is written once, front to back, hashed on the way and synced at its end.

    Plain system calls: neither they nor the hash hold the interpreter's lock, so that training goes
    on while a background thread writes.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data)
        self._hash.update(view)
        self.num_bytes += len(view)
        while view:
            view = view[os.write(self._descriptor, view) :]

    @property
    def sha256(self) -> str:
        """In hex, of what was written so far."""
        return self._hash.hexdigest()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


class Storage(ABC):
    """A folder or a URL under which files lie. All calls raise ``StorageError``.

    ``folder`` is the folder, None if the storage is remote.
    """

    folder: Path | None

    @staticmethod
    def of(where: str | Path) -> Storage:
        """The storage at a path or a URL (``file://``, ``s3://``, ``gs://``, ...).

        Raises:
            UserError: no such kind of URL, or the package that speaks it is not installed.
        """
        scheme = urlsplit(where).scheme if isinstance(where, str) and "://" in where else ""
        if scheme in ("", "file"):
            path = url2pathname(urlsplit(str(where)).path) if scheme else where
            return _Folder(Path(path))
        return _Remote(str(where))

    @abstractmethod
    def where(self, name: str) -> str:
        """Path or URL, as messages should call it."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all; what had the name before is replaced."""

    @abstractmethod
    def put(self, file: Path, name: str) -> None:
        """Move a local file here, whole or not at all. It must be synced (see ``FileWriter``)."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file's content."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """A file's bytes; None if there is no such file."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder, sorted; empty if there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if it is not there."""

    @abstractmethod
    def fetch(self, name: str, cache: Path) -> Path:
        """A local file with the content: itself, or a copy in ``cache``, which is made once."""


class _Folder(Storage):
    """A folder of this machine's file system, or of one that all machines share."""

    def __init__(self, root: Path) -> None:
        self.folder = self.root = root

    def where(self, name: str) -> str:
        return str(self.root / name)

    def write(self, name: str, data: bytes) -> None:
        with _telling("write", self.root / name):
            write_atomically(self.root / name, data)

    def put(self, file: Path, name: str) -> None:
        target = self.root / name
        with _telling("write", target):
            _make_folder(target.parent)
            try:
                os.replace(file, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                _copy(file, target)
                file.unlink()
            sync_path(target.parent)

    def read(self, name: str) -> bytes:
        with _telling("read", self.root / name):
            return (self.root / name).read_bytes()

    def size(self, name: str) -> int | None:
        with _telling("look at", self.root / name):
            try:
                status = (self.root / name).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return status.st_size if stat.S_ISREG(status.st_mode) else None

    def names(self, folder: str) -> list[str]:
        with _telling("list", self.root / folder):
            try:
                return sorted(os.listdir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def remove(self, name: str) -> None:
        path = self.root / name
        with _telling("remove", path):
            if _remove(path):
                sync_path(path.parent)

    def fetch(self, name: str, cache: Path) -> Path:
        return self.root / name


class _Remote(Storage):
    """A URL that fsspec can reach.

    Calls are repeated a few times if the transport fails. What was sent is asked for its size.
    """

    folder = None

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = urlsplit(url).scheme
        self._has_folders = scheme not in _OBJECT_STORES
        try:
            from fsspec.core import url_to_fs

            # A listing from memory would hide what other ranks have written meanwhile.
            self._fs, self._root = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            package, extra = _PACKAGES.get(scheme, (None, None))
            mend = f"pip install {package} (or 'babelray[{extra}]')" if package else str(error)
            raise UserError(
                f"{scheme}:// storage needs a package that is missing: {mend}"
            ) from None
        except ValueError as error:
            raise UserError(
                f"recovery.storage: {url}: {error}: give a folder, or a URL that fsspec knows, "
                "such as s3://bucket/folder"
            ) from None

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def write(self, name: str, data: bytes) -> None:
        self._send("write", name, len(data), lambda path: self._fs.pipe_file(path, data))

    def put(self, file: Path, name: str) -> None:
        with _telling("read", file):
            num_bytes = file.stat().st_size
        self._send("write", name, num_bytes, lambda path: self._fs.put_file(str(file), path))
        with _telling("remove", file):
            file.unlink()

    def read(self, name: str) -> bytes:
        return self._call("read", name, lambda path: bytes(self._fs.cat_file(path)))

    def size(self, name: str) -> int | None:
        def look(path: str) -> int | None:
            try:
                found = self._fs.info(path)
            except FileNotFoundError:
                return None
            return int(found["size"]) if found["type"] == "file" else None

        return self._call("look at", name, look)

    def names(self, folder: str) -> list[str]:
        def look(path: str) -> list[str]:
            try:
                found = self._fs.ls(path, detail=False)
            except FileNotFoundError:
                return []
            names = {PurePosixPath(item.rstrip("/")).name for item in found if item != path}
            return sorted(names)

        return self._call("list", folder, look)

    def remove(self, name: str) -> None:
        def drop(path: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm(path, recursive=True)

        self._call("remove", name, drop)

    def fetch(self, name: str, cache: Path) -> Path:
        target = cache / PurePosixPath(name).name
        lock_file = cache / f".{target.name}.lock"
        with _telling("write", target):
            cache.mkdir(parents=True, exist_ok=True)
            # The ranks of a machine want the same files: one of them fetches.
            with lock_file.open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    if not target.exists():
                        self._fetch(name, target)
                finally:
                    # Who waits for it finds the target, or at worst fetches a copy of its own.
                    lock_file.unlink(missing_ok=True)
        return target

    def _fetch(self, name: str, target: Path) -> None:
        num_bytes = self.size(name)
        draft = _draft(target)
        try:
            self._call("read", name, lambda path: self._fs.get_file(path, str(draft)))
            found = draft.stat().st_size
            if found != num_bytes:
                raise StorageError(
                    f"cannot read {self.where(name)}: {num_bytes} bytes expected, {found} came"
                )
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def _send(self, action: str, name: str, num_bytes: int, send: Callable[[str], object]) -> None:
        def attempt(path: str) -> None:
            if self._has_folders:
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            send(path)
            found = int(self._fs.info(path)["size"])
            if found != num_bytes:
                raise OSError(errno.EIO, f"{num_bytes} bytes sent, {found} arrived")

        self._call(action, name, attempt)

    def _call(self, action: str, name: str, call: Callable[[str], _Result]) -> _Result:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call(f"{self._root}/{name}")
            # Not narrower: each of fsspec's file systems has errors of its own.
            except Exception as error:
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                if attempt == _ATTEMPTS or full or isinstance(error, _FINAL):
                    raise StorageError.of(action, self.where(name), error) from error
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def write_atomically(file: Path, content: bytes | str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: as the file system says; the old file is then still there.
    """
    _make_folder(file.parent)
    draft = _draft(file)
    try:
        with FileWriter(draft) as writer:
            writer.write(content.encode() if isinstance(content, str) else content)
        os.replace(draft, file)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_path(file.parent)


@contextmanager
def _telling(action: str, where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.of(action, error.filename or where, error) from error


def _draft(target: Path) -> Path:
    """A name beside the target that no other process, on any machine, has taken."""
    return target.with_name(f".{target.name}.{uuid4().hex[:12]}")


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_path(path.parent)


def _copy(file: Path, target: Path) -> None:
    draft = _draft(target)
    try:
        with file.open("rb", buffering=0) as source, FileWriter(draft) as sink:
            while piece := source.read(PIECE_BYTES):
                sink.write(piece)
        if sink.num_bytes != file.stat().st_size:
            raise OSError(errno.EIO, "cut short while it was copied", str(draft))
        os.replace(draft, target)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _remove(path: Path) -> bool:
    """Remove a file or a tree, others doing the same at the same time; False if it was gone."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError):  # what unlinking a folder says depends on the OS
        if not path.is_dir():
            raise
        for entry in list(path.iterdir()):
            _remove(entry)
        with suppress(FileNotFoundError):
            path.rmdir()
    return True
