"""Trainings beside each other: one task of Ray's each, as many at a time as the cluster allows."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import session
from cluster.naming import claim, logs_dir
from cluster.ranks import LOG_FORMAT, end_with_parent
from data_shards.errors import RunFailedError, UserError
from trainer.config import RunConfig

# Of a task whose process or machine was lost; the next attempt goes on from its last checkpoint.
_MOST_DEATHS = 3

# How often it is told what is being worked on.
_STILL_S = 60.0

# How long a killed command's processes may take to let their runs go.
_LEAVE_S = 15.0

# Trains as the run's only rank, in a process of its own: ``(config, run_dir) -> None``.
Work = Callable[[RunConfig, Path], None]


@dataclass(frozen=True)
class Ended:
    """A trial that is over: well, or with what stopped it."""

    run_dir: Path
    error: UserError | RunFailedError | None


def run_trials(
    trials: Sequence[tuple[RunConfig, Path]],
    work: Work,
    *,
    parallel: int | None,
    dashboard_port: int | None = None,
    begun: Callable[[session.Session, int], None] = lambda found, parallel: None,
    still: Callable[[list[Path]], None] = lambda running: None,
) -> Iterator[Ended]:
    """Work on every trial; what one meets does not stop the others.

    A trial has one GPU where the cluster has GPUs (or a part of one, where ``parallel`` asks for
    more trials than there are), otherwise one CPU and one thread (or ``trainer.threads``).

    Args:
        trials: configurations with the runs' folders, which all machines reach under the same
            paths; begun in this order.
        work: what is done with each.
        parallel: how many at a time, at most; by default as many as there is room for.
        dashboard_port: for the page of a Ray of our own.
        begun: is told what Ray offers, and how many trials it will work on at a time.
        still: is told once a minute which are being worked on.

    Yields:
        Trials as they end. Closing the iterator ends those that run.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS; a port in use; more at a time than fit.
    """
    if not trials:
        return
    log_file = logs_dir(trials[0][1]) / "driver.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    threads = trials[0][0].trainer.threads or 1
    session.check_ports(dashboard_port=dashboard_port, metrics_host="", metrics_port=0)
    with (
        log_file.open("a", encoding="utf-8") as log,
        # Ray prints the deaths of processes on standard output, which is for results.
        redirect_stdout(log),
        session.connect(
            min_cpus=parallel or 1, threads=threads, dashboard_port=dashboard_port
        ) as ray_session,
    ):
        at_a_time = min(parallel or _room(ray_session), len(trials))
        options = resources(at_a_time, int(ray_session.num_cpus), int(ray_session.num_gpus))
        begun(ray_session, at_a_time)
        yield from _run(trials, work, at_a_time, options, still)


def _room(ray_session: session.Session) -> int:
    return max(1, int(ray_session.num_gpus or ray_session.num_cpus))


def resources(at_a_time: int, num_cpus: int, num_gpus: int) -> dict[str, float]:
    """What each of so many trials takes of a cluster, as options of a task of Ray's.

    Raises:
        UserError: there are fewer CPUs, and no GPUs.
    """
    if num_gpus:
        return {"num_cpus": 0, "num_gpus": 1 / math.ceil(at_a_time / num_gpus)}
    if at_a_time > max(1, num_cpus):
        raise UserError(
            f"--parallel {at_a_time}: Ray offers {num_cpus} CPUs, and each training takes one: "
            f"give --parallel {num_cpus}, or none to take what there is"
        )
    return {"num_cpus": 1, "num_gpus": 0}


def _run(
    trials: Sequence[tuple[RunConfig, Path]],
    work: Work,
    at_a_time: int,
    options: dict[str, float],
    still: Callable[[list[Path]], None],
) -> Iterator[Ended]:
    import ray

    # One call a process: a process group, DeepSpeed's state and a log file are made in each.
    task = ray.remote(**options, max_calls=1, max_retries=_MOST_DEATHS)(_work)
    waiting = list(reversed(trials))
    running: dict[Any, Path] = {}
    while waiting or running:
        while waiting and len(running) < at_a_time:
            config, run_dir = waiting.pop()
            running[task.remote(work, config.to_json(), str(run_dir))] = run_dir
        done, _ = ray.wait(list(running), num_returns=1, timeout=_STILL_S)
        if not done:
            still(list(running.values()))
        for reference in done:
            yield Ended(running.pop(reference), _error_of(reference))


def _error_of(reference: Any) -> UserError | RunFailedError | None:
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError | RunFailedError):
            return cause
        return RunFailedError(f"{type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return RunFailedError(lines[0] if lines else type(error).__name__)
    return None


def _work(work: Work, config_json: str, run_dir: str) -> None:
    """A task of Ray's."""
    end_with_parent()
    # Ctrl-C reaches the whole terminal; the command decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # DeepSpeed reads these, as torchrun would set them.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    folder = Path(run_dir)
    config = RunConfig.model_validate_json(config_json)
    with claim(folder, patience_s=_LEAVE_S):
        log_file = logs_dir(folder) / "rank-000.log"
        log_file.parent.mkdir(exist_ok=True)
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger(__name__).info("process %d", os.getpid())
        import torch

        torch.set_num_threads(config.trainer.threads or 1)
        try:
            work(config, folder)
        except BaseException:
            logging.getLogger(__name__).exception("the trial failed")
            raise
