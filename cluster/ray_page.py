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
from dataclasses import dataclass

log = logging.getLogger(__name__)

_PORTS_TRIED = 50
_STARTUP_S = 60.0
_POLL_S = 0.05
_HEAD_S = 5.0
_CHUNK_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16
# How long a question that the command answers is kept until it can: Ray has to start first.
_ANSWER_S = 15.0

# Where Ray's dashboard, or whoever is in its place, tells of the runs of Ray Train.
RUNS_PATH = "/api/train/v2/runs/v1"

# What answers a path, as JSON, without the dashboard; None leaves it to the dashboard.
Answer = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that was started: where it will listen, and whether its process is there."""

    address: tuple[str, int]
    is_alive: Callable[[], bool] = lambda: True


class RayPage:
    """Listens at the dashboard's address until it is closed.

    Args:
        host: to listen on.
        port: to listen on; None takes the first free one from ``first_port`` on.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, host: str, port: int | None, *, first_port: int) -> None:
        self._listener = _listen(host, port, first_port)
        self.address = (host, int(self._listener.getsockname()[1]))
        self._answer: Answer | None = None
        self._can_answer = threading.Event()
        self._on_start: Callable[[], None] = lambda: None
        self._is_told = False
        self._start: Callable[[], Dashboard] | None = None
        self._lock = threading.Lock()  # of what is below, and of what attach() sets
        self._backend: tuple[str, int] | None = None
        # Those who wait for the dashboard; None ends the thread that starts it.
        self._wanted: queue.SimpleQueue[Future[None] | None] = queue.SimpleQueue()
        self._closed = False

    @property
    def is_awake(self) -> bool:
        """Whether the dashboard itself is there."""
        return self._backend is not None

    def attach(self, answer: Answer, on_start: Callable[[], None]) -> None:
        """From now on there is something to tell.

        Args:
            answer: see ``Answer``; asked as long as the dashboard is not there.
            on_start: called whenever the dashboard has started; soon, if it has already.
        """
        with self._lock:
            self._answer, self._on_start, self._is_told = answer, on_start, False
            if self._backend is not None:
                self._wanted.put(Future())
        self._can_answer.set()

    def serve(self, start: Callable[[], Dashboard]) -> None:
        """Begin to answer.

        Args:
            start: starts the dashboard. Called in a thread that lives as long as the page, because
                Linux ends the dashboard with the thread that started it.
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
            all_waiting = [waiting]
            if self._backend is None:
                try:
                    assert self._start is not None
                    dashboard = self._start()
                    _wait_for(dashboard)
                    with self._lock:
                        self._backend, self._is_told = dashboard.address, False
                except Exception:  # whatever Ray raises: the training matters more
                    log.warning("Ray's dashboard did not start", exc_info=True)
                    # Whoever has come meanwhile would only see the same.
                    with suppress(queue.Empty):
                        while (other := self._wanted.get_nowait()) is not None:
                            all_waiting.append(other)
                        self._wanted.put(None)  # the end, for the loop
            self._tell()
            for each in all_waiting:
                each.set_result(None)

    def _tell(self) -> None:
        """Once for each dashboard, and for each who asked for it."""
        with self._lock:
            if self._backend is None or self._is_told:
                return
            self._is_told, on_start = True, self._on_start
        try:
            on_start()
        except Exception:  # whatever Ray raises
            log.warning("Ray's dashboard does not know of the run", exc_info=True)

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
            backend = self._connected()
            if backend is None:
                head = _head(client)
                if not head:
                    return  # somebody who only knocked
                body = self._answered(_path(head))
                if body is not None:
                    client.sendall(_response(body))
                    return
                started: Future[None] = Future()
                self._wanted.put(started)
                started.result()
                backend = self._connected()
            if backend is None:
                return
            with backend:
                backend.sendall(head)
                there = threading.Thread(target=_pump, args=(client, backend), daemon=True)
                there.start()
                _pump(backend, client)
                there.join()

    def _connected(self) -> socket.socket | None:
        """A connection to the dashboard, if it is there; one that is gone is forgotten."""
        where = self._backend
        if where is None:
            return None
        try:
            return socket.create_connection(where)
        except ConnectionRefusedError:
            with self._lock:
                if self._backend == where:
                    self._backend = None
            return None

    def _answered(self, path: str) -> bytes | None:
        if path == RUNS_PATH:
            self._can_answer.wait(_ANSWER_S)
        return self._answer(path) if self._answer is not None else None


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


def _wait_for(dashboard: Dashboard) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while True:
        try:
            socket.create_connection(dashboard.address).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            if not dashboard.is_alive():
                raise RuntimeError("its process has ended, see dashboard.log of Ray") from None
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
