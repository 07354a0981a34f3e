"""The doctor sent to the cluster as a job: what it finds there comes back as lines of its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.checks import Check, failures
from data_shards.errors import UserError

if TYPE_CHECKING:
    from cluster.launch.target import Submission, Target
    from trainer.config import RunConfig

RUN = "doctor"

# As it is seen from here.
_OUTSIDE = "The cluster from outside"
_TITLES = {"This machine": "The cluster's head"}

# Of a job that told nothing, as much of its log is shown.
_LAST_LINES = 5


def submission(
    target: Target,
    config: RunConfig,
    config_text: str,
    *,
    with_all_reduce: bool,
    gbits: float | None,
) -> Submission:
    """What runs there: the doctor, with the folders of the cluster."""
    from cluster.launch.order import runs_there
    from cluster.launch.target import Submission

    arguments = ["doctor", "--on-cluster", "--json", "--runs", runs_there(target.place)]
    if not config.data.root.is_absolute() and config.data.dir is None:
        arguments += ["--set", f"data.root={target.storage}/data"]
    if not with_all_reduce:
        arguments.append("--no-all-reduce")
    if gbits is not None:
        arguments += ["--link-gbits", f"{gbits:g}"]
    workers = target.workers()
    if workers is not None:  # "2", or "1:4", whose least must be there
        arguments += ["--expect", workers.partition(":")[0]]
    return Submission(RUN, "doctor", tuple(arguments), config_text)


def preflight(target: Target, job: Submission) -> Iterator[tuple[str, Check]]:
    """What the cluster lets this user do; ``title, check`` each."""
    try:
        for check in target.preflight(job):
            yield _OUTSIDE, check
    except UserError as error:
        yield _OUTSIDE, _refused(error)


def job_checks(
    target: Target, job: Submission, *, say: Callable[[str], None]
) -> Iterator[tuple[str, Check]]:
    """Submit the job and pass on what it finds, ``title, check`` each; ``say`` why it waits."""
    from cluster.launch.target import Ended, LogLine, Waiting

    told = False
    last: list[str] = []
    try:
        submitted = target.submit(job)
        say(f"looking at it from inside: {submitted.id} on {target.describe()}")
        ended = False
        try:
            for update in target.follow(submitted):
                match update:
                    case Waiting(reason):
                        say(f"waiting: {reason}")
                    case LogLine(text):
                        found = parse(text)
                        if found is not None:
                            told = True
                            title, check = found
                            yield _TITLES.get(title, title), check
                        elif text.strip():
                            last = [*last, text.strip()][-_LAST_LINES:]
                    case Ended(over):
                        ended = True
                        if over.phase != "succeeded" or not told:
                            why = over.message or " / ".join(last) or "it told nothing"
                            mend = f"its log says more: {over.id}"
                            found_ = f"the doctor's job {over.phase}: {why}"
                            yield "Cluster", Check("job", "failure", found_, mend)
        finally:
            if not ended:
                target.cancel(submitted)
    except UserError as error:
        yield "Cluster", _refused(error)


def _refused(error: UserError) -> Check:
    found, _, mend = str(error).rpartition(": ")
    return Check("cluster", "failure", found or mend, mend if found else None)


def to_line(title: str, check: Check) -> str:
    """One finding as the line that ``parse`` reads."""
    return json.dumps({"section": title, **asdict(check)})


def parse(line: str) -> tuple[str, Check] | None:
    """A line of ``to_line``; None for any other."""
    if not line.startswith('{"section":'):
        return None
    try:
        values = json.loads(line)
        return str(values.pop("section")), Check(**values)
    except (ValueError, TypeError, KeyError):
        return None


def may_go_on(found: list[tuple[str, Check]]) -> bool:
    """Whether a job makes sense after the preflight."""
    return not failures(check for _, check in found)


def is_target(address: str) -> bool:
    """Whether RAY_ADDRESS names a cluster that only takes jobs: by its dashboard's URL."""
    return address.startswith(("http://", "https://"))
