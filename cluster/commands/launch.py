"""``babelray launch`` and ``babelray resume``."""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.console import LOG_FORMAT_VARIABLE, LOG_FORMATS, LogFormat, errors_told, open_console
from cluster.hints import runs_flag
from cluster.options import (
    config_option,
    json_option,
    mirror_option,
    parse_workers,
    place_option_names,
    place_options,
    print_json,
    runs_option,
    say,
    set_option,
    with_mirror,
)
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from cluster.console import Console
    from cluster.launch.records import Record
    from cluster.launch.target import Job, Place, Submission, Target
    from trainer.config import RunConfig

_INTERRUPTED = 128 + signal.SIGINT

_log_format_option = click.option(
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="auto",
    show_default=True,
    envvar=LOG_FORMAT_VARIABLE,
    help="How the run is told of on standard error: as babelray train --help says.",
)


@click.command()
@config_option
@set_option
@click.option(
    "--name", metavar="RUN", help="Name of the run; by default the configuration's and the time."
)
@place_options
@mirror_option
@click.option("--dry-run", is_flag=True, help="Print what would be applied; change nothing.")
@click.option("--detach", is_flag=True, help="Do not wait for the run; only launch it.")
@click.option("--no-checks", is_flag=True, help="Launch without looking first whether it can run.")
@_log_format_option
@runs_option
@json_option
def launch(
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    mirror: str | None,
    dry_run: bool,
    detach: bool,
    no_checks: bool,
    log_format: LogFormat,
    runs: Path,
    as_json: bool,
    **place_values: Any,
) -> None:
    """Train on a cluster: on Kubernetes through KubeRay, or on a Ray cluster that already runs.

    With RAY_ADDRESS set (http://HOST:8265, or HOST:6379) the run goes there through Ray's Jobs API;
    else the manifests of an overlay are applied with kubectl. Then the run is followed; Ctrl-C
    stops following and leaves it running. Launching the same name again goes on with the run.

    \b
    Examples:
      babelray launch --config configs/tiny.yaml --name first --overlay cpu-smoke
      babelray launch --config configs/base.yaml --name base --overlay gpu-multi-node --nodes 4
      babelray launch --config configs/base.yaml --name base --component kueue --dry-run
      RAY_ADDRESS=http://head:8265 babelray launch --config configs/base.yaml --name base
    """
    from cluster import naming
    from cluster.launch.order import choose_place, read_config, training
    from cluster.launch.records import open_target, read_record, write_record

    if name is not None:
        naming.check_name(name)
    before = read_record(name, runs) if name is not None else None
    if config_file is None and before is None:
        raise UserError(
            "give the configuration: for example --config configs/base.yaml"
            + (f" (no run {name} was launched from here before)" if name else "")
        )
    name = naming.new_name(config_file) if name is None else name
    place = choose_place(**place_values, before=before.place if before is not None else None)
    if before is not None:
        _check_same_storage(name, before.place, place, runs)
    config, text = read_config(
        config_file,
        with_mirror(settings, mirror),
        place,
        before=before.config if before is not None else None,
    )
    target = open_target(place, runs)
    submission = training(name, text, config, target)
    if dry_run:
        click.echo(target.render(submission).rstrip("\n"))
        return
    console = open_console(log_format)
    with errors_told(console), console:
        console.name(name)
        job = _launch(target, submission, before, runs, console, checks=not no_checks)
        over, has_begun = (None, True) if detach else watch(target, job, config, console)
    if before is not None and over is not None and over.phase == "failed" and not has_begun:
        # It may have been refused for what is new in its configuration.
        write_record(replace(before, place=target.place), runs)
    if as_json:
        print_json(dataclasses.asdict(over or job))
    if not detach:
        finish(job, over, runs)
        return
    if not as_json:
        click.echo(job.id)
    say(f"watch it: babelray logs {name} --follow{runs_flag(runs)}")


def _check_same_storage(name: str, before: Place, now: Place, runs: Path) -> None:
    """Refuse to begin a second run of a name: the first could not be found from here any more."""
    if (before.kind, before.storage) != (now.kind, now.storage):
        raise UserError(
            f"the run {name} was launched with its files in {before.storage} ({before.kind}), not "
            f"{now.storage} ({now.kind}): go on with it by babelray resume {name}{runs_flag(runs)}"
            ", or choose another --name"
        )


@click.command()
@click.argument("run")
@set_option
@click.option(
    "--workers",
    callback=parse_workers,
    metavar="N|MIN:MAX",
    help="Of a run on this machine: as in train.",
)
@place_options
@_log_format_option
@runs_option
def resume(
    run: str,
    settings: tuple[str, ...],
    workers: int | tuple[int, int] | None,
    log_format: LogFormat,
    runs: Path,
    **place_values: Any,
) -> None:
    """Go on with the run RUN from its last checkpoint, where it ran: here, or on its cluster.

    \b
    Examples:
      babelray resume demo
      babelray resume base --nodes 8 --set trainer.max_steps=200000
    """
    from cluster.commands.train import train
    from cluster.launch.records import read_record

    again: click.Command
    if read_record(run, runs) is not None:
        if workers is not None:
            raise UserError(f"--workers: the run {run} is on a cluster: give --nodes and --gpus")
        again = launch
        options = {"name": run, "settings": settings, "log_format": log_format, "runs": runs}
        options |= place_values
    else:
        if given := place_option_names(place_values):
            raise UserError(
                f"{given[0]}: the run {run} was not launched on a cluster from "
                "here: leave it out, or launch the run by its name: babelray launch --name "
                f"{run} --config FILE"
            )
        again = train
        options = {"name": run, "settings": settings, "workers": workers, "resume": True}
        options |= {"log_format": log_format, "runs": runs}
    click.get_current_context().invoke(again, **options)


def _launch(
    target: Target,
    submission: Submission,
    before: Record | None,
    runs: Path,
    console: Console,
    *,
    checks: bool,
) -> Job:
    from cluster.launch.preparation import check
    from cluster.launch.records import Record, forget, write_record

    run = submission.run
    console.say(f"launching {run} on {target.describe()}")
    if checks:
        check(target, submission, console.say)
    record = Record(run, target.place, submission.config or "", time.time())
    # Before it is handed over: whatever happens then, the run can be found.
    write_record(record, runs)
    try:
        job = target.submit(submission)
    except UserError:
        if not _may_be_there(target, run):
            forget(record, before, runs)
        raise
    except KeyboardInterrupt:
        console.say(
            f"it may be launched already: babelray status {run}{runs_flag(runs)}", "warning"
        )
        raise
    write_record(replace(record, place=target.place), runs)
    where = runs_flag(runs)
    console.say(f"launched: {job.id}; Ctrl-C stops watching, and the run goes on")
    for what in ("status", "logs", "dashboard", "stop"):
        console.say(f"  babelray {what} {run}{where}")
    return job


def _may_be_there(target: Target, run: str) -> bool:
    """Whether the cluster has the run after a launch that went wrong, or does not say."""
    try:
        return target.find(run) is not None
    except UserError:
        return True


def watch(target: Target, job: Job, config: RunConfig, console: Console) -> tuple[Job | None, bool]:
    """Follow a training until it is over; Ctrl-C only ends the following, and gives None.

    Returns:
        The job at its end, and whether ranks took up the run before.
    """
    from cluster.launch.follow import follow_training

    has_begun = False

    def begun() -> None:
        nonlocal has_begun
        has_begun = True

    console.begin()
    try:
        over = follow_training(target.follow(job), config, console, begun=begun)
    except KeyboardInterrupt:
        return None, has_begun
    return over or job, has_begun


def finish(job: Job, over: Job | None, runs: Path) -> None:
    """Say how a job ended that was followed, and what comes next.

    Args:
        job: as it was found.
        over: as it was at its end; None if it is not followed any more.
        runs: the folder of runs here.

    Raises:
        RunFailedError: it failed.
        click.exceptions.Exit: it is not followed any more.
    """
    where = runs_flag(runs)
    if over is None:
        say(
            f"not watched any more; {job.run} goes on. Watch: babelray logs {job.run} --follow"
            f"{where}; end it: babelray stop {job.run}{where}"
        )
        raise click.exceptions.Exit(_INTERRUPTED)
    job = over
    if job.phase == "failed":
        why = f": {job.message}" if job.message else ""
        raise RunFailedError(
            f"{job.run} failed on the cluster{why}\n"
            f"  what happened: babelray status {job.run}{where}\n"
            f"  go on from its last checkpoint: babelray resume {job.run}{where}"
        )
    if job.phase == "stopped":
        click.echo(f"{job.run}: stopped")
        say(f"go on: babelray resume {job.run}{where}")
        return
    click.echo(f"{job.run}: finished")
    say(f"next: babelray evaluate {job.run}{where}")
