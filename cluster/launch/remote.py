"""Commands about a run whose files lie on a cluster's storage: they are run there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from cluster.hints import runs_flag
from cluster.launch.follow import follow_lines
from cluster.launch.order import runs_there, without_runs
from cluster.launch.preparation import check
from cluster.launch.records import Record, open_target, read_record
from cluster.launch.target import Job, Place, RemoteCommandError, Submission
from cluster.status import read_session


def launched_elsewhere(run: str, runs: Path) -> Record | None:
    """The launch of a run that is on a cluster; None for one that was begun here.

    Its files may be seen from here or not: the cluster is asked in any case.

    Raises:
        UserError: the record of the launch is damaged.
    """
    if "/" in run:
        return None
    record = read_record(run, runs)
    # A command on this machine may have trained the run since, with a Ray of its own.
    return None if record is None or read_session(runs / run).get("is_local") else record


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
    flag_there, flag_here = runs_flag(Path(runs_there(record.place))), runs_flag(runs)
    try:
        for line in target.run(record.run, _as_there(command, arguments, record.place)):
            tell(line.replace(flag_there, flag_here))
    except RemoteCommandError as error:
        raise click.exceptions.Exit(error.exit_status) from None


def _as_there(command: str, arguments: Sequence[str], place: Place) -> tuple[str, ...]:
    """What was typed here, with the folder of runs there."""
    return (command, *without_runs(tuple(arguments)), "--runs", runs_there(place))


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
    say(f"evaluating {record.run} on {target.describe()}")
    submission = Submission(record.run, "evaluate", _as_there("evaluate", arguments, record.place))
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
