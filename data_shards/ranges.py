"""Parts of a file behind ``http(s)://``, fetched so that whoever waits for one can be let go."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from queue import Empty, SimpleQueue
from urllib.error import HTTPError
from urllib.request import Request, urlopen

# The longest that nothing may come from a server that was asked for a part.
_SILENCE_S = 10.0
# A part that takes longer than at this pace, of a reader among sixteen, is asked for again.
_SLOWEST_BYTES_PER_S = 4096
_PARTIAL_CONTENT = 206
_COME_AGAIN = (408, 429)  # request timeout, too many requests


class Closed(Exception):  # noqa: N818 - not an error: whoever closed the store asked for it
    """The store was closed while something was being fetched."""


class FetchError(Exception):
    """One attempt failed; ``final`` if another would fail alike."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class NoRangesError(Exception):
    """The server sends the whole file where a part of it was asked for."""


class RangeFetcher:
    """Asks for parts of files, from many threads at once, until it is closed.

    Each request has a thread of its own, since nothing ends a look-up of a name, a handshake or a
    read from outside. One that nobody waits for any more sees at its next piece that it is late; on
    a silent connection it ends by itself, and no process waits for it.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._answers: set[SimpleQueue[bytes | BaseException]] = set()
        self._lock = threading.Lock()

    def fetch(self, url: str, offset: int, num_bytes: int, sha256: str) -> bytes:
        """Some bytes of what lies at the URL.

        Raises:
            FetchError: they did not come, not in time, or are others.
            NoRangesError: the server knows no ranges.
            Closed: ``close`` was called, before or meanwhile.
        """
        answers: SimpleQueue[bytes | BaseException] = SimpleQueue()
        seconds = _SILENCE_S + num_bytes / _SLOWEST_BYTES_PER_S
        deadline = time.monotonic() + seconds

        def is_late() -> bool:
            return self._closed.is_set() or time.monotonic() > deadline

        def ask() -> None:
            try:
                answers.put(_fetch(url, offset, num_bytes, sha256, is_late))
            except BaseException as error:  # the one who waits gets it, whatever it is
                answers.put(error)

        with self._lock:
            if self._closed.is_set():
                raise Closed
            self._answers.add(answers)
        try:
            threading.Thread(target=ask, name="babelray-range", daemon=True).start()
            answer = answers.get(timeout=seconds)
        except Empty:
            message = f"bytes from {offset} on did not come within {seconds:.0f} s"
            raise FetchError(message) from None
        finally:
            with self._lock:
                self._answers.discard(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """Let go all who wait, with ``Closed``, and all who come."""
        self._closed.set()
        with self._lock:
            for answers in self._answers:
                answers.put(Closed())


def _fetch(
    url: str, offset: int, num_bytes: int, sha256: str, is_late: Callable[[], bool]
) -> bytes:
    wanted = f"bytes={offset}-{offset + num_bytes - 1}"
    request = Request(url, headers={"Range": wanted})  # noqa: S310 - http(s), by the store's choice
    try:
        with urlopen(request, timeout=_SILENCE_S) as response:  # noqa: S310
            if response.status != _PARTIAL_CONTENT:
                raise NoRangesError
            content = bytearray()
            while piece := response.read1(num_bytes + 1 - len(content)):
                content += piece
                if is_late():
                    raise FetchError(f"bytes from {offset} on come too slowly")
    except HTTPError as error:
        error.close()
        final = 400 <= error.code < 500 and error.code not in _COME_AGAIN
        raise FetchError(f"the server answers {error.code} {error.reason}", final=final) from None
    except (OSError, HTTPException) as error:
        raise FetchError(f"bytes from {offset} on did not come: {error!r}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise FetchError(
            f"bytes {offset} to {offset + num_bytes}: expected sha256 {sha256}, found {found} of "
            f"{len(content)} bytes"
        )
    return bytes(content)
