"""The doctor sent to the cluster as a job: what it finds there comes back as lines of its log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.checks import Check, failures
from data_shards.errors import UserError

if TYPE_CHECKING:
    from cluster.launch.target import Job, Submission, Target
    from trainer.config import RunConfig

RUN = "doctor"

# As it is seen from here.
_OUTSIDE = "The cluster from outside"
_TITLES = {"This machine": "The cluster's head"}

# Of a job that told nothing, as much of its log is shown.
_LAST_LINES = 5

# A cancelled job is waited for so long: what it made for trial goes, and the next may begin.
_END_S = 20.0
_POLL_S = 0.25


def submission(
    target: Target,
    config: RunConfig,
    config_text: str,
    *,
    with_all_reduce: bool,
    gbits: float | None,
) -> Submission:
    """What runs there: the doctor, with the folders of the cluster."""
    from cluster.doctor import machine
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
    if target.place.kind == "ray":  # the code comes with the job; an image has its packages
        for text in machine.requirements() or ():
            arguments += ["--requires", text]
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
        before = target.find(job.run, job.kind)
        if before is not None and not before.is_over:
            yield "Cluster", _goes_on(target, before)
            return
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
                say(f"ending {submitted.id}")
                _end(target, submitted)
    except UserError as error:
        yield "Cluster", _refused(error)


def _end(target: Target, job: Job) -> None:
    """Cancel a job and wait until it is over; whoever is in a hurry interrupts again."""
    target.cancel(job)
    deadline = time.monotonic() + _END_S
    with suppress(UserError):  # it was asked to end, and will
        while time.monotonic() < deadline:
            now = target.find(job.run, job.kind)
            if now is None or now.id != job.id or now.is_over:
                return
            time.sleep(_POLL_S)


def _goes_on(target: Target, job: Job) -> Check:
    """Another doctor is at work there, or was left behind by one that was killed."""
    facts = dict(job.facts)
    by = f", submitted by {facts['submitted by']}" if "submitted by" in facts else ""
    at = f" at {facts['submitted at']}" if "submitted at" in facts else ""
    place = target.place
    if place.kind == "ray":
        from cluster.launch.jobs_api import without_password

        end = f"ray job stop --address {without_password(place.address or '')} {job.id}"
    else:
        where = [f"--context {place.context}"] if place.context else []
        where += [f"--namespace {place.namespace}"] if place.namespace else []
        end = " ".join(["kubectl", *where, "delete rayjob", job.id])
    found = f"a doctor is at work there already: its job {job.id} is {job.phase}{by}{at}"
    mend = f"try again when it is over, in a few minutes; if nobody waits for it, end it: {end}"
    return Check("job", "failure", found, mend)


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


def goes_as_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launch would go to Kubernetes, or to the dashboard of a Ray cluster.

    Else the cluster's own address is given, and this machine is one of its own.
    """
    from cluster.launch import ray_address

    address = ray_address.given(environment)
    if address is None or address != environment.get("RAY_ADDRESS"):
        return True  # RAY_API_SERVER_ADDRESS is nothing but a dashboard's
    if "://" in address:
        return address.startswith(("http://", "https://"))
    return ray_address.is_dashboard(address)
