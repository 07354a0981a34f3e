"""Where shards lie: local paths as they are, remote ones fetched once into a local cache.

Transport is WebDataset's (``webdataset.gopen``): ``http(s)://`` through curl, ``gs://`` through
gsutil, and whatever else its table of schemes knows; ``s3://`` through the ``aws`` command.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shlex
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import webdataset

from data_shards.errors import DataError
from data_shards.manifest import Manifest, ShardEntry

log = logging.getLogger(__name__)

# What curl's exit status 22 says: the server answered, and the answer was no (--fail).
_CURL_REFUSED = 22
_PIECE_BYTES = 1 << 20


class Closed(Exception):  # noqa: N818 - not an error: whoever closed the store asked for it
    """The store was closed while a shard was being fetched."""


class _FetchError(Exception):
    """One attempt failed; ``final`` if another would fail alike."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class ShardStore:
    """Local files of a corpus' shards.

    Args:
        manifest: what the shards are called, how long they are and their sha256.
        cache_dir: where remote shards are kept, by default ``~/.cache/babelray``. Processes may
            share it: each shard is fetched by one of them.
        attempts: how often a shard is asked for before giving up.
        backoff_s: wait before the second attempt; doubled before each further one.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache_dir: Path | None = None,
        *,
        attempts: int = 5,
        backoff_s: float = 1.0,
    ) -> None:
        self._manifest = manifest
        self._cache_dir = cache_dir or _default_cache_dir()
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._closed = threading.Event()
        self._open_streams: set[Any] = set()
        self._lock = threading.Lock()

    def name(self, shard: int) -> str:
        """Path or URL of a shard, as messages should call it."""
        return self._manifest.shard_path(shard)

    def is_remote(self, shard: int) -> bool:
        """Whether the shard is read through the cache."""
        return urlsplit(self.name(shard)).scheme not in ("", "file")

    def path(self, shard: int) -> Path:
        """The shard as a local file; fetched now, if it is remote and not in the cache.

        Raises:
            DataError: it cannot be had, or what comes is not what the manifest says.
            Closed: the store was closed meanwhile.
        """
        name = self.name(shard)
        if not self.is_remote(shard):
            return Path(url2pathname(urlsplit(name).path) if name.startswith("file:") else name)
        entry = self._manifest.data.shards[shard]
        path = self._cached(entry)
        if not _has_size(path, entry.bytes):
            self._fetch(name, entry, path)
        return path

    def ensure(self, shards: Iterable[int]) -> None:
        """Fetch those of the shards that are remote and not yet here, several at a time."""
        missing = [shard for shard in shards if self.is_remote(shard) and not self._is_here(shard)]
        if missing:
            with ThreadPoolExecutor(min(8, len(missing)), "babelray-fetch") as pool:
                futures = [pool.submit(self.path, shard) for shard in missing]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def discard(self, shard: int) -> None:
        """Forget a cached copy that turned out damaged; the next ``path`` fetches it again."""
        assert self.is_remote(shard)
        self._cached(self._manifest.data.shards[shard]).unlink(missing_ok=True)

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Closed: the store was closed meanwhile.
        """
        if self._closed.wait(seconds):
            raise Closed

    def close(self) -> None:
        """Make a fetch that is going on end soon, with ``Closed``."""
        self._closed.set()
        with self._lock:
            for stream in self._open_streams:
                _terminate(stream)

    def _is_here(self, shard: int) -> bool:
        entry = self._manifest.data.shards[shard]
        return _has_size(self._cached(entry), entry.bytes)

    def _cached(self, entry: ShardEntry) -> Path:
        # Named by content: corpora share the folder, and an older copy is never taken for this one.
        return self._cache_dir / f"{entry.sha256[:16]}-{Path(entry.file).name}"

    def _fetch(self, url: str, entry: ShardEntry, path: Path) -> None:
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            with self._only_one(path.with_name(path.name + ".lock")):
                if not _has_size(path, entry.bytes):  # else another process has just fetched it
                    self._fetch_with_retries(url, entry, path)
        except OSError as error:
            raise DataError(
                f"{url} cannot be kept in {self._cache_dir}: {error.strerror or error}. Set "
                "data.cache_dir to a folder that can be written to and has room for the corpus"
            ) from None

    def _fetch_with_retries(self, url: str, entry: ShardEntry, path: Path) -> None:
        draft = path.with_name(path.name + ".part")
        for attempt in range(1, self._attempts + 1):
            try:
                self._fetch_once(url, entry, draft)
            except _FetchError as error:
                if self._closed.is_set():
                    raise Closed from None
                if error.final or attempt == self._attempts:
                    raise DataError(
                        f"{url} cannot be fetched ({attempt} of {self._attempts} attempts): "
                        f"{error}. Check that it can be reached and is the shard that "
                        f"{self._manifest.folder} describes (`babelray data verify` there), or "
                        "prepare the corpus again"
                    ) from None
                wait_s = self._backoff_s * 2 ** (attempt - 1)
                log.warning("%s: %s; trying again in %g s", url, error, wait_s)
                self.wait(wait_s)
            else:
                draft.replace(path)
                return

    def _fetch_once(self, url: str, entry: ShardEntry, draft: Path) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        with draft.open("wb") as file, closing(self._pieces(url)) as pieces:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                num_bytes += len(piece)
        if num_bytes != entry.bytes:
            raise _FetchError(f"expected {entry.bytes} bytes, found {num_bytes}")
        if digest.hexdigest() != entry.sha256:
            raise _FetchError(f"expected sha256 {entry.sha256}, found {digest.hexdigest()}")

    def _pieces(self, url: str) -> Generator[bytes, None, None]:
        """What lies at the URL, piece by piece. All that goes wrong is a ``_FetchError``."""
        try:
            stream = webdataset.gopen(_openable(url))
        except FileNotFoundError as error:
            message = f"the program {error.filename}, which fetches such files, is not installed"
            raise _FetchError(message, final=True) from None
        except (OSError, ValueError) as error:
            raise _FetchError(str(error), final=isinstance(error, ValueError)) from None
        with self._lock:
            self._open_streams.add(stream)
        try:
            while not self._closed.is_set() and (piece := stream.read(_PIECE_BYTES)):
                yield piece
            stream.close()  # this is where a program that failed says so
        except OSError:
            status = stream.proc.poll() if hasattr(stream, "proc") else None
            if status == _CURL_REFUSED:
                message = "the server says that it is not there, or not for us (curl status 22)"
                raise _FetchError(message, final=True) from None
            raise _FetchError(f"the transfer broke off (status {status})") from None
        finally:
            with self._lock:
                self._open_streams.discard(stream)
            _terminate(stream)
            with suppress(OSError):
                stream.close()

    @contextmanager
    def _only_one(self, lock_file: Path) -> Iterator[None]:
        """Keep other processes (and threads) of this machine from fetching the same shard."""
        with lock_file.open("ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.wait(0.05)
            yield  # closing the file gives the lock back


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "babelray"


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except (FileNotFoundError, NotADirectoryError):
        return False


def _openable(url: str) -> str:
    """The URL as ``webdataset.gopen`` takes it; it has no opener of its own for S3."""
    if urlsplit(url).scheme == "s3":
        return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    return url


def _terminate(stream: Any) -> None:
    """End the program that feeds a pipe: who reads from it, or waits for it, then goes on."""
    if hasattr(stream, "proc"):
        stream.proc.terminate()
