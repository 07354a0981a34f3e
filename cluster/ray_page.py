"""Ray's dashboard on this machine, started when somebody first looks at it.

The dashboard is ten processes. Starting them takes as much CPU time as all else that a run starts,
and afterwards they wake up many times a second, whether anybody looks or not. So the command itself
listens at the dashboard's address, starts it at the first connection (some seconds), and from then
on passes on what is sent, byte by byte.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

log = logging.getLogger(__name__)

_PORTS_TRIED = 50
_STARTUP_S = 60.0
_POLL_S = 0.05
_HEAD_S = 5.0
_CHUNK_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16

# What answers a path, as JSON, without the dashboard; None leaves it to the dashboard.
Answer = Callable[[str], bytes | None]


class RayPage:
    """Listens at the dashboard's address until it is closed.

    Args:
        host: to listen on.
        port: to listen on; None takes the first free one from ``first_port`` on.
        answer: see ``Answer``; asked as long as the dashboard has not been started.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, host: str, port: int | None, *, first_port: int, answer: Answer | None = None
    ) -> None:
        self._listener = _listen(host, port, first_port)
        self.address = (host, int(self._listener.getsockname()[1]))
        self.answer = answer
        self.on_start: Callable[[], None] = lambda: None
        self._start: Callable[[], tuple[str, int]] | None = None
        self._backend: tuple[str, int] | None = None
        # Those who wait for the dashboard; None ends the thread that starts it.
        self._wanted: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()
        self._closed = False

    @property
    def is_awake(self) -> bool:
        """Whether the dashboard itself is there."""
        return self._backend is not None

    def serve(self, start: Callable[[], tuple[str, int]]) -> None:
        """Begin to answer.

        Args:
            start: starts the dashboard; tells where it listens. Called in a thread that lives as
                long as the page, because Linux ends the dashboard with the thread that started it.
        """
        is_first, self._start = self._start is None, start
        for work in (self._accept, self._keep) if is_first else ():
            threading.Thread(target=work, name="ray-page", daemon=True).start()

    def close(self) -> None:
        """Stop listening; what is being passed on ends with the dashboard."""
        self._closed = True
        self._wanted.put(None)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the one who waits in accept()
        self._listener.close()

    def _keep(self) -> None:
        """Start the dashboard once it is wanted, and stay."""
        while (waiting := self._wanted.get()) is not None:
            if self._backend is None:
                try:
                    assert self._start is not None
                    where = self._start()
                    _wait_for(where)
                    self._backend = where
                    self.on_start()
                except Exception:  # whatever Ray raises: the training matters more
                    log.warning("Ray's dashboard did not start", exc_info=True)
            waiting.set_result(None)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            if self._backend is None:
                head = _head(client)
                if not head:
                    return  # somebody who only knocked
                body = self.answer(_path(head)) if self.answer is not None else None
                if body is not None:
                    client.sendall(_response(body))
                    return
                started: Future[None] = Future()
                self._wanted.put(started)
                started.result()
            if self._backend is None:
                return
            with socket.create_connection(self._backend) as backend:
                backend.sendall(head)
                there = threading.Thread(target=_pump, args=(client, backend), daemon=True)
                there.start()
                _pump(backend, client)
                there.join()


def _listen(host: str, port: int | None, first_port: int) -> socket.socket:
    tried = [port] if port is not None else range(first_port, first_port + _PORTS_TRIED)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    error: OSError | None = None
    for number in tried:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
        except OSError as problem:
            listener.close()
            error = problem
        else:
            return listener
    assert error is not None
    raise error


def _wait_for(where: tuple[str, int]) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while True:
        try:
            socket.create_connection(where).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
        else:
            return


def _head(client: socket.socket) -> bytes:
    """What the client sends up to the end of its request's head; nothing if it sends no more."""
    client.settimeout(_HEAD_S)
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD_BYTES:
        chunk = client.recv(_CHUNK_BYTES)
        if not chunk:
            return b""
        head += chunk
    client.settimeout(None)
    return head


def _path(head: bytes) -> str:
    words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    return words[1] if len(words) == 3 and words[0] == "GET" else ""


def _response(body: bytes) -> bytes:
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            sink.sendall(chunk)
    for side in (source, sink):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
