"""What a place that takes jobs offers, be it Kubernetes or a Ray cluster that already runs.

The commands know only this. A job runs ``babelray`` with arguments on the cluster; the files of its
run lie there, under ``Target.storage``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.checks import Check

Kind = Literal["train", "evaluate", "doctor"]

# queued: somebody else decides when it may start. starting: machines or processes come up.
Phase = Literal["queued", "starting", "running", "succeeded", "failed", "stopped"]
OVER: frozenset[Phase] = frozenset({"succeeded", "failed", "stopped"})


@dataclass(frozen=True)
class Submission:
    """What is to run.

    Attributes:
        run: the run's name.
        kind: what for; at any time there is one job of a kind for a run.
        arguments: of ``babelray``, complete but for ``--config``, which the target adds if there is
            a configuration.
        config: the YAML text of the run's configuration; None for a kind that needs none.
    """

    run: str
    kind: Kind
    arguments: tuple[str, ...]
    config: str | None = None


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it now.

    Attributes:
        run, kind: as submitted.
        id: the RayJob's name, or the submission's id.
        phase: how far it is.
        message: why, in one line; None where there is nothing to say.
        attempt, attempts: which try it is, of how many.
        facts: further (name, value) pairs for a person, such as ("pods", "3 of 3 ready").
    """

    run: str
    kind: Kind
    id: str
    phase: Phase
    message: str | None = None
    attempt: int = 1
    attempts: int = 1
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.phase in OVER


@dataclass(frozen=True)
class Waiting:
    """The job does not run yet (or not now); said again only when ``reason`` changes."""

    reason: str


@dataclass(frozen=True)
class LogLine:
    """A line that the job wrote on standard output or standard error."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The job is over."""

    job: Job


Update = Waiting | LogLine | Ended


class RemoteCommandError(Exception):
    """A command on the cluster ended with an error; its own lines have said which."""

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Place:
    """Where a job was launched and how: enough to find the target again, and to launch it anew.

    ``kind`` "ray" uses ``address`` (of the Jobs API); "kubernetes" the fields below it.
    """

    kind: Literal["kubernetes", "ray"]
    storage: str
    address: str | None = None
    context: str | None = None
    namespace: str | None = None
    overlay: str | None = None
    components: tuple[str, ...] = ()
    nodes: str | None = None
    gpus: int | None = None
    image: str | None = None


class Target(Protocol):
    """A place that takes jobs. Errors that a user can mend are ``UserError``."""

    place: Place

    @property
    def storage(self) -> str:
        """The folder that all machines of the cluster share; ``runs/`` and ``data/`` lie in it."""

    def describe(self) -> str:
        """Where that is, for a person: in half a sentence."""

    def workers(self) -> str | None:
        """What ``--workers`` should say there ("16", "8:16"); None leaves it to the command."""

    def preflight(self, submission: Submission) -> Iterator[Check]:
        """What would keep the job from running, looked at before anything is changed."""

    def render(self, submission: Submission) -> str:
        """What ``submit`` would hand over, as text; changes nothing."""

    def find(self, run: str, kind: Kind = "train") -> Job | None:
        """The newest job of that kind of the run; None if the cluster knows of none.

        Raises:
            UserError: the cluster cannot be reached, or does not let this user look.
        """

    def submit(self, submission: Submission) -> Job:
        """Hand the job over; one of the same run and kind that is over makes room for it.

        Raises:
            UserError: it was refused, or one of that run and kind is not over yet.
        """

    def follow(self, job: Job) -> Iterator[Update]:
        """What happens from now on, every line from the job's beginning, until it is over.

        Lasts through retries. Whoever stops listening leaves the job as it is.
        """

    def run(self, run: str, arguments: Sequence[str]) -> Iterator[str]:
        """Run ``babelray`` with ``arguments`` where the run's files are; the lines it prints.

        Raises:
            UserError: there is no machine to run it on now; the message says what to do.
            RemoteCommandError: it failed; after its last line.
        """

    def cancel(self, job: Job) -> None:
        """End the job at once; what it saved stays."""

    def dashboard(self, run: str) -> AbstractContextManager[str]:
        """The URL of the Ray dashboard, which holds as long as the block lasts.

        Raises:
            UserError: there is none now.
        """
