"""One run on Ray: start the workers, tell how they fare, stop them cleanly.

Ray Train restarts the group of workers when one dies; the trainer goes on from the run's own last
checkpoint. Ray's own state lies in a hidden folder of the run and decides nothing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from cluster import session, targets
from cluster.exporter import Target
from cluster.failures import explain, failures_path, is_stop, note
from cluster.fit import Fit, Workers
from cluster.hints import runs_flag
from cluster.history import History
from cluster.naming import claim, clear, logs_dir, write_config
from cluster.progress import Narrator, News, Tail
from cluster.ranks import LOG_FORMAT, Task
from data_shards.errors import RunFailedError, UserError
from trainer.config import STOP_FILE, RunConfig
from trainer.storage import write_atomically

if TYPE_CHECKING:
    from cluster.local_ranks import LocalRanks
    from cluster.validation_bleu import Scorer

_POLL_S = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``reason`` is the trainer's; ``signal`` is what stopped it, if anything."""

    run_dir: Path
    step: int
    reason: str | None
    valid_nll: float | None
    seconds: float
    signal: int | None = None


def start(
    config: RunConfig,
    name: str,
    *,
    runs: Path,
    workers: Workers | None = None,
    overwrite: bool = False,
    patience_s: float = 0.0,
    dashboard_port: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[News], None] | None = None,
    train: Callable[..., object] | None = None,
    began_at: float | None = None,
) -> Outcome:
    """Train until the run ends, is stopped by a signal, or fails.

    Resumes from the run's last checkpoint if there is one. Must be called in the main thread.

    Args:
        config: the resolved configuration; written to the run's folder.
        name: the run's name, its folder under ``runs``.
        runs: the folder of runs; on a cluster, storage that all machines share.
        workers: ranks; by default one a GPU, or one where there is none. With bounds, as many as
            there is room for at any time.
        overwrite: remove what an earlier run of this name left.
        patience_s: how long to wait for another command to let the run go, and for the least
            number of workers to have room.
        dashboard_port: for the page of a Ray of our own; by default the first free one.
        say: takes each line for the person who watches.
        tell: takes each event of the run; by default their lines go to ``say``.
        train: replaces ``trainer.attempt.train``, for tests.
        began_at: when the command began (Unix time), for the account of the start.

    Raises:
        UserError: a wrong number of workers, a port in use, a run that is being trained.
        RunFailedError: the run failed; its message says how to go on.
    """
    commanded_at = time.time()
    run_dir = (runs / name).absolute()
    check_lanes(config, workers)
    if session.is_local():  # else the workers run on other machines
        session.check_ports(
            dashboard_port=dashboard_port,
            metrics_host=config.trainer.metrics_host,
            metrics_port=config.trainer.metrics_port,
        )
    with claim(run_dir, patience_s=patience_s):
        if overwrite:
            clear(run_dir, config.recovery)
        logs_dir(run_dir).mkdir(exist_ok=True)
        stop_file = run_dir / STOP_FILE
        stop_file.unlink(missing_ok=True)
        threads = config.trainer.threads
        ranks: list[LocalRanks] = []
        with (
            (logs_dir(run_dir) / "driver.log").open("a", encoding="utf-8") as log,
            # Ray prints the deaths of processes on standard output, which is for results.
            redirect_stdout(log),
            _Interrupts(stop_file, say) as interrupts,
            _logging_to(log),
            ExitStack() as stack,  # what is on it outlives Ray
            session.connect(
                min_cpus=_local_workers(workers or 1),
                threads=threads,
                dashboard_port=dashboard_port,
                meanwhile=lambda: ranks.extend(_begin(config, run_dir, commanded_at, stack)),
            ) as ray_session,
        ):
            interrupts.install()  # Ray's start has put handlers of its own in their place
            if workers is None:
                workers = max(1, min(int(ray_session.num_gpus), config.data.lanes))
            ray_session = _with_room(ray_session, workers, patience_s, say, interrupts)
            _check_resources(ray_session, workers)
            write_config(config, run_dir)
            _note_session(run_dir, ray_session)
            note(run_dir, "commanded")  # what failed before is not what the run recovers from
            if ray_session.dashboard_url:
                say(f"Ray dashboard: {ray_session.dashboard_url}")
            say(f"training {run_dir} on {_described(workers)}")
            task = Task(
                config,
                run_dir,
                session.worker_threads(_bounds(workers)[1], threads),
                commanded_at,
                train,
                marks={
                    "begin": began_at or commanded_at,
                    "command": commanded_at,
                    "ray": time.time(),
                },
                events_bytes=_size(run_dir / "events.jsonl"),
                door=ranks[0].door if ranks else None,
            )
            fit = Fit(task, workers, ray_session)
            scorer = _scorer(config, run_dir, say)
            for server in ranks:
                server.is_lost = True  # until it is known how it ended
            try:
                narrator = _watch(fit, scorer, config, run_dir, interrupts, tell or _lines_to(say))
            finally:
                fit.abandon()
            if fit.error is None or is_stop(fit.error) or interrupts.signal is not None:
                # Else Prometheus shall see that nobody answers there any more.
                targets.remove(run_dir)
                for server in ranks:
                    server.is_lost = False
        stop_file.unlink(missing_ok=True)
        if interrupts.at_once:
            raise KeyboardInterrupt
        reason = narrator.reason
        if fit.error is not None:
            if not is_stop(fit.error):
                raise _failed(fit.error, name, run_dir)
            reason = "stopped"
            note(run_dir, "stopped", step=narrator.last_step)  # no worker could say so
        return Outcome(
            run_dir=run_dir,
            step=narrator.last_step,
            reason=reason,
            valid_nll=narrator.valid_nll,
            seconds=time.time() - commanded_at,
            signal=interrupts.signal if reason in {None, "stopped"} else None,
        )


def _begin(
    config: RunConfig, run_dir: Path, commanded_at: float, stack: ExitStack
) -> Iterator[LocalRanks]:
    """What can be done before Ray is there: the imports of the ranks, if they run here."""
    if session.is_local():
        from cluster.local_ranks import LocalRanks

        yield stack.enter_context(
            LocalRanks(
                warm=config.recovery.standby,
                output=logs_dir(run_dir) / "ranks.out",
                metrics=Target.of(config, run_dir.name, commanded_at),
            )
        )
        import cluster.ray_train
        import cluster.recovery
        import cluster.worker  # noqa: F401 - a second, mostly Ray Train's
    if config.trainer.bleu_every is not None:
        import torch  # noqa: F401 - the scorer's


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@contextmanager
def _logging_to(stream: TextIO) -> Iterator[None]:
    """What this process' own modules log, Ray Train's controller among them, goes there."""
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _note_session(run_dir: Path, ray_session: session.Session) -> None:
    """Where the run's Ray is, for whoever looks at it from another terminal."""
    values = {
        "dashboard_url": ray_session.dashboard_url,
        "is_local": ray_session.is_local,
        "address": None if ray_session.is_local else os.environ.get("RAY_ADDRESS"),
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "time": time.time(),
    }
    write_atomically(run_dir / "ray.json", json.dumps(values, indent=2) + "\n")


def _watch(
    fit: Fit,
    scorer: Scorer | None,
    config: RunConfig,
    run_dir: Path,
    interrupts: _Interrupts,
    tell: Callable[[News], None],
) -> Narrator:
    """Start ``fit`` and tell what the run logs until it ends, or is to end at once."""
    narrator = Narrator(config, past=_past(config, run_dir))
    tails = Tail(run_dir / "events.jsonl"), Tail(failures_path(run_dir))
    fit.start()

    def relay() -> None:
        for tail in tails:
            for event in tail.read():
                if scorer is not None:
                    scorer.hear(event)
                tell(narrator.hear(event))

    is_over = False
    while not is_over:
        fit.join(_POLL_S)
        is_over = interrupts.at_once or not fit.is_alive()  # then what is logged is complete
        interrupts.repeat()
        relay()
        if scorer is not None and not is_over:
            scorer.poll()
    if scorer is not None:
        scorer.finish(lambda: fit.error is not None or interrupts.signal is not None)
        relay()
    return narrator


def _lines_to(say: Callable[[str], None]) -> Callable[[News], None]:
    return lambda news: say(news.line) if news.line is not None else None


def _past(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """What the run logged before: where it stands, and with patience, when it stops."""
    if config.trainer.patience is None:
        return History(run_dir / "events.jsonl").read()
    from trainer.run import read_events

    return read_events(run_dir)


def _scorer(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> Scorer | None:
    if config.trainer.bleu_every is None:
        return None
    from cluster.validation_bleu import Scorer

    return Scorer(config, run_dir, say)


def check_lanes(config: RunConfig, workers: Workers | None) -> None:
    """Refuse more workers than lanes: ranks share the lanes out, and some would get none.

    Raises:
        UserError: as said.
    """
    if workers is not None and _bounds(workers)[1] > config.data.lanes:
        raise UserError(
            f"--workers {_written(workers)}: the run has data.lanes {config.data.lanes}, and every "
            "worker takes at least one: give fewer workers, or start a new run with more lanes"
        )


def _with_room(
    ray_session: session.Session,
    workers: Workers,
    patience_s: float,
    say: Callable[[str], None],
    interrupts: _Interrupts,
) -> session.Session:
    least = _bounds(workers)[0]

    def waiting(found: session.Session) -> None:
        kind, number = _offered(found)
        say(f"waiting for machines: Ray offers {number:.0f} {kind}s for {least} workers, one each")

    return session.with_room(
        ray_session,
        lambda found: _offered(found)[1] >= least or interrupts.signal is not None,
        patience_s=patience_s,
        waiting=waiting,
    )


def _offered(ray_session: session.Session) -> tuple[str, float]:
    """What a worker takes one of, and how many there are."""
    if ray_session.num_gpus:
        return "GPU", ray_session.num_gpus
    return "CPU", ray_session.num_cpus


def _check_resources(ray_session: session.Session, workers: Workers) -> None:
    kind, number = _offered(ray_session)
    if _bounds(workers)[0] > number:
        raise UserError(
            f"--workers {_written(workers)}: Ray offers {number:.0f} {kind}s, one a worker: give "
            "fewer workers or add machines"
        )


def _bounds(workers: Workers) -> tuple[int, int]:
    return (workers, workers) if isinstance(workers, int) else workers


def _written(workers: Workers) -> str:
    least, most = _bounds(workers)
    return str(most) if least == most else f"{least}:{most}"


def _described(workers: Workers) -> str:
    least, most = _bounds(workers)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} worker{'s' if most > 1 else ''}"


def _local_workers(workers: Workers) -> int:
    """How many a Ray of our own has to have room for."""
    least, most = _bounds(workers)
    return min(most, max(least, session.num_cores()))


class _Interrupts:
    """SIGINT and SIGTERM: the first asks the run to save and stop, the second ends it at once."""

    def __init__(self, stop_file: Path, say: Callable[[str], None]) -> None:
        self._stop_file = stop_file
        self._say = say
        self._before: dict[int, Any] = {}
        self.signal: int | None = None
        self.at_once = False

    def __enter__(self) -> _Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.getsignal(number)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals; they are given back at the end of the block."""
        for number in self._before:
            signal.signal(number, self._handle)

    def repeat(self) -> None:
        """Ask again: workers that were just starting have removed the file as an old one."""
        if self.signal is not None and not self._stop_file.exists():
            self._stop_file.touch()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.at_once = True
            return
        self.signal = number
        self._stop_file.touch()
        self._say("saving a checkpoint and stopping; press again to stop at once")


def _failed(error: BaseException, name: str, run_dir: Path) -> RunFailedError:
    log = logs_dir(run_dir) / "driver.log"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        stream.writelines(traceback.format_exception(error))
    return RunFailedError(
        f"the run {name} failed: {explain(error)}\n"
        f"  logs: {log.parent} (the whole error is in {log.name})\n"
        f"  go on from its last checkpoint: babelray train --name {name} --resume"
        f"{runs_flag(run_dir.parent)}"
    )
