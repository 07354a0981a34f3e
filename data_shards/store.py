"""Where shards lie: local paths as they are, remote ones fetched once into a local cache.

A small shard is fetched whole. Of a large one behind ``http(s)://`` only the blocks that are needed
are, by range, into a file with holes: a run's first step waits for its windows' blocks, not for all
the shards that these are spread over. Every block is checked, so a hole is never taken for one.

Transport of whole shards is WebDataset's (``webdataset.gopen``): ``http(s)://`` through curl,
``gs://`` through gsutil, and whatever else its table of schemes knows; ``s3://`` through the
``aws`` command.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shlex
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import webdataset

from data_shards.errors import DataError
from data_shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from data_shards.ranges import Closed, FetchError, NoRangesError, RangeFetcher

log = logging.getLogger(__name__)

T = TypeVar("T")

# What curl's exit status 22 says: the server answered, and the answer was no (--fail).
_CURL_REFUSED = 22
_PIECE_BYTES = 1 << 20

# A shard up to this size is fetched whole: that takes hardly longer than one of its blocks.
WHOLE_SHARD_BYTES = 4 << 20

# Which file it was that lay at a path: inode and time of its last change.
CopyId = tuple[int, int]


def copy_id(status: os.stat_result) -> CopyId:
    """What tells a file from the one that took its place."""
    return status.st_ino, status.st_mtime_ns


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
        self._fetcher = RangeFetcher()
        self._lock = threading.Lock()
        self._ranges = True  # until a server is found to ignore them

    def name(self, shard: int) -> str:
        """Path or URL of a shard, as messages should call it."""
        return self._manifest.shard_path(shard)

    def remedy(self, shard: int) -> str:
        """What to do about a remote shard that cannot be had or is not as it should be."""
        entry, folder = self._manifest.data.shards[shard], self._manifest.folder
        return (
            f"Check that it can be reached and that its sha256 is {entry.sha256}, as "
            f"{folder / MANIFEST_NAME} says; else upload {entry.file} again from where it was "
            f"prepared. `babelray data verify {folder} --shards-url {self._manifest.shards_url}` "
            "looks at all of them"
        )

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
            self._fetch(shard, entry, path)
        return path

    def ensure(self, shards: Iterable[int]) -> None:
        """Fetch those of the shards that are remote and not yet here, several at a time."""
        missing = [s for s in shards if self.is_missing(s) and not self.in_parts(s)]
        if missing:
            with ThreadPoolExecutor(min(8, len(missing)), "babelray-fetch") as pool:
                futures = [pool.submit(self.path, shard) for shard in missing]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def is_missing(self, shard: int) -> bool:
        """Whether the shard is remote and not in the cache."""
        return self.is_remote(shard) and not self._is_here(shard)

    def in_parts(self, shard: int) -> bool:
        """Whether the shard's blocks are fetched one by one."""
        return (
            self._ranges
            and self._manifest.data.shards[shard].bytes > WHOLE_SHARD_BYTES
            and urlsplit(self.name(shard)).scheme in ("http", "https")
            and not self._is_here(shard)
        )

    def read_part(self, shard: int, offset: int, num_bytes: int, sha256: str) -> bytes | None:
        """A block of a shard that is fetched in parts; None if the server sends only whole files.

        Raises:
            DataError: it cannot be had, or what comes has another sha256.
            Closed: the store was closed meanwhile.
        """
        url = self.name(shard)
        path = _parts_file(self._cached(self._manifest.data.shards[shard]))
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                content = os.pread(file, num_bytes, offset)
                if hashlib.sha256(content).hexdigest() == sha256:
                    return content
                ask = partial(self._fetcher.fetch, url, offset, num_bytes, sha256)
                try:
                    content = self._with_retries(shard, ask)
                except NoRangesError:
                    log.info("%s: the server sends whole files only", url)
                    self._ranges = False
                    return None
                os.pwrite(file, content, offset)
                return content
            finally:
                os.close(file)
        except OSError as error:
            raise self._no_room(url, error) from None

    def discard(self, shard: int, read: CopyId | None) -> None:
        """Forget a cached copy that turned out damaged; the next ``path`` fetches it again.

        Args:
            shard: its number.
            read: ``copy_id`` of the file that was read. Another that lies there by now stays:
                somebody else has found the damage, too, and has fetched the shard again.
        """
        assert self.is_remote(shard)
        path = self._cached(self._manifest.data.shards[shard])
        try:
            with self._only_one(_lock_file(path)), suppress(FileNotFoundError):
                if copy_id(path.stat()) == read:
                    path.unlink()
        except OSError as error:
            raise self._no_room(self.name(shard), error) from None

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
        self._fetcher.close()

    def _is_here(self, shard: int) -> bool:
        entry = self._manifest.data.shards[shard]
        return _has_size(self._cached(entry), entry.bytes)

    def _cached(self, entry: ShardEntry) -> Path:
        # Named by content: corpora share the folder, and an older copy is never taken for this one.
        return self._cache_dir / f"{entry.sha256[:16]}-{Path(entry.file).name}"

    def _fetch(self, shard: int, entry: ShardEntry, path: Path) -> None:
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            with self._only_one(_lock_file(path)):
                if not _has_size(path, entry.bytes):  # else another process has just fetched it
                    self._fetch_with_retries(shard, entry, path)
        except OSError as error:
            raise self._no_room(self.name(shard), error) from None

    def _no_room(self, url: str, error: OSError) -> DataError:
        return DataError(
            f"{url} cannot be kept in {self._cache_dir}: {error.strerror or error}. Set "
            "data.cache_dir to a folder that can be written to and has room for the corpus"
        )

    def _fetch_with_retries(self, shard: int, entry: ShardEntry, path: Path) -> None:
        draft = path.with_name(path.name + ".part")
        self._with_retries(shard, partial(self._fetch_once, self.name(shard), entry, draft))
        draft.replace(path)
        _parts_file(path).unlink(missing_ok=True)  # of no use beside the whole

    def _with_retries(self, shard: int, fetch: Callable[[], T]) -> T:
        url = self.name(shard)
        for attempt in range(1, self._attempts + 1):
            if self._closed.is_set():
                raise Closed
            try:
                return fetch()
            except FetchError as error:
                if self._closed.is_set():
                    raise Closed from None
                if error.final or attempt == self._attempts:
                    raise DataError(
                        f"{url} cannot be fetched ({attempt} of {self._attempts} attempts): "
                        f"{error}. {self.remedy(shard)}"
                    ) from None
                wait_s = self._backoff_s * 2 ** (attempt - 1)
                log.warning("%s: %s; trying again in %g s", url, error, wait_s)
                self.wait(wait_s)
        raise AssertionError("unreachable")

    def _fetch_once(self, url: str, entry: ShardEntry, draft: Path) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        with draft.open("wb") as file, closing(self._pieces(url)) as pieces:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                num_bytes += len(piece)
        if num_bytes != entry.bytes:
            raise FetchError(f"expected {entry.bytes} bytes, found {num_bytes}")
        if digest.hexdigest() != entry.sha256:
            raise FetchError(f"expected sha256 {entry.sha256}, found {digest.hexdigest()}")

    def _pieces(self, url: str) -> Generator[bytes, None, None]:
        """What lies at the URL, piece by piece. All that goes wrong is a ``FetchError``."""
        try:
            stream = webdataset.gopen(_openable(url))
        except FileNotFoundError as error:
            message = f"the program {error.filename}, which fetches such files, is not installed"
            raise FetchError(message, final=True) from None
        except (OSError, ValueError) as error:
            raise FetchError(str(error), final=isinstance(error, ValueError)) from None
        with self._lock:
            self._open_streams.add(stream)
            if self._closed.is_set():  # before it could be found among the open ones
                _terminate(stream)
        try:
            while not self._closed.is_set() and (piece := stream.read(_PIECE_BYTES)):
                yield piece
            stream.close()  # this is where a program that failed says so
        except OSError:
            status = stream.proc.poll() if hasattr(stream, "proc") else None
            if status == _CURL_REFUSED:
                message = "the server says that it is not there, or not for us (curl status 22)"
                raise FetchError(message, final=True) from None
            raise FetchError(f"the transfer broke off (status {status})") from None
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


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _parts_file(path: Path) -> Path:
    return path.with_name(path.name + ".blocks")


def _openable(url: str) -> str:
    """The URL as ``webdataset.gopen`` takes it; it has no opener of its own for S3."""
    if urlsplit(url).scheme == "s3":
        return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    return url


def _terminate(stream: Any) -> None:
    """End the program that feeds a pipe: who reads from it, or waits for it, then goes on."""
    if hasattr(stream, "proc"):
        stream.proc.terminate()
