"""The look before a launch: what is told, and what keeps it from happening."""

from __future__ import annotations

from collections.abc import Callable

from cluster.checks import line
from cluster.launch.target import Submission, Target
from cluster.progress import Level
from data_shards.errors import UserError


def check(target: Target, submission: Submission, say: Callable[[str, Level], None]) -> None:
    """Tell what is not as it should be, and refuse to go on where the job could not run.

    Raises:
        UserError: with every failure and its mend.
    """
    failed = []
    for found in target.preflight(submission):
        if found.outcome == "warning":
            say(line(found), "warning")
        elif found.outcome == "failure":
            failed.append(line(found))
    if failed:
        raise UserError(
            f"{submission.run} cannot run on {target.describe()}; nothing was changed:\n  "
            + "\n  ".join(failed)
        )
