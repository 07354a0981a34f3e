"""What went wrong in a run, in one line that a person can act on."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.naming import logs_dir
from data_shards.errors import UserError
from trainer.storage import StorageError
from trainer.watchdog import EXIT_HUNG

logger = logging.getLogger(__name__)


def failures_path(run_dir: Path) -> Path:
    """One JSON object a line for each failure of the workers and what was done about it."""
    return logs_dir(run_dir) / "failures.jsonl"


def note(run_dir: Path, event: str, **fields: Any) -> None:
    """Append an event to ``failures_path``; a disk that is full must not end the run."""
    line = json.dumps({"event": event, **fields, "time": round(time.time(), 3)})
    logger.info("%s", line)
    try:
        with failures_path(run_dir).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except OSError as error:
        logger.error("not noted in %s: %s", failures_path(run_dir), error)


class RankDiedError(Exception):
    """A rank's process ended without a word: killed, out of memory, or by its watchdog."""

    def __init__(self, rank: int, pid: int, exit_code: int) -> None:
        super().__init__(rank, pid, exit_code)
        self.rank, self.pid, self.exit_code = rank, pid, exit_code

    def __str__(self) -> str:
        return f"the process {self.pid} of rank {self.rank} ended ({_how(self.exit_code)})"


class StopRequested(Exception):  # noqa: N818 - not an error: the run is to end
    """The run is to stop, and no group is running that could: its last checkpoint is the end."""


def is_stop(error: BaseException) -> bool:
    """Whether a ``fit()`` that failed did so because the run was asked to stop."""
    return any(isinstance(cause, StopRequested) for cause in _unwrap(error))


def _how(exit_code: int) -> str:
    if exit_code == EXIT_HUNG:
        return "it hung; its stack is in its log"
    if exit_code >= 0:
        return f"exit status {exit_code}"
    try:
        return f"by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"by signal {-exit_code}"


# What gloo, NCCL and torch's store say.
_BROKEN = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|remote process exited"
    r"|remote peer|communicator was aborted|no route to host",
    re.IGNORECASE,
)

# Errors of the input, the configuration or the code: after a restart they come again at the same
# place.
_HOPELESS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def hopeless(errors: Iterable[BaseException]) -> BaseException | None:
    """The error that a restart of the workers would meet again, if there is one."""
    errors = list(errors)
    for error in errors:
        # A disk or a storage that fails may be well again by the next attempt.
        if isinstance(error, UserError) and not isinstance(error, StorageError):
            return error
    if any(_is_dead(error) for error in errors):
        return None  # whatever the others met followed from it
    return next((error for error in errors if isinstance(error, _HOPELESS)), None)


def summarize(failures: Mapping[int, BaseException]) -> str:
    """One line for the failed ranks; what the user can mend comes before what followed from it."""
    for rank, error in sorted(failures.items()):
        if isinstance(error, UserError):
            return f"rank {rank}: {error}"
    dead = sorted(rank for rank, error in failures.items() if _is_dead(error))
    if dead:
        ranks = ", ".join(str(rank) for rank in dead)
        process = "process" if len(dead) == 1 else "processes"
        return (
            f"the {process} of rank {ranks} ended unexpectedly "
            "(killed, out of memory, or its machine was lost)"
        )
    own = {rank: error for rank, error in failures.items() if not is_broken_connection(error)}
    if not own:
        ranks = ", ".join(str(rank) for rank in sorted(failures))
        return f"rank {ranks} lost its connection to another rank (killed, or its machine was lost)"
    rank, error = min(own.items())
    return f"rank {rank}: {_one_line(error)}"


def explain(error: BaseException) -> str:
    """What a failed ``fit()`` has to say: the workers' own error, without Ray's wrapping."""
    causes = list(_unwrap(error))
    for cause in causes:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in causes:
        failures = getattr(cause, "worker_failures", None)
        if failures:
            return summarize(failures)
    return _one_line(causes[-1])


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it wraps, outermost first."""
    yield error
    for failure in getattr(error, "worker_failures", {}).values():
        yield from _unwrap(failure)
    for name in ("controller_failure", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            yield from _unwrap(inner)


def is_broken_connection(error: BaseException) -> bool:
    """Whether a rank failed only because another was gone.

    That other's own end may be noticed later. (Errors of storage are no ``RuntimeError``s.)
    """
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _is_dead(error: BaseException) -> bool:
    """Whether a worker's process is gone, as Ray Train reports it."""
    return type(getattr(error, "health_check_failure", error)).__name__ in {
        "ActorDiedError",
        "ActorUnavailableError",
        "NodeDiedError",
        "OutOfMemoryError",
        "RankDiedError",
        "RayActorError",
        "WorkerCrashedError",
    }


def _one_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    name = type(error).__name__
    return f"{name}: {lines[-1].strip()}" if lines else name
