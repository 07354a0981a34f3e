"""Jobs on a Ray cluster that already runs, through its Jobs API.

A job's command runs on the head and takes no CPU; the ranks that it starts run where there is room.
This installation's code travels with the job, so that what runs is what was launched; the machines
need its dependencies.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.checks import Check
from cluster.hints import DEFAULT_RUNS, runs_flag
from cluster.launch.job_log import JobLog
from cluster.launch.jobs_api import JobsApi, NoAnswerError, without_password
from cluster.launch.ray_address import jobs_url
from cluster.launch.ray_checks import check_python, check_ray, check_room, gpus_of_one
from cluster.launch.ray_details import (
    KIND,
    RUN,
    STORAGE,
    USER,
    job_of,
    metadata,
    newest,
    phase_of,
    why,
)
from cluster.launch.target import (
    OVER,
    Ended,
    Job,
    Kind,
    LogLine,
    Place,
    RemoteCommandError,
    Submission,
    Update,
    Waiting,
)
from cluster.launch.upload import CONFIG_FILE, Upload, pack
from data_shards.errors import RunFailedError, UserError

_POLL_S = 1.0
_QUICK_POLL_S = 0.25
# How long whoever follows a job bears that nobody answers: without a word, and at all.
_SILENCE_S = 10.0
_PATIENCE_S = 300.0
_LOG_ATTEMPTS = 3
# What ``run`` runs is no job of a run's, and not worth a line in the cluster's list for long.
_COMMAND_KIND = "command"
_KEEP_COMMANDS_S = 600.0
# A job that is ended has three seconds for it, and Ray looks every second.
_END_S = 15.0


class RayJobsTarget:
    """A Ray cluster behind its Jobs API; see ``cluster.launch.target.Target``."""

    def __init__(self, place: Place, *, runs: Path = DEFAULT_RUNS) -> None:
        """At a place whose address may be any that RAY_ADDRESS can hold; asks nothing yet.

        Args:
            place: where.
            runs: the folder of runs here, for what a message tells to type.

        Raises:
            UserError: the place's storage is no absolute path.
        """
        assert place.address is not None
        if not place.storage.startswith("/"):
            raise UserError(
                f"storage {place.storage}: give the folder's absolute path on the machines"
            )
        self.place, self._runs = place, runs
        self._api_: JobsApi | None = None
        self._interpreter: str | None = None

    @property
    def _api(self) -> JobsApi:
        if self._api_ is None:
            assert self.place.address is not None
            self._api_ = JobsApi(jobs_url(self.place.address))
            self.place = replace(self.place, address=self._api_.url)
        return self._api_

    @property
    def storage(self) -> str:
        """The folder that all machines of the cluster share."""
        return self.place.storage

    def describe(self) -> str:
        """Where that is, in half a sentence."""
        assert self.place.address is not None
        return f"the Ray cluster at {without_password(self.place.address)}"

    def workers(self) -> str | None:
        """Machines times GPUs of each; the cluster is asked how many those are if nobody says.

        Raises:
            UserError: GPUs of no number of machines, or of machines that differ.
        """
        if self.place.nodes is None:
            if self.place.gpus is not None:
                raise UserError(
                    f"--gpus {self.place.gpus}: on how many machines? Give --nodes, too; without "
                    "both, every GPU of the cluster gets a worker"
                )
            return None
        ranks_of_one = self.place.gpus or gpus_of_one(self._api.nodes()) or 1
        return ":".join(str(int(nodes) * ranks_of_one) for nodes in self.place.nodes.split(":"))

    def preflight(self, submission: Submission) -> Iterator[Check]:
        """The API, the versions there, and room for the workers."""
        try:
            version = self._api.version()
        except UserError as error:
            yield Check("Ray's Jobs API", "failure", "cannot be used", str(error))
            return
        yield Check("Ray's Jobs API", "ok", f"answers at {self._api.shown}")
        yield check_ray(version)
        yield check_python(self._api.python_version())
        yield check_room(self._api.nodes(), submission.arguments)

    def render(self, submission: Submission) -> str:
        """The request and the files that go with it, as YAML."""
        upload, request = self._prepare(
            submission, f"babelray-{submission.kind}-{submission.run}-TIME"
        )
        described = {
            "address": self._api.shown,
            "request": request,
            "upload": {
                "files": len(upload.files),
                "bytes": len(upload.content),
                "content": dict(upload.files),
            },
        }
        text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=1000)
        if submission.config is None:
            return text
        return f"{text}---\n# {CONFIG_FILE}\n{submission.config.strip()}\n"

    def find(self, run: str, kind: Kind = "train") -> Job | None:
        """The newest job of that kind of the run with its files in this storage."""
        found = newest(
            job
            for job in self._api.jobs()
            if (metadata(job).get(RUN), metadata(job).get(KIND)) == (run, kind)
            and metadata(job).get(STORAGE) == self.storage
        )
        return job_of(found) if found else None

    def submit(self, submission: Submission) -> Job:
        """Upload what is not there yet and hand the job over."""
        before = self.find(submission.run, submission.kind)
        if before is not None and not before.is_over:
            raise UserError(self._not_over(before))
        upload, request = self._prepare(submission, _new_id(submission.run, submission.kind))
        self._api.upload(upload.uri, upload.content)
        self._api.submit(request)
        return Job(submission.run, submission.kind, request["submission_id"], "starting")

    def follow(self, job: Job) -> Iterator[Update]:
        """The job's updates; a connection that is cut is made anew."""
        log = JobLog(job.id)
        told: str | None = None
        silence = _Silence()
        failed_reads = 0
        while True:
            waiting: str | None = None
            try:
                now = self._state(job)
                silence.end()
                waiting = now.message if now.phase == "starting" else None
                if now.phase != "starting" and failed_reads < _LOG_ATTEMPTS:
                    for piece in self._api.tail(job.id):
                        for line in log.read(piece):
                            failed_reads, told = 0, None
                            yield LogLine(line)
                    now = self._state(job)
                if now.is_over:
                    yield from map(LogLine, log.rest())
                    yield Ended(now)
                    return
                failed_reads = 0
            except NoAnswerError as error:
                failed_reads += 1
                silent_s = silence.go_on()
                if silent_s > _PATIENCE_S:
                    raise RunFailedError(
                        f"{error}\n  the job {job.id} may go on all the same; {self._look(job)}"
                    ) from None
                if silent_s > _SILENCE_S:
                    waiting = "the cluster does not answer; trying again"
            log.cut()
            if waiting and waiting != told:
                told = waiting
                yield Waiting(waiting)
            time.sleep(_POLL_S)

    def run(self, run: str, arguments: Sequence[str]) -> Iterator[str]:
        """Run the command on the head, as a job of its own."""
        upload = pack()
        request = self._request(run, _COMMAND_KIND, arguments, upload, _new_id(run, _COMMAND_KIND))
        self._api.upload(upload.uri, upload.content)
        self._api.submit(request)
        name = request["submission_id"]
        log = JobLog(name)
        silence = _Silence()
        is_to_end = True  # if nobody listens any more
        try:
            while True:
                began = time.monotonic()
                try:
                    details = self._api.job(name)
                    is_over = details is None or phase_of(details) in OVER
                    text = self._api.logs(name)
                except NoAnswerError:
                    if silence.go_on() > _PATIENCE_S:
                        is_to_end = False  # it may be about to save what the run has learnt
                        raise
                    time.sleep(_POLL_S)
                    continue
                silence.end()
                is_to_end = not is_over
                yield from log.read_all(text)
                if is_over:
                    yield from log.rest()
                    break
                # A long log is read as a whole each time: then less often.
                time.sleep(max(_QUICK_POLL_S, 10 * (time.monotonic() - began)))
        finally:
            self._leave(name, is_to_end=is_to_end)
        if details is None:
            raise UserError(f"{self.describe()} has forgotten the command's job: try again")
        if details["status"] != "SUCCEEDED":
            if not log.has_begun:
                raise UserError(
                    f"{self.describe()} could not run a command: {why(details) or 'no reason'}"
                )
            status = details.get("driver_exit_code") or 1
            raise RemoteCommandError(status if status > 0 else 128 - status)

    def cancel(self, job: Job) -> None:
        """End the job's processes: SIGTERM, and three seconds later SIGKILL; waits for that."""
        self._api.stop(job.id)
        deadline = time.monotonic() + _END_S
        with suppress(NoAnswerError):
            while not self._state(job).is_over and time.monotonic() < deadline:
                time.sleep(_QUICK_POLL_S)

    @contextmanager
    def dashboard(self, run: str) -> Iterator[str]:
        """The dashboard's URL, which is the Jobs API's."""
        self._api.version()
        yield self._api.shown

    def _not_over(self, job: Job) -> str:
        where = runs_flag(self._runs)
        end = f"ray job stop --address {self._api.shown} {job.id}"
        match job.kind:
            case "train":
                found = f"the run {job.run} is not over"
                mend = f"{self._look(job)}, or stop it: babelray stop {job.run}{where}"
            case "evaluate":
                found = f"an evaluation of {job.run} is not over"
                mend = f"wait for its end, or end it: {end}"
            case _:
                found = "a doctor is at work"
                mend = f"wait for its end, or end it: {end}"
        return f"{found} on {self.describe()} (its job {job.id} is {job.phase}): {mend}"

    def _look(self, job: Job) -> str:
        if job.kind == "train":
            return f"watch it: babelray logs {job.run} --follow{runs_flag(self._runs)}"
        return f"its log: ray job logs --address {self._api.shown} {job.id}"

    def _leave(self, name: str, *, is_to_end: bool) -> None:
        with suppress(UserError):
            if is_to_end:
                self._api.stop(name)
            # One that ended only now would come back: Ray still looks after it for a moment.
            before = 1000 * (time.time() - _KEEP_COMMANDS_S)
            for job in self._api.jobs():
                if metadata(job).get(KIND) == _COMMAND_KIND and (
                    0 < (job.get("end_time") or 0) < before
                ):
                    self._api.delete(job["submission_id"])

    def _state(self, job: Job) -> Job:
        details = self._api.job(job.id)
        if details is None:
            return replace(
                job,
                phase="failed",
                message="the cluster does not know of the job any more: its head has begun anew; "
                "launch the run again to go on from its last checkpoint",
            )
        return job_of(details)

    def _prepare(self, submission: Submission, id: str) -> tuple[Upload, dict[str, Any]]:
        arguments = submission.arguments
        if submission.config is not None:
            arguments += ("--config", CONFIG_FILE)
        upload = pack(submission.config)
        return upload, self._request(submission.run, submission.kind, arguments, upload, id)

    def _request(
        self, run: str, kind: str, arguments: Sequence[str], upload: Upload, id: str
    ) -> dict[str, Any]:
        if self._interpreter is None:
            self._interpreter = self._api.interpreter() or "python"
        return {
            "submission_id": id,
            "entrypoint": shlex.join([self._interpreter, "-m", "cluster.cli", *arguments]),
            # Ray then puts it on the head.
            "entrypoint_num_cpus": 0,
            "runtime_env": {"working_dir": upload.uri},
            "metadata": {RUN: run, KIND: kind, STORAGE: self.storage, USER: _user()},
        }


class _Silence:
    """How long nobody has answered."""

    def __init__(self) -> None:
        self._since: float | None = None

    def go_on(self) -> float:
        """No answer again; the seconds since the first that did not come."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since

    def end(self) -> None:
        """An answer."""
        self._since = None


def _new_id(run: str, kind: str) -> str:
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    return f"babelray-{kind}-{run}-{stamp}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
