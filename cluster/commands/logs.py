"""``babelray logs``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.hints import runs_flag
from cluster.options import KeepsArguments, given_arguments, runs_option, say
from data_shards.errors import UserError

if TYPE_CHECKING:
    from cluster.launch.records import Record


@click.command(cls=KeepsArguments)
@click.argument("run")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Only this rank's log.")
@click.option("--driver", is_flag=True, help="What the command itself and Ray said.")
@click.option("--failures", is_flag=True, help="What went wrong and what was done about it.")
@click.option(
    "--lines",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    metavar="N",
    help="How many of the last lines.",
)
@click.option(
    "--follow", "-f", is_flag=True, help="Go on with what comes, until the run ends; Ctrl-C leaves."
)
@runs_option
def logs(
    run: str,
    rank: int | None,
    driver: bool,
    failures: bool,
    lines: int,
    follow: bool,
    runs: Path,
) -> None:
    """Show the logs of the run RUN: by default those of all ranks, in the order of their times.

    Of a run that was launched on a cluster, --follow shows its progress, as babelray launch does.

    \b
    Examples:
      babelray logs demo
      babelray logs demo --rank 1 --follow
      babelray logs demo --failures
    """
    if (rank is not None) + driver + failures > 1:
        raise click.UsageError("give one of --rank, --driver and --failures")
    from cluster import logs as reading
    from cluster.launch.remote import launched_elsewhere, relay
    from cluster.naming import find_run, is_claimed

    record = launched_elsewhere(run, runs)
    if record is not None:
        if follow and not (driver or failures) and rank is None:
            _watch(record, runs)
        else:
            relay(record, "logs", given_arguments(), runs, click.echo)
        return

    run_dir = find_run(run, runs)
    is_merged = False
    if rank is not None:
        found = [reading.rank_log(run_dir, rank)]
    elif driver:
        found = [reading.driver_log(run_dir)]
    elif failures:
        found = [reading.failures_log(run_dir)]
    else:
        found, is_merged = reading.rank_logs(run_dir), True
    is_live = is_claimed(run_dir)
    # A run without failures has no file of them, and that is no mistake of whoever asks.
    if not any(log.file.exists() for log in found) and not failures and not (follow and is_live):
        raise UserError(f"{run_dir}: {_missing(run_dir, rank)}")

    def show(line: reading.Line) -> None:
        click.echo(f"{line.label} | {line.text}" if is_merged else line.text)

    last = reading.last_lines(found, lines)
    for line in last:
        show(line)
    if not follow or not is_live:
        rest = [line for log in found for line in log.rest()]
        for line in rest:
            show(line)
        if failures and lines and not [*last, *rest]:
            say("no failures so far")
        if follow:
            say(f"the run {run_dir.name} is not being trained; that was its end")
        return
    more = (lambda: reading.rank_logs(run_dir)) if is_merged else (lambda: [])
    try:
        for line in reading.follow(run_dir, found, more=more):
            show(line)
    except KeyboardInterrupt:
        return
    where = runs_flag(run_dir.parent)
    say(f"the run {run_dir.name} has ended: babelray status {run_dir.name}{where} tells how")


def _watch(record: Record, runs: Path) -> None:
    """Follow the job as ``babelray launch`` does, from its beginning."""
    from cluster.commands.launch import finish, watch
    from cluster.console import open_console
    from cluster.launch.order import read_config
    from cluster.launch.records import open_target

    target = open_target(record.place, runs)
    job = target.find(record.run)
    if job is None:
        raise UserError(
            f"there is no job of the run {record.run} on {target.describe()} any more: go on with "
            f"it (babelray resume {record.run}), or look at its files there"
        )
    config, _ = read_config(None, (), record.place, before=record.config)
    with open_console("auto") as console:
        over, _ = watch(target, job, config, console)
    finish(job, over, runs)


def _missing(run_dir: Path, rank: int | None) -> str:
    from cluster.logs import rank_logs

    others = [log.label for log in rank_logs(run_dir)]
    if rank is not None and others:
        return f"there is no log of rank {rank}; there are: {', '.join(others)}"
    return "there are no logs yet: no rank has started"
