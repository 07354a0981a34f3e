"""``babelray stop``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.hints import runs_flag
from cluster.options import runs_option, say
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from cluster.launch.records import Record
    from cluster.launch.target import Job, Target

_POLL_S = 0.25
# Of a job whose command has ended: KubeRay and Ray look every few seconds.
_END_S = 300.0


@click.command()
@click.argument("run")
@click.option(
    "--now", is_flag=True, help="Do not wait for a checkpoint: what came after the last is lost."
)
@runs_option
def stop(run: str, now: bool, runs: Path) -> None:
    """End the run RUN, here or on the cluster that it was launched on; it can go on later.

    Saves a checkpoint first, as Ctrl-C does, and comes back when the run has ended.

    \b
    Examples:
      babelray stop demo
      babelray stop base --now
    """
    from cluster.launch.remote import launched_elsewhere
    from cluster.naming import find_begun_run, is_claimed

    record = launched_elsewhere(run, runs)
    if record is not None:
        _stop_there(record, runs, now=now)
        return
    run_dir = find_begun_run(run, runs)
    if not is_claimed(run_dir):
        raise UserError(f"the run {run_dir.name} is not being trained")
    _end_now(run_dir) if now else _ask(run_dir)
    from cluster.status import summary

    found = summary(run_dir)
    at = "" if found.step is None else f" at step {found.step}"
    click.echo(f"{found.name}: {found.state}{at}")
    say(f"go on: babelray resume {run}{runs_flag(runs)}")


def _ask(run_dir: Path) -> None:
    """Ask until nobody trains the run: ranks that are just starting remove the file as an old one.

    Raises:
        RunFailedError: interrupted while waiting.
    """
    from cluster.naming import is_claimed
    from trainer.config import STOP_FILE

    say(f"asked {run_dir.name} to save a checkpoint and stop; waiting for it")
    try:
        while is_claimed(run_dir):
            (run_dir / STOP_FILE).touch()
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        raise RunFailedError(
            f"{run_dir.name} was asked to stop, and will; not waited for"
        ) from None
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def _end_now(run_dir: Path) -> None:
    """Two signals to the command that trains the run, as if Ctrl-C were pressed twice there.

    Raises:
        UserError: that command runs on another machine.
    """
    from cluster.naming import is_claimed
    from cluster.status import read_session

    ray = read_session(run_dir)
    host = ray.get("host") if isinstance(ray.get("pid"), int) else None
    if host != os.uname().nodename:
        raise UserError(
            f"--now: the command that trains {run_dir.name} runs on "
            f"{host or 'a machine that is not known'}: give the command there, or leave --now out"
        )
    for _ in range(2):
        if is_claimed(run_dir):  # else the number may be another process's by now
            os.kill(ray["pid"], signal.SIGTERM)
            time.sleep(2 * _POLL_S)
    while is_claimed(run_dir):
        time.sleep(_POLL_S)


def _stop_there(record: Record, runs: Path, *, now: bool) -> None:
    from cluster.launch.records import open_target

    target = open_target(record.place, runs)
    jobs = [target.find(record.run), target.find(record.run, "evaluate")]
    going = [job for job in jobs if job is not None and not job.is_over]
    if not going:
        raise UserError(f"nothing of the run {record.run} runs on {target.describe()}")
    where = runs_flag(runs)
    for job in going:
        if job.kind == "train" and job.phase == "running" and not now:
            _ask_there(target, record, runs)
        else:
            target.cancel(job)
        _await_end(target, job)
        click.echo(f"{record.run}: {'training' if job.kind == 'train' else 'evaluation'} ended")
    say(f"go on: babelray resume {record.run}{where}")


def _ask_there(target: Target, record: Record, runs: Path) -> None:
    """Let the run's own machines ask it to stop, and wait for it.

    Raises:
        UserError, click.exceptions.Exit: it could not be asked, and goes on.
    """
    from cluster.launch.remote import relay

    try:
        relay(record, "stop", (record.run,), runs, _say_but_hints)
    except (UserError, click.exceptions.Exit):
        job = target.find(record.run)
        if job is None or job.is_over:
            return  # it has ended by itself
        say(
            "it could not be asked; end it without a checkpoint: "
            f"babelray stop {record.run} --now{runs_flag(runs)}"
        )
        raise


def _await_end(target: Target, job: Job) -> None:
    """Wait until the cluster, too, takes the job for ended: it can be launched again then.

    Raises:
        RunFailedError: that takes very long.
    """
    deadline = time.monotonic() + _END_S
    while True:
        found = target.find(job.run, job.kind)
        if found is None or found.is_over:
            return
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"{job.run} was asked to end, but after {_END_S:.0f} s its job ({job.id}) is still "
                f"{found.phase}: look at it with babelray status {job.run}"
            )
        time.sleep(_POLL_S)


def _say_but_hints(line: str) -> None:
    """What the command says there; how to go on is said here."""
    if not line.startswith("go on:"):
        say(line)
