"""The training processes of one machine, forked from a server that has the imports behind it.

Ray Train's worker is a thin supervisor: it asks its machine's ``RankServer`` for a process, waits
for it, and takes its place in Ray's view of the group. The training itself is in that process.

Why not in the worker itself: a group that failed is started anew with fresh worker processes, and
importing torch and DeepSpeed in each took most of a recovery's time (``benchmarks/recovery.py``).
The server imports once a machine, is not part of the group and so outlives it, and a fork takes
milliseconds. Every attempt still begins in a clean process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from cluster import allocator
from cluster.exporter import Exporter, Shelf, Target
from cluster.failures import RankDiedError
from cluster.naming import logs_dir
from data_shards.errors import RunFailedError
from trainer import startup
from trainer.config import RunConfig
from trainer.metrics import Slot
from trainer.watchdog import COLLECTIVE_TIMEOUTS

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_PRELOAD = ["cluster.preload", "trainer.preload"]

# How long a rank may take to end once its supervisor is gone.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True)
class Task:
    """All that a rank is given. ``train`` replaces the trainer's loop in tests."""

    config: RunConfig
    run_dir: Path
    threads: int
    commanded_at: float
    train: Callable[..., object] | None = None
    # When the command began, and had done what: Unix times, in their order (trainer.startup).
    marks: dict[str, float] = field(default_factory=dict)
    # How long the run's events were by then: what they have since is of a group of this command's.
    events_bytes: int = 0
    # To the rank server in the command's own process (cluster.local_ranks), where that is used.
    door: tuple[str, bytes] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Place:
    """A rank's place in the group."""

    rank: int
    world_size: int
    local_rank: int


class RankServer:
    """Starts training processes on its machine; an actor, one a machine and run.

    Args:
        warm: fork from a process that has imported everything; else start each from nothing.
        metrics: where the machine's metrics are served; None serves none.
        output: file for what ranks print beside their logs; by default where this process prints.
    """

    def __init__(
        self, *, warm: bool, metrics: Target | None = None, output: Path | None = None
    ) -> None:
        self._warm = warm
        self._output = output
        self._shelf: Shelf | None = None
        self._exporter: Exporter | None = None
        if metrics is not None:
            self._serve(metrics)
        self._context: Any = multiprocessing.get_context("forkserver" if warm else "spawn")
        if warm:
            # A CUDA context does not survive a fork: look at the devices without making one.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            self._context.set_forkserver_preload(_PRELOAD)
            with _starting():
                self._ensure_forkserver()

    def ready(self) -> None:
        """Return when a rank can be started as quickly as ever."""
        if self._warm:
            process = self._context.Process(target=os.getpid, daemon=True)
            self._start(process)
            process.join()

    def _start(self, process: BaseProcess) -> None:
        with _starting():
            if self._warm:
                self._ensure_forkserver()
                process.start()  # waits for the server's imports; prints where the server does
            else:
                with _printing_to(self._output):
                    process.start()

    def _ensure_forkserver(self) -> None:
        with _printing_to(self._output):
            forkserver.ensure_running()

    def _serve(self, metrics: Target) -> None:
        try:
            self._shelf = Shelf(metrics)
            self._exporter = Exporter(metrics.host, metrics.port)
        except (OSError, RunFailedError) as error:  # training matters more
            logger.warning("no metrics: %s", error)

    def close(self, *, is_lost: bool = False) -> None:
        """Take the run's metrics away; with ``is_lost``, so that others tell of it."""
        if self._exporter is not None:
            self._exporter.close()
        if self._shelf is not None:
            self._shelf.close(remove=not is_lost)

    def run(
        self, task: bytes, place: Place, environment: dict[str, str], supervisor_pid: int
    ) -> object:
        """Train in a new process; returns or raises what it did.

        Args:
            task: a ``Task``, pickled.
            environment: the supervisor's, with the devices and the rendezvous.
            supervisor_pid: the process ends with it.

        Raises:
            RankDiedError: the process ended without a word.
        """
        with self._shelf.slot() if self._shelf else nullcontext() as slot:
            return self._run(task, place, environment, supervisor_pid, slot)

    def _run(
        self,
        task: bytes,
        place: Place,
        environment: dict[str, str],
        supervisor_pid: int,
        slot: Slot | None,
    ) -> object:
        receiver, sender = self._context.Pipe(duplex=False)
        process: BaseProcess = self._context.Process(
            target=_main,
            args=(sender, task, place, environment, (supervisor_pid, os.getpid()), slot),
            name=f"babelray rank {place.rank}",
            daemon=True,
        )
        self._start(process)
        sender.close()  # so that the process' death ends the pipe
        try:
            _wait_beside(receiver, supervisor_pid)
            if not receiver.poll(_LAST_WORDS_S):
                process.kill()  # it hangs so that it does not see its supervisor's end itself
            outcome = _receive(receiver)
        finally:
            receiver.close()
            process.join(_LAST_WORDS_S)
            if process.is_alive():
                process.kill()  # its slot is about to be another's
        if outcome is None:
            process.join()
            raise RankDiedError(place.rank, int(process.pid or 0), int(process.exitcode or 0))
        succeeded, value = outcome
        if not succeeded:
            raise value
        return value


_start_lock = threading.Lock()


@contextmanager
def _starting() -> Iterator[None]:
    """A child that is started in the block runs no main module, and Ctrl-C does not end it."""
    main = sys.modules["__main__"]
    with _start_lock, _deaf_to_interrupts():
        # multiprocessing would run it anew in each child: Ray's worker, or the command.
        kept = {name: vars(main).pop(name, None) for name in ("__file__", "__spec__")}
        main.__spec__ = None
        try:
            yield
        finally:
            vars(main).update({name: value for name, value in kept.items() if value is not None})


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Children take over that this thread blocks SIGINT; ``_main`` ignores it and unblocks it.

    Ctrl-C reaches the whole terminal. A process that still imports would end of it, and with it
    the run, which is only to save and stop.
    """
    resource_tracker.ensure_running()  # older Pythons' unblocks SIGINT when it starts its process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _printing_to(file: Path | None) -> Iterator[None]:
    """What is started in the block prints to ``file``; so does this process: keep it short."""
    if file is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    try:
        with file.open("ab") as stream:
            for number in kept:
                os.dup2(stream.fileno(), number)
        yield
    finally:
        for number, own in kept.items():
            os.dup2(own, number)
            os.close(own)


def _wait_beside(receiver: Connection, pid: int) -> None:
    """Wait until there is something to receive, or the process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old kernel, or gone already
        while not receiver.poll(_LAST_WORDS_S) and is_alive(pid):
            pass
        return
    try:
        wait([receiver, handle])
    finally:
        os.close(handle)


def _receive(receiver: Connection) -> tuple[bool, Any] | None:
    try:
        return cast("tuple[bool, Any]", pickle.loads(receiver.recv_bytes()))  # noqa: S301
    except (EOFError, OSError):
        return None


def _main(
    sender: Connection,
    task: bytes,
    place: Place,
    environment: dict[str, str],
    guardians: tuple[int, ...],
    slot: Slot | None,
) -> None:
    """A rank's process."""
    _end_with(guardians)
    # Ctrl-C reaches the whole terminal; the command decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see _deaf_to_interrupts
    os.environ.clear()
    os.environ.update(environment)
    # DeepSpeed reads these, as torchrun would set them.
    os.environ.update(
        RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world_size)
    )
    outcome: tuple[bool, Any]
    try:
        outcome = True, _train(pickle.loads(task), place, slot)  # noqa: S301
    except BaseException as error:
        outcome = False, _portable(error)
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    logging.shutdown()
    # Threads of gloo, NCCL and DeepSpeed may be stuck behind a rank that died: do not wait.
    os._exit(0)


def _portable(error: BaseException) -> BaseException:
    """The error itself, or its text where it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        logger.debug("cannot be pickled: %r", error, exc_info=True)
    return RuntimeError("".join(traceback.format_exception_only(error)).strip())


def _train(task: Task, place: Place, slot: Slot | None) -> object:
    handler = _log_to(logs_dir(task.run_dir) / f"rank-{place.rank:03d}.log")
    # A group that begins again does not begin with the command.
    startup.begin({} if _has_begun(task) else task.marks)
    startup.mark("workers")
    try:
        logger.info(
            "rank %d of %d, process %d, %d threads, %s, %.1f s after the command",
            place.rank,
            place.world_size,
            os.getpid(),
            task.threads,
            allocator.current(),
            time.time() - task.commanded_at,
        )
        import torch

        # OMP_NUM_THREADS was read when the server imported torch.
        torch.set_num_threads(task.threads)
        if torch.cuda.is_available():
            # All of the group's GPUs of this machine are visible, or this rank's alone.
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUTS * task.config.recovery.hang_timeout_s),
        )
        startup.mark("group")
        return (task.train or _trainer_loop())(
            task.config,
            task.run_dir,
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            # A fresh run has no checkpoint to resume from; a group that was restarted has.
            resume=True,
            slot=slot,
        )
    except BaseException:
        logger.exception("rank %d failed", place.rank)
        raise
    finally:
        handler.flush()


def _has_begun(task: Task) -> bool:
    """Whether a group has trained since the command; on whichever machine."""
    try:
        return (task.run_dir / "events.jsonl").stat().st_size > task.events_bytes
    except FileNotFoundError:
        return False


def _trainer_loop() -> Callable[..., object]:
    # Imports DeepSpeed, which takes seconds where nothing is warm: only once the log is open.
    from trainer.attempt import train

    return train


def end_with_parent() -> None:
    """End this process, a worker of Ray's, when the raylet that started it is gone.

    Ray's workers look whether process 1 has inherited them. A subreaper may have instead, such as
    the systemd of a user's session: then they would train on after the command was killed.
    """
    _end_with((os.getppid(),))


def _end_with(pids: tuple[int, ...]) -> None:
    """End this process when one of ``pids`` is gone: a rank without its group is in the way."""

    def watch() -> None:
        try:
            handles = [os.pidfd_open(pid) for pid in pids]
        except ProcessLookupError:
            os._exit(1)
        except (AttributeError, OSError):  # not Linux, or an old kernel
            while all(is_alive(pid) for pid in pids):
                time.sleep(0.5)
        else:
            select.select(handles, [], [])
        os._exit(1)

    threading.Thread(target=watch, name="follow-supervisor", daemon=True).start()


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _log_to(file: Path) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    return handler
