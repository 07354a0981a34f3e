"""A place that takes jobs, for tests of the commands: all that happens is told beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.checks import Check
from cluster.launch.target import (
    Ended,
    Job,
    Kind,
    Place,
    RemoteCommandError,
    Submission,
    Update,
)


class FakeTarget:
    """Remembers what was asked of it.

    ``jobs`` is what ``find`` tells, by kind; ``updates`` what ``follow`` yields (an exception among
    them is raised); ``lines`` and ``exit_status`` what a command prints there, and how it ends. A
    job that is ended is found ``looks_to_end`` - 1 times more.
    """

    def __init__(self, place: Place, *, workers: str | None = None) -> None:
        self.place, self.workers_value = place, workers
        self.checks: list[Check] = []
        self.jobs: dict[Kind, Job] = {}
        self.updates: list[Update | BaseException] = []
        self.lines: list[str] = []
        self.exit_status = 0
        self.submitted: list[Submission] = []
        self.cancelled: list[Job] = []
        self.commands: list[tuple[str, ...]] = []
        self.ending: dict[Kind, int] = {}
        self.looks_to_end = 2

    @property
    def storage(self) -> str:
        return self.place.storage

    def describe(self) -> str:
        return "a cluster"

    def workers(self) -> str | None:
        return self.workers_value

    def preflight(self, submission: Submission) -> Iterator[Check]:
        yield from self.checks

    def render(self, submission: Submission) -> str:
        return f"rendered: {' '.join(submission.arguments)}\n"

    def find(self, run: str, kind: Kind = "train") -> Job | None:
        if kind in self.ending:
            self.ending[kind] -= 1
            if self.ending[kind] <= 0:
                return None
        return self.jobs.get(kind)

    def submit(self, submission: Submission) -> Job:
        self.submitted.append(submission)
        return Job(submission.run, submission.kind, f"{submission.kind}-1", "starting")

    def follow(self, job: Job) -> Iterator[Update]:
        for update in self.updates:
            if isinstance(update, BaseException):
                raise update
            yield update

    def run(self, run: str, arguments: Sequence[str]) -> Iterator[str]:
        self.commands.append(tuple(arguments))
        yield from self.lines
        if self.exit_status:
            raise RemoteCommandError(self.exit_status)
        if arguments[0] == "stop":
            self.ending["train"] = self.looks_to_end

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)
        self.ending[job.kind] = self.looks_to_end

    @contextmanager
    def dashboard(self, run: str) -> Iterator[str]:
        yield "http://127.0.0.1:8265"


def ended(phase: str, message: str | None = None, kind: Kind = "train") -> Ended:
    return Ended(Job("one", kind, f"{kind}-1", phase, message))  # type: ignore[arg-type]
