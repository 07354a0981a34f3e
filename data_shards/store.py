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
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

import webdataset

from data_shards.errors import DataError
from data_shards.manifest import Manifest, ShardEntry

log = logging.getLogger(__name__)

T = TypeVar("T")

# What curl's exit status 22 says: the server answered, and the answer was no (--fail).
_CURL_REFUSED = 22
_PIECE_BYTES = 1 << 20

# A shard up to this size is fetched whole: that takes hardly longer than one of its blocks.
WHOLE_SHARD_BYTES = 4 << 20
# The longest that nothing may come from a server that was asked for a block.
_SILENCE_S = 10.0
_PARTIAL_CONTENT = 206
_COME_AGAIN = (408, 429)  # request timeout, too many requests


class Closed(Exception):  # noqa: N818 - not an error: whoever closed the store asked for it
    """The store was closed while a shard was being fetched."""


class _FetchError(Exception):
    """One attempt failed; ``final`` if another would fail alike."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class _NoRangesError(Exception):
    """The server sends the whole file where a part of it was asked for."""


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
        self._ranges = True  # until a server is found to ignore them

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
        path = self._cached(self._manifest.data.shards[shard])
        path = path.with_name(path.name + ".blocks")
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                content = os.pread(file, num_bytes, offset)
                if hashlib.sha256(content).hexdigest() == sha256:
                    return content
                ask = partial(_fetch_range, url, offset, num_bytes, sha256)
                try:
                    content = self._with_retries(url, ask)
                except _NoRangesError:
                    log.info("%s: the server sends whole files only", url)
                    self._ranges = False
                    return None
                os.pwrite(file, content, offset)
                return content
            finally:
                os.close(file)
        except OSError as error:
            raise self._no_room(url, error) from None

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
            raise self._no_room(url, error) from None

    def _no_room(self, url: str, error: OSError) -> DataError:
        return DataError(
            f"{url} cannot be kept in {self._cache_dir}: {error.strerror or error}. Set "
            "data.cache_dir to a folder that can be written to and has room for the corpus"
        )

    def _fetch_with_retries(self, url: str, entry: ShardEntry, path: Path) -> None:
        draft = path.with_name(path.name + ".part")
        self._with_retries(url, partial(self._fetch_once, url, entry, draft))
        draft.replace(path)

    def _with_retries(self, url: str, fetch: Callable[[], T]) -> T:
        for attempt in range(1, self._attempts + 1):
            if self._closed.is_set():
                raise Closed
            try:
                return fetch()
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
        raise AssertionError("unreachable")

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


def _fetch_range(url: str, offset: int, num_bytes: int, sha256: str) -> bytes:
    """Some bytes of what lies at the URL. All that goes wrong is a ``_FetchError``."""
    wanted = f"bytes={offset}-{offset + num_bytes - 1}"
    request = Request(url, headers={"Range": wanted})  # noqa: S310 - http(s), see in_parts
    try:
        with urlopen(request, timeout=_SILENCE_S) as response:  # noqa: S310
            if response.status != _PARTIAL_CONTENT:
                raise _NoRangesError
            content: bytes = response.read(num_bytes + 1)
    except HTTPError as error:
        error.close()
        final = 400 <= error.code < 500 and error.code not in _COME_AGAIN
        raise _FetchError(f"the server answers {error.code} {error.reason}", final=final) from None
    except (OSError, HTTPException) as error:
        raise _FetchError(f"bytes from {offset} on did not come: {error!r}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _FetchError(
            f"bytes {offset} to {offset + num_bytes}: expected sha256 {sha256}, found {found} of "
            f"{len(content)} bytes"
        )
    return content


def _openable(url: str) -> str:
    """The URL as ``webdataset.gopen`` takes it; it has no opener of its own for S3."""
    if urlsplit(url).scheme == "s3":
        return f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    return url


def _terminate(stream: Any) -> None:
    """End the program that feeds a pipe: who reads from it, or waits for it, then goes on."""
    if hasattr(stream, "proc"):
        stream.proc.terminate()
