"""One address a machine for the metrics of all runs that train there.

Every process of a run keeps its values in files (``trainer.metrics``), in a folder of this machine
that its rank server holds a lock on. All rank servers of the machine that are told the same port
try to listen on it: one of them does, and serves the files of every run whose lock is held, its own
and the others'. When it ends, another takes its place within a second. So the address stays what it
is configured to be, whatever starts and dies behind it, and no free port has to be found.

The kernel lets go of a lock when its holder is gone, however it ended. What that run left is not
served any more; if it had not ended as it should, the others tell that it is lost.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, TextIO, cast
from wsgiref.simple_server import make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from cluster.naming import is_held
from data_shards.errors import RunFailedError
from trainer.config import RunConfig
from trainer.metrics import ENDED, RUN_LOST, ServerMetrics, Slot

log = logging.getLogger(__name__)

SERVICE = "babelray metrics"

_LOCK = ".lock"  # of the machine's folder
_NAME = "run"  # in a run's folder
# For how long a run that has vanished is told of.
_LOST_S = 3600.0
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

    @classmethod
    def of(cls, config: RunConfig, run: str, started: float) -> Target | None:
        """As configured; None where no metrics are served."""
        trainer = config.trainer
        if not trainer.metrics_port:
            return None
        return cls(run, trainer.metrics_host, trainer.metrics_port, started)


class Shelf:
    """Where the processes of one run on this machine keep their values, until it is closed."""

    def __init__(self, target: Target) -> None:
        machine = machine_folder(target.port)
        with _alone(machine):
            _sweep(machine, target.run)
            self.folder = Path(tempfile.mkdtemp(dir=machine, prefix=f"{target.run}-"))
            # The folder itself is locked: what cleans temporary files up spares it then, too.
            self._lock: int | None = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (self.folder / _NAME).write_text(target.run, encoding="utf-8")
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
            with suppress(OSError):
                slot.vacate()
            with self._mutex:
                self._taken.remove(number)
                self._own.live_ranks.set(len(self._taken))

    def close(self, *, remove: bool = True) -> None:
        """Take the run's metrics away; without ``remove`` it looks like a run that was lost."""
        if self._lock is not None:
            if remove:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


class Exporter:
    """Serves the machine's metrics as long as nobody else does; in threads of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        app = application(machine_folder(self._port), self._host)
        is_asked = False
        while not self._closed.is_set():
            try:
                server = make_server(
                    self._host,
                    self._port,
                    app,
                    server_class=_server_class(self._host),
                    handler_class=_SilentHandler,
                )
            except OSError as error:
                if not is_asked and not is_served(self._host, self._port):
                    # The command looked before it started; training matters more.
                    log.warning("no metrics on %s:%d: %s", self._host, self._port, error)
                is_asked = True
                self._closed.wait(_RETRY_S)
                continue
            with server:
                server.timeout = _RETRY_S / 2
                while not self._closed.is_set():
                    server.handle_request()

    def close(self) -> None:
        """Give the port up."""
        self._closed.set()
        self._thread.join()


def machine_folder(port: int) -> Path:
    """Where this user's runs on this machine that share ``port`` keep their values.

    Raises:
        RunFailedError: somebody else has made it.
    """
    # The machine's name, should several share the place for temporary files.
    name = f"metrics-{os.uname().nodename}-{port}"
    folder = Path(tempfile.gettempdir()) / f"babelray-{os.getuid()}" / name
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise RunFailedError(
                f"{each} is not a folder of this user: remove it, or set TMPDIR to another place"
            )
    return folder


def application(machine: Path, host: str) -> Callable[..., Iterable[bytes]]:
    """The WSGI application: ``/metrics``, and ``/healthz`` for probes and other rank servers."""
    registry = CollectorRegistry()
    registry.register(_Collector(machine))
    metrics = make_wsgi_app(registry)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return cast("Iterable[bytes]", metrics(environ, start_response))
        if path == "/healthz":
            about = {"status": "ok", **_identity(machine, host), "runs": sorted(_live(machine))}
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(about).encode() + b"\n"]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"/metrics has the metrics, /healthz says that they are served\n"]

    return serve


def _identity(machine: Path, host: str) -> dict[str, Any]:
    """What two servers must agree in, so that one serves the other's runs."""
    found = machine.stat()
    return {"service": SERVICE, "host": host, "folder": f"{found.st_dev}:{found.st_ino}"}


def is_served(host: str, port: int) -> bool:
    """Whether this user's runs on this machine are served there already, as they should be."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    connection = HTTPConnection(reached, port, timeout=_ASK_S)  # and through no proxy
    try:
        connection.request("GET", "/healthz")
        answer = json.loads(connection.getresponse().read())
        wanted = _identity(machine_folder(port), host)
        return all(answer[name] == value for name, value in wanted.items())
    except (OSError, HTTPException, ValueError, KeyError, TypeError, RunFailedError):
        return False
    finally:
        connection.close()


class _Collector:
    """Reads all live runs' files whenever it is asked."""

    def __init__(self, machine: Path) -> None:
        self._machine = machine

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        live = _live(self._machine)
        for run, folders in live.items():
            for metric in _read(run, folders):
                if metric.name in merged:
                    merged[metric.name].samples += metric.samples
                else:
                    merged[metric.name] = metric
        lost = _lost(self._machine) - live.keys()
        if lost:
            family = GaugeMetricFamily(RUN_LOST.name, RUN_LOST.help, labels=RUN_LOST.labels)
            for run in lost:
                family.add_metric([run], 1.0)
            merged[RUN_LOST.name] = family
        return merged.values()


def _read(run: str, folders: Iterable[Path]) -> list[Metric]:
    files = [file for folder in folders for file in folder.glob("*.db")]
    try:
        # An empty one is just being made.
        full = [str(file) for file in files if file.stat().st_size]
        return list(MultiProcessCollector.merge(full))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError, struct.error) as error:
        log.warning("the metrics of %s cannot be read now: %s", run, error)
        return []


def _live(machine: Path) -> dict[str, list[Path]]:
    """The folders of runs whose rank server lives; of several servers of a run they add up."""
    found: dict[str, list[Path]] = {}
    for file in sorted(machine.glob(f"*/{_NAME}")):
        if is_held(file.parent) and (run := _name(file)):
            found.setdefault(run, []).append(file.parent)
    return found


def _lost(machine: Path) -> set[str]:
    """Runs with a rank server that ended here less than an hour ago, though they had not ended."""
    left = [file for file in machine.glob(f"*/{_NAME}") if not is_held(file.parent)]
    return {run for file in left if not _is_done(file.parent) and (run := _name(file))}


def _is_done(folder: Path) -> bool:
    """Whether there is nothing more to tell of a run whose server has ended."""
    try:
        age_s = time.time() - max(file.stat().st_mtime for file in folder.iterdir())
    except (OSError, ValueError):
        return True
    return (folder / ENDED).exists() or age_s > _LOST_S


def _name(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _sweep(machine: Path, run: str) -> None:
    """Remove what nobody needs to hear of any more: this run is there again."""
    for folder in machine.iterdir():
        if not folder.is_dir() or is_held(folder):
            continue
        if _is_done(folder) or _name(folder / _NAME) == run:
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
