"""Commands about a run whose files lie on a cluster's storage: they are run there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from cluster.hints import runs_flag
from cluster.launch.follow import follow_lines
from cluster.launch.order import runs_there, without_runs
from cluster.launch.preparation import check
from cluster.launch.records import Record, open_target, read_record
from cluster.launch.target import Job, RemoteCommandError, Submission


def launched_elsewhere(run: str, runs: Path) -> Record | None:
    """The launch of a run that is on a cluster; None for one that was begun here.

    Its files may be seen from here or not: the cluster is asked in any case.

    Raises:
        UserError: the record of the launch is damaged.
    """
    if "/" in run:
        return None
    record = read_record(run, runs)
    return None if record is None or _is_of_here(runs / run) else record


def _is_of_here(run_dir: Path) -> bool:
    """Whether a command on this machine has trained the run with a Ray of its own."""
    try:
        return bool(json.loads((run_dir / "ray.json").read_text(encoding="utf-8"))["is_local"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def relay(
    record: Record,
    command: str,
    arguments: Sequence[str],
    runs: Path,
    tell: Callable[[str], None],
) -> None:
    """Run ``babelray COMMAND`` with what was typed here where the run's files are.

    Its hints of what to type next are made to work here, where ``runs`` is the folder of runs.

    Raises:
        UserError: no machine can run it now.
        click.exceptions.Exit: it failed; with its status.
    """
    target = open_target(record.place, runs)
    folder = runs_there(record.place)
    there = (command, *without_runs(tuple(arguments)), "--runs", folder)
    try:
        for line in target.run(record.run, there):
            tell(line.replace(runs_flag(Path(folder)), runs_flag(runs)))
    except RemoteCommandError as error:
        raise click.exceptions.Exit(error.exit_status) from None


def evaluate_there(
    record: Record,
    arguments: Sequence[str],
    runs: Path,
    *,
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> Job | None:
    """Evaluate a run as a job of its own on the cluster, with what was typed here.

    Args:
        tell: takes each line that the job prints.
        say: takes what there is to say besides.

    Returns:
        The job when it is over; None if the following was interrupted: the job goes on.
    """
    target = open_target(record.place, runs)
    there = ("evaluate", *without_runs(tuple(arguments)), "--runs", runs_there(record.place))
    say(f"evaluating {record.run} on {target.describe()}")
    submission = Submission(record.run, "evaluate", there)
    check(target, submission, lambda line, level: say(line))
    job = target.submit(submission)
    try:
        return follow_lines(target.follow(job), tell, waiting=say) or job
    except KeyboardInterrupt:
        say(
            f"not watched any more; the evaluation ({job.id}) goes on, and its result will be in "
            f"the run's folder evaluation/. End it: babelray stop {record.run}{runs_flag(runs)}"
        )
        return None
