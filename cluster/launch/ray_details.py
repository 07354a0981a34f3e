"""Ray's JobDetails, as its Jobs API tells of a job, in our own words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from cluster.launch.follow import read_entry
from cluster.launch.target import Job, Phase

_PHASES: dict[str, Phase] = {
    "PENDING": "starting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}

# As a command ends that does not log as JSON.
_ERROR = "babelray: error: "

# What a job carries, for whoever lists the cluster's jobs.
RUN = "babelray-run"
KIND = "babelray-kind"
STORAGE = "babelray-storage"
USER = "babelray-user"


def phase_of(details: dict[str, Any]) -> Phase:
    """How far the job is."""
    return _PHASES.get(details["status"], "running")


def metadata(details: dict[str, Any]) -> dict[str, str]:
    """What was given with the job when it was submitted."""
    return details.get("metadata") or {}


def newest(jobs: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The job that began last; None if there is none."""
    return max(jobs, key=lambda job: job.get("start_time") or 0, default=None)


def job_of(details: dict[str, Any]) -> Job:
    """A job that was submitted from here, or somewhere else."""
    given = metadata(details)
    kind = given.get(KIND, "train")
    driver = details.get("driver_info") or {}
    facts = {
        "submitted by": given.get(USER),
        "submitted at": _time(details.get("start_time")),
        "machine": driver.get("node_ip_address"),
        "exit status": str(code) if (code := details.get("driver_exit_code")) else None,
    }
    return Job(
        run=given.get(RUN, ""),
        kind=kind if kind in {"train", "evaluate", "doctor"} else "train",  # type: ignore[arg-type]
        id=str(details["submission_id"]),
        phase=phase_of(details),
        message=why(details),
        facts=tuple((name, value) for name, value in facts.items() if value),
    )


def why(details: dict[str, Any]) -> str | None:
    """Why it is so, in one line; Ray's own words for "it runs" and "it is over" say nothing."""
    status, text = details["status"], (details.get("message") or "").strip()
    if status == "PENDING":
        return "Ray prepares the job on the cluster's head"
    if status != "FAILED" or not text:
        return None
    for line in reversed(text.splitlines()):
        if line.startswith(_ERROR):
            return line.removeprefix(_ERROR)
        entry = read_entry(line)
        if entry is not None and entry[2] == "error":
            return entry[1].partition("\n")[0]
    first = text.partition("\n")[0]
    return first.partition(", last available logs")[0][:500]


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))
