"""One address a machine for the metrics of all runs that train there.

Every process of a run keeps its values in files (``trainer.metrics``), in a folder of this machine
that its rank server holds a lock on. All rank servers of the machine that are told the same port
try to listen on it: one of them does, and serves the files of every run whose lock is held, its own
and the others'. When it ends, another takes its place within a second. So the address stays what it
is configured to be, whatever starts and dies behind it, and no free port has to be found; and what
a run leaves behind is not served, since the kernel lets go of its lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast
from wsgiref.simple_server import make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from data_shards.errors import RunFailedError
from trainer.metrics import ServerMetrics, Slot

log = logging.getLogger(__name__)

SERVICE = "babelray metrics"

_LOCK = "lock"
# How often one that does not have the port tries again.
_RETRY_S = 1.0
_ASK_S = 2.0


@dataclass(frozen=True)
class Target:
    """What a machine's rank server is told of metrics: whose, where, and since when (Unix time)."""

    run: str
    host: str
    port: int
    started: float


class Shelf:
    """Where the processes of one run on this machine keep their values, until it is closed."""

    def __init__(self, target: Target) -> None:
        machine = machine_folder(target.port)
        with _alone(machine):
            _sweep(machine)
            self.folder = Path(tempfile.mkdtemp(dir=machine, prefix=f"{target.run}-"))
            self._lock = (self.folder / _LOCK).open("w", encoding="utf-8")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock.write(target.run)
        self._lock.flush()
        self._own = ServerMetrics(target.run, Slot(self.folder, "server"))
        self._own.started.set(target.started)
        self._taken: set[int] = set()
        self._mutex = threading.Lock()

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """For one process, which has ended when the block does."""
        with self._mutex:
            number = next(n for n in range(len(self._taken) + 1) if n not in self._taken)
            self._taken.add(number)
            self._own.live_ranks.set(len(self._taken))
        slot = Slot(self.folder, f"rank{number}")
        try:
            yield slot
        finally:
            slot.vacate()
            with self._mutex:
                self._taken.remove(number)
                self._own.live_ranks.set(len(self._taken))

    def close(self) -> None:
        """Take the run's metrics away."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class Exporter:
    """Serves the machine's metrics as long as nobody else does; in threads of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._closed = threading.Event()
        self._server: ThreadingWSGIServer | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        app = application(machine_folder(self._port))
        is_told = False
        while not self._closed.is_set():
            try:
                self._server = make_server(
                    self._host,
                    self._port,
                    app,
                    server_class=_server_class(self._host),
                    handler_class=_SilentHandler,
                )
            except OSError as error:
                if not is_told and not is_served(self._host, self._port):
                    # The command looked before it started; training matters more.
                    log.warning("no metrics on %s:%d: %s", self._host, self._port, error)
                    is_told = True
                self._closed.wait(_RETRY_S)
            else:
                self._server.serve_forever()

    def close(self) -> None:
        """Give the port up."""
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._thread.join()


def machine_folder(port: int) -> Path:
    """Where this user's runs on this machine that share ``port`` keep their values.

    Raises:
        RunFailedError: somebody else has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"babelray-{os.getuid()}" / f"metrics-{port}"
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise RunFailedError(
                f"{each} is not a folder of this user: remove it, or set TMPDIR to another place"
            )
    return folder


def application(machine: Path) -> Callable[..., Iterable[bytes]]:
    """The WSGI application: ``/metrics`` and ``/healthz``."""
    registry = CollectorRegistry()
    registry.register(_Collector(machine))
    metrics = make_wsgi_app(registry)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return cast("Iterable[bytes]", metrics(environ, start_response))
        if path == "/healthz":
            runs = [_name(folder) for folder in _live(machine)]
            body = json.dumps(
                {"status": "ok", "service": SERVICE, "user": os.getuid(), "runs": sorted(runs)}
            )
            start_response("200 OK", [("Content-Type", "application/json")])
            return [body.encode() + b"\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"/metrics has the metrics, /healthz says that they are served\n"]

    return serve


def is_served(host: str, port: int) -> bool:
    """Whether the metrics of this user's runs on this machine are served there already."""
    import requests

    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    address = f"[{host}]" if ":" in host else host
    try:
        answer = requests.get(f"http://{address}:{port}/healthz", timeout=_ASK_S).json()
        return bool(answer["service"] == SERVICE and answer["user"] == os.getuid())
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return False


class _Collector:
    """Reads all live runs' files whenever it is asked."""

    def __init__(self, machine: Path) -> None:
        self._machine = machine

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for folder in _live(self._machine):
            for metric in _read(folder):
                if metric.name in merged:
                    merged[metric.name].samples += metric.samples
                else:
                    merged[metric.name] = metric
        return merged.values()


def _read(folder: Path) -> list[Metric]:
    files = [str(file) for file in folder.glob("*.db")]
    try:
        return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError) as error:  # it ends just now, or a file is damaged
        log.warning("the metrics in %s cannot be read: %s", folder, error)
        return []


def _live(machine: Path) -> list[Path]:
    """The folders of runs whose rank server lives."""
    return [file.parent for file in sorted(machine.glob(f"*/{_LOCK}")) if _is_held(file)]


def _name(folder: Path) -> str:
    return (folder / _LOCK).read_text(encoding="utf-8")


def _is_held(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sweep(machine: Path) -> None:
    """Remove what runs that were killed have left."""
    for folder in machine.iterdir():
        if folder.is_dir() and not _is_held(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(machine: Path) -> Iterator[TextIO]:
    """No other process makes or removes folders meanwhile."""
    with (machine / _LOCK).open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _server_class(host: str) -> type[ThreadingWSGIServer]:
    class Server(ThreadingWSGIServer):
        """Threads that do not hold the process up."""

        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server
