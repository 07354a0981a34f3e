"""What a RayJob's submitter pod runs: ``python -m cluster.launch.submitter ENTRYPOINT``.

Hands the entrypoint in under the id that KubeRay gave the job (RAY_JOB_SUBMISSION_ID), repeats its
log, and ends when the job is over. KubeRay's own command waits for ever on a log stream whose other
end is gone, and takes the end of a stream for the end of the job. Here the job's status alone
counts: it is asked for every few seconds, and a head that knows of no such job (it is new, or the
one before it was lost) is given it. The id is unique in a cluster, so that two submitters never
start two jobs.

Exit status: 0 when the job is over, however it ended (KubeRay asks Ray for that itself); 143 on
SIGTERM; 1 if the head has refused us for long, so that a new pod with new variables tries.
"""

from __future__ import annotations

import io
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from cluster.console import open_console
from cluster.launch.job_log import JobLog
from cluster.launch.jobs_api import JobsApi, NoAnswerError
from data_shards.errors import UserError

ADDRESS_VARIABLE = "RAY_DASHBOARD_ADDRESS"  # HOST:PORT, with or without http://
JOB_VARIABLE = "RAY_JOB_SUBMISSION_ID"

_OVER = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_LOG_ATTEMPTS = 3  # once the job is over


@dataclass(frozen=True)
class Pace:
    """How often and for how long, in seconds.

    Attributes:
        poll: from one question for the job's status to the next.
        answer: at most, for each.
        quiet: without an answer that nobody is told of.
        refused: of nothing but refusals, until another pod shall try.
        silent: without a further piece of the log, once the job is over.
        last_lines: for all of the log after the end; KubeRay waits for 300 at most.
    """

    poll: float = 3.0
    answer: float = 15.0
    quiet: float = 20.0
    refused: float = 600.0
    silent: float = 30.0
    last_lines: float = 180.0


class Submitter:
    """One job, from its submission to its last line.

    Args:
        api: of the head.
        job: the submission's id.
        entrypoint: the command line, for a shell on the head.
        tell: takes every line of the job's log, once.
        remark: takes what there is to say of our own.
    """

    def __init__(
        self,
        api: JobsApi,
        job: str,
        entrypoint: str,
        *,
        tell: Callable[[str], None],
        remark: Callable[[str], None],
        pace: Pace | None = None,
    ) -> None:
        self._api, self._job, self._entrypoint = api, job, entrypoint
        self._tell, self._remark, self._pace = tell, remark, pace or Pace()
        self._tail: _Tail | None = None
        self._log = JobLog(job)
        self._taken_at: object = None  # by Ray's clock; of another job of this id it is another
        self._well_at = time.monotonic()
        self._refused_since: float | None = None
        self._is_told = False

    def run(self) -> None:
        """Comes back when the job is over and its log was told.

        Raises:
            UserError: the head answers, but has refused us for long.
        """
        while True:
            details = self._ask()
            if details is not None and details["status"] in _OVER:
                break
            if details is not None and details["status"] != "PENDING":
                self._connect()
            self._listen()
        is_whole = self._listen_to_the_end()
        for line in self._log.rest():
            self._tell(line)
        if not self._log.has_begun:
            reason = str(details.get("message") or "no reason given").strip()
            self._remark(f"the job's command did not begin: {reason}")
        elif not is_whole:
            self._remark("the rest of the job's log could not be read")

    def _ask(self) -> dict[str, Any] | None:
        """The job as the head has it; None if it has none, or does not say."""
        try:
            details = self._api.job(self._job, timeout_s=self._pace.answer)
            if details is not None and "status" not in details:
                raise NoAnswerError(f"{self._api.shown} tells no status of the job")
        except NoAnswerError as error:  # an outage, however long it is
            self._refused_since = None
            self._worry(error)
            return None
        except UserError as error:
            self._refuse(error)
            return None
        if details is None:
            self._submit()
            return None
        self._is_well()
        if details.get("start_time") != self._taken_at:
            self._begin_log()
            self._taken_at = details.get("start_time")
        return details

    def _submit(self) -> None:
        if self._taken_at is not None:
            self._taken_at, self._is_told = None, False
            self._begin_log()
            self._remark("Ray's head has begun anew: the job is handed in again")
        # Without CPUs of its own Ray puts it on the head.
        request = {"submission_id": self._job, "entrypoint": self._entrypoint}
        try:
            self._api.submit({**request, "entrypoint_num_cpus": 0})
        except UserError as error:  # also if another submitter was faster: the next answer tells
            self._refuse(error)
        else:
            self._is_well()

    def _is_well(self) -> None:
        if self._is_told:
            self._remark("Ray's head answers again")
        self._is_told = False
        self._well_at, self._refused_since = time.monotonic(), None

    def _refuse(self, error: UserError) -> None:
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > self._pace.refused:
            raise error
        self._worry(error)

    def _worry(self, error: UserError) -> None:
        if not self._is_told and time.monotonic() - self._well_at > self._pace.quiet:
            self._is_told = True
            # The mend is for somebody at a terminal.
            self._remark(f"{str(error).partition(': RAY_ADDRESS must')[0]}; trying on")

    def _begin_log(self) -> None:
        for line in self._log.rest():
            self._tell(line)
        self._tail, self._log = None, JobLog(self._job)

    def _connect(self) -> _Tail:
        if self._tail is None:
            self._log.cut()
            self._tail = _Tail(self._api, self._job)
        return self._tail

    def _listen(self) -> None:
        """Tell lines for as long as a poll takes; a log that ends is read on after the next."""
        deadline = time.monotonic() + self._pace.poll
        while (left := deadline - time.monotonic()) > 0:
            if self._tail is None:
                time.sleep(left)
                return
            try:
                piece = self._tail.next(left)
            except TimeoutError:
                return
            self._hear(piece)

    def _hear(self, piece: str | None) -> None:
        if piece is None:
            self._tail = None
            return
        for line in self._log.read(piece):
            self._tell(line)

    def _listen_to_the_end(self) -> bool:
        """Tell what is left of the log of a job that is over; says whether that was all."""
        deadline = time.monotonic() + self._pace.last_lines
        failures = 0
        while failures < _LOG_ATTEMPTS and time.monotonic() < deadline:
            tail = self._connect()
            try:
                piece = tail.next(self._pace.silent)
            except TimeoutError:
                return False
            self._hear(piece)
            if piece is None:
                if tail.is_whole:
                    return True
                failures += 1
                time.sleep(min(1.0, self._pace.poll))
        return False


class _Tail:
    """One connection to a job's log, read in a thread, which is left to itself when not needed.

    Attributes:
        is_whole: it has ended, and was not cut.
    """

    def __init__(self, api: JobsApi, job: str) -> None:
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.is_whole = False
        threading.Thread(target=self._read, args=(api, job), daemon=True).start()

    def _read(self, api: JobsApi, job: str) -> None:
        try:
            for piece in api.tail(job):
                self._pieces.put(piece)
            self.is_whole = True
        except UserError:
            pass  # the job's status is asked for in any case
        finally:
            self._pieces.put(None)

    def next(self, timeout_s: float) -> str | None:
        """The next piece, None at the end.

        Raises:
            TimeoutError: none came.
        """
        try:
            return self._pieces.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None


def main(arguments: Sequence[str], environment: Mapping[str, str], out: TextIO) -> int:
    """Run the entrypoint that the arguments are; returns the exit status."""
    entrypoint = " ".join(arguments)
    is_json = "--log-format json" in entrypoint
    console = open_console("json" if is_json else "text", out)
    address, job = environment.get(ADDRESS_VARIABLE), environment.get(JOB_VARIABLE)
    if not (address and job and entrypoint):
        needed = f"{ADDRESS_VARIABLE} and {JOB_VARIABLE}, which KubeRay sets, and an entrypoint"
        console.say(f"a submitter needs {needed}", "error")
        return UserError.exit_status

    def tell(line: str) -> None:
        out.write(line + "\n")
        out.flush()

    def remark(text: str) -> None:
        console.say(f"submitter: {text}", "warning")

    url = address if "://" in address else f"http://{address}"
    try:
        Submitter(JobsApi(url), job, entrypoint, tell=tell, remark=remark).run()
    except UserError as error:
        console.say(f"submitter: {error}", "error")
        return 1
    return 0


def _end(number: int, frame: object) -> None:
    # Not 0, which would mean that the job is over.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    # The first process of a container ignores what it has no handler for.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(main(sys.argv[1:], os.environ, sys.stdout))
