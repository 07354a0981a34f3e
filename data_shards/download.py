"""One file from the network: resumed where it was cut, checked, and renamed only when whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import requests
import urllib3

from data_shards.errors import DataError
from data_shards.manifest import file_sha256

logger = logging.getLogger(__name__)

# Waits before the second, third, … attempt. An attempt that got further than any before it starts
# the count anew: a large file over a poor line arrives, a server that is down is given up.
_BACKOFF_S = (1.0, 2.0, 4.0)
_TIMEOUT_S = (10.0, 60.0)
_CHUNK_BYTES = 1 << 18
# One waits so long for what is larger that one wants to know it has begun.
_LARGE_BYTES = 10 << 20
_MEND = "or take the raw files from a folder or another server with --mirror DIR_OR_URL"


class _NotThereError(Exception):
    """The server answered, and does not have the file."""


class _TransportError(Exception):
    """Worth another attempt."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is here; None: nobody has published it."""

    sha256: str | None = None
    md5: str | None = None
    num_bytes: int | None = None

    @property
    def has_checksum(self) -> bool:
        """Whether the content is known, and not just how much there is of it."""
        return self.sha256 is not None or self.md5 is not None

    def problem(self, path: Path, verb: str = "found") -> str | None:
        """What does not fit, in hex or bytes; None where all that is known does."""
        if self.num_bytes is not None and path.stat().st_size != self.num_bytes:
            return f"expected {self.num_bytes:,} bytes, {verb} {path.stat().st_size:,}"
        if self.sha256 is not None:
            actual = file_sha256(path)
            if actual != self.sha256:
                return f"expected sha256 {self.sha256}, {verb} {actual}"
        if self.md5 is not None:
            actual = _file_md5(path)
            if actual != self.md5:
                return f"expected md5 {self.md5}, {verb} {actual}"
        return None


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    expected: Expected,
    progress: Callable[[str], None] = logger.info,
) -> Path:
    """Have the file as it is known at ``path``; download it unless it is there already.

    Bytes arrive in ``<path>.part``, which a later call takes up again. Two processes may fetch the
    same file: the second waits for the first.

    Args:
        urls: tried in order; the next one only if a server does not have the file.
        path: where the file shall lie.
        expected: what is known of it. Where that is no checksum, nothing tells the beginning of
            this file from that of another: the part that an earlier call left is not taken up.
        progress: told what is being fetched and what was.

    Raises:
        DataError: no server has the file, none answers, or what comes is not as expected.
    """
    if path.exists() and expected.problem(path) is None:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _open_locked(part) as file:
        try:
            # The process that held the lock before us may have finished the file.
            if path.exists():
                problem = expected.problem(path)
                if problem is None:
                    return path
                progress(f"{path} is fetched again, for it is not as expected: {problem}")
            if not expected.has_checksum:
                file.truncate(0)
            started = time.monotonic()
            if expected.num_bytes is not None and expected.num_bytes >= _LARGE_BYTES:
                progress(f"fetching {path.name}: {expected.num_bytes:,} bytes")
            for url in urls:
                try:
                    _fetch_checked(url, file, path, expected)
                except _NotThereError as error:
                    missing = str(error)
                    continue
                os.fsync(file.fileno())
                part.replace(path)
                seconds = time.monotonic() - started
                progress(f"fetched {path.name}: {path.stat().st_size:,} bytes in {seconds:.1f} s")
                return path
        finally:
            # Nothing arrived, or nothing of use: no trace of it either.
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink(missing_ok=True)
    raise DataError(
        f"cannot download {path.name}: {missing} for {' and '.join(urls)}. "
        f"Check the address, {_MEND}"
    )


def _fetch_checked(url: str, file: IO[bytes], path: Path, expected: Expected) -> None:
    """Complete ``file`` from ``url``; what was resumed and proves wrong is fetched once afresh."""
    resumed = file.tell() > 0
    _fetch_with_retries(url, file, path.name)
    file.flush()
    problem = expected.problem(Path(file.name), "received")
    if problem is not None and resumed:
        logger.warning("%s: the part on disk did not fit; fetching it from the start", path.name)
        file.truncate(0)
        _fetch_with_retries(url, file, path.name)
        file.flush()
        problem = expected.problem(Path(file.name), "received")
    if problem is not None:
        # Nothing of it can be used: the next attempt shall not resume from it.
        file.truncate(0)
        raise DataError(
            f"{path.name} from {url}: {problem}. The file there is another one or was altered on "
            f"the way: try again, {_MEND}"
        )


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch_with_retries(url: str, file: IO[bytes], name: str) -> None:
    furthest = file.tell()
    failures = 0
    while True:
        try:
            _request(url, file)
            return
        except _TransportError as error:
            position = file.seek(0, os.SEEK_END)
            if position > furthest:
                furthest, failures = position, 0
            if failures == len(_BACKOFF_S):
                raise DataError(
                    f"cannot download {name} from {url}: {error}. Check the network and run the "
                    f"command again (what arrived is kept), {_MEND}"
                ) from None
            logger.warning(
                "%s: %s; next attempt in %g s from byte %d",
                url, error, _BACKOFF_S[failures], position,
            )  # fmt: skip
            time.sleep(_BACKOFF_S[failures])
            failures += 1


def _request(url: str, file: IO[bytes]) -> None:
    """One request for what is missing from the end of ``file``."""
    position = file.seek(0, os.SEEK_END)
    # Stored bytes are what the checksum is of: no transparent decompression.
    headers = {"Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            if response.status_code == 416:
                # The part is whole already, or longer than the file: the checksum tells.
                return
            if response.status_code in (408, 425, 429) or response.status_code >= 500:
                raise _TransportError(f"the server answered {_status(response)}")
            if response.status_code >= 400:
                raise _NotThereError(f"the server answered {_status(response)}")
            if position and not _continues(response, position):
                file.truncate(0)
            for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                file.write(chunk)
            file.flush()
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise DataError(f"{url} is not an address to download from: {error}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        file.flush()
        raise _TransportError(_reason(error)) from None


def _continues(response: requests.Response, position: int) -> bool:
    """Whether the server took up the range that was asked for; many send the whole file."""
    if response.status_code != 206:
        return False
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return match is not None and int(match.group(1)) == position


def _status(response: requests.Response) -> str:
    return f"{response.status_code} {response.reason or ''}".strip()


def _reason(error: Exception) -> str:
    if isinstance(error, requests.exceptions.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection to the server (no network?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"the connection broke off ({type(error).__name__})"


def _open_locked(part: Path) -> IO[bytes]:
    """Open ``part`` for this process alone, after any other that has it."""
    while True:
        file = part.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks; the checksum still guards the result.
            logger.debug("no file locks at %s", part)
        # Whom we waited for may have renamed or removed what we opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        file.close()
