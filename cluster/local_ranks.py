"""The rank server of a run on this machine alone, in the process of the command itself.

On a cluster the machine's ``RankServer`` is an actor. A command that trains here needs no such
process: it imports torch and DeepSpeed into the process that ranks are forked from while Ray is
still starting, and supervisors reach it by a socket that only this user can open.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType

from cluster.exporter import Target
from cluster.naming import is_held
from cluster.ranks import Place, RankServer, is_alive

log = logging.getLogger(__name__)

_KEY_BYTES = 32
_FOLDERS = "babelray-ranks-"
_PAUSE_S = 0.1


class LocalRanks:
    """Serves supervisors of this machine until the end of the block; ``door`` leads to it.

    Args:
        warm: as of ``RankServer``.
        output: as of ``RankServer``.
        metrics: as of ``RankServer``.

    Attributes:
        is_lost: whether those who watch shall be told that the run is gone, should it end now.
    """

    def __init__(self, *, warm: bool, output: Path, metrics: Target | None) -> None:
        self._had_forkserver = _forkserver_pid() is not None
        self._server = RankServer(warm=warm, metrics=metrics, output=output)
        _sweep()
        # The process' own, for _sweep; mode 0700.
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDERS}{os.getpid()}-"))
        self._lock = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        key = os.urandom(_KEY_BYTES)
        self._listener = Listener(str(self._folder / "door"), family="AF_UNIX", authkey=key)
        self.door = (str(self._folder / "door"), key)
        self.is_lost = False
        self._closed = False

    def __enter__(self) -> LocalRanks:
        threading.Thread(target=self._accept, name="local-ranks", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        with suppress(OSError):  # wakes the one who waits in accept()
            self._listener._listener._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        self._server.close(is_lost=self.is_lost)
        pid = _forkserver_pid()
        if not self._had_forkserver and pid is not None:
            # Else it would hold its memory as long as this process lives.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)  # it may still be importing
            forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def _accept(self) -> None:
        while not self._closed:
            try:
                with ExitStack() as stack:
                    connection = stack.enter_context(self._listener.accept())
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
                    stack.pop_all()  # it is the thread's
            except (OSError, EOFError, RuntimeError, multiprocessing.AuthenticationError):
                if not self._closed:
                    log.warning("a supervisor did not get through", exc_info=True)
                    time.sleep(_PAUSE_S)  # too many files or threads: there may be fewer soon

    def _serve(self, connection: Connection) -> None:
        """One rank, from its supervisor's request to its outcome."""
        with connection, suppress(EOFError, OSError):  # the supervisor is gone
            task, place, environment, pid = connection.recv()
            outcome: tuple[bool, object]
            try:
                outcome = True, self._server.run(task, place, environment, pid)
            except BaseException as error:
                outcome = False, error
            connection.send_bytes(pickle.dumps(outcome))


def run_rank(
    door: tuple[str, bytes], task: bytes, place: Place, environment: dict[str, str]
) -> object:
    """As ``RankServer.run``, for this process as the supervisor, by the server behind ``door``."""
    address, key = door
    with Client(address, family="AF_UNIX", authkey=key) as connection:
        connection.send((task, place, environment, os.getpid()))
        succeeded, value = pickle.loads(connection.recv_bytes())  # noqa: S301
    if not succeeded:
        raise value
    return value


def _sweep() -> None:
    """Remove what commands left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*-*"):
        pid = folder.name.removeprefix(_FOLDERS).partition("-")[0]
        with suppress(OSError, ValueError):
            found = folder.lstat()
            is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            # The lock tells of those whose processes cannot be seen from this container.
            if is_own and not is_alive(int(pid)) and not is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _forkserver_pid() -> int | None:
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid
