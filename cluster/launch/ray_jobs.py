"""Jobs on a Ray cluster that already runs, through its Jobs API.

A job's command runs on the head and takes no CPU; the ranks that it starts run where there is room.
This installation's code travels with the job, so that what runs is what was launched; the machines
need its dependencies.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import yaml

from cluster.checks import Check
from cluster.launch.job_log import JobLog
from cluster.launch.jobs_api import JobsApi, NoAnswerError, without_password
from cluster.launch.ray_address import jobs_url
from cluster.launch.ray_checks import check_python, check_ray, check_room
from cluster.launch.target import (
    OVER,
    Ended,
    Job,
    Kind,
    LogLine,
    Phase,
    Place,
    RemoteCommandError,
    Submission,
    Update,
    Waiting,
)
from cluster.launch.upload import CONFIG_FILE, Upload, pack
from data_shards.errors import RunFailedError, UserError

_PHASES: dict[str, Phase] = {
    "PENDING": "starting",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
_POLL_S = 1.0
_QUICK_POLL_S = 0.25
# How long whoever follows a job bears that nobody answers: without a word, and at all.
_SILENCE_S = 10.0
_PATIENCE_S = 300.0
_LOG_ATTEMPTS = 3
# What ``run`` runs is no job of a run's, and not worth a line in the cluster's list for long.
_COMMAND_KIND = "command"
_KEEP_COMMANDS_S = 600.0


# What a job carries, for whoever lists the cluster's jobs.
_RUN = "babelray-run"
_KIND = "babelray-kind"
_STORAGE = "babelray-storage"
_USER = "babelray-user"


class RayJobsTarget:
    """A Ray cluster behind its Jobs API; see ``cluster.launch.target.Target``."""

    def __init__(self, place: Place) -> None:
        """At a place whose address may be any that RAY_ADDRESS can hold; asks nothing yet.

        Raises:
            UserError: the place's storage is no absolute path.
        """
        assert place.address is not None
        if not place.storage.startswith("/"):
            raise UserError(
                f"storage {place.storage}: give the folder's absolute path on the machines"
            )
        self.place = place
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
        """Machines times GPUs of each, if both were given."""
        if self.place.nodes is None:
            return None
        ranks_of_one = self.place.gpus or 1
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
        found = _newest(
            job
            for job in self._api.jobs()
            if (_metadata(job).get(_RUN), _metadata(job).get(_KIND)) == (run, kind)
            and _metadata(job).get(_STORAGE) == self.storage
        )
        return _job(found) if found else None

    def submit(self, submission: Submission) -> Job:
        """Upload what is not there yet and hand the job over."""
        before = self.find(submission.run, submission.kind)
        if before is not None and not before.is_over:
            raise UserError(
                f"the run {submission.run} is not over on {self.describe()}: its {before.kind} job "
                f"{before.id} is {before.phase}; watch it (babelray logs {before.run} --follow) or "
                f"stop it (babelray stop {before.run})"
            )
        upload, request = self._prepare(submission, _new_id(submission.run, submission.kind))
        self._api.upload(upload.uri, upload.content)
        self._api.submit(request)
        return Job(submission.run, submission.kind, request["submission_id"], "starting")

    def follow(self, job: Job) -> Iterator[Update]:
        """The job's updates; a connection that is cut is made anew."""
        log = JobLog(job.id)
        told: str | None = None
        silent_since: float | None = None
        failed_reads = 0
        while True:
            waiting: str | None = None
            try:
                now = self._state(job)
                silent_since = None
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
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _PATIENCE_S:
                    raise RunFailedError(
                        f"{error}\n  the job {job.id} may go on all the same; look again with "
                        f"babelray logs {job.run} --follow"
                    ) from None
                if time.monotonic() - silent_since > _SILENCE_S:
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
        is_over = False
        try:
            while True:
                details = self._api.job(name)
                is_over = details is None or _phase(details) in OVER
                began = time.monotonic()
                yield from log.read_all(self._api.logs(name))
                if is_over:
                    yield from log.rest()
                    break
                # A long log is read as a whole each time: then less often.
                time.sleep(max(_QUICK_POLL_S, 10 * (time.monotonic() - began)))
        finally:
            self._leave(name, is_over=is_over)
        if details is None:
            raise UserError(f"{self.describe()} has forgotten the command's job: try again")
        if details["status"] != "SUCCEEDED":
            if not log.has_begun:
                raise UserError(
                    f"{self.describe()} could not run a command: {_message(details) or 'no reason'}"
                )
            status = details.get("driver_exit_code") or 1
            raise RemoteCommandError(status if status > 0 else 128 - status)

    def cancel(self, job: Job) -> None:
        """End the job's processes: SIGTERM, and three seconds later SIGKILL."""
        self._api.stop(job.id)

    @contextmanager
    def dashboard(self, run: str) -> Iterator[str]:
        """The dashboard's URL, which is the Jobs API's."""
        self._api.version()
        yield self._api.shown

    def _leave(self, name: str, *, is_over: bool) -> None:
        with suppress(UserError):
            if not is_over:
                self._api.stop(name)
            # One that ended only now would come back: Ray still looks after it for a moment.
            before = 1000 * (time.time() - _KEEP_COMMANDS_S)
            for job in self._api.jobs():
                if _metadata(job).get(_KIND) == _COMMAND_KIND and (
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
        return _job(details)

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
            "metadata": {_RUN: run, _KIND: kind, _STORAGE: self.storage, _USER: _user()},
        }


def _phase(details: dict[str, Any]) -> Phase:
    return _PHASES.get(details["status"], "running")


def _metadata(details: dict[str, Any]) -> dict[str, str]:
    return details.get("metadata") or {}


def _newest(jobs: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    return max(jobs, key=lambda job: job.get("start_time") or 0, default=None)


def _job(details: dict[str, Any]) -> Job:
    metadata = _metadata(details)
    kind = metadata.get(_KIND, "train")
    driver = details.get("driver_info") or {}
    facts = {
        "submitted by": metadata.get(_USER),
        "submitted at": _time(details.get("start_time")),
        "machine": driver.get("node_ip_address"),
        "exit status": str(code) if (code := details.get("driver_exit_code")) else None,
    }
    return Job(
        run=metadata.get(_RUN, ""),
        kind=kind if kind in {"train", "evaluate", "doctor"} else "train",  # type: ignore[arg-type]
        id=str(details["submission_id"]),
        phase=_phase(details),
        message=_message(details),
        facts=tuple((name, value) for name, value in facts.items() if value),
    )


def _message(details: dict[str, Any]) -> str | None:
    """Why, in one line; Ray's own words for "it runs" and "it is over" say nothing."""
    status, text = details["status"], (details.get("message") or "").strip()
    if status == "PENDING":
        return "Ray prepares the job on the cluster's head"
    if status != "FAILED" or not text:
        return None
    if errors := re.findall(r"^babelray: error: (.*)", text, re.MULTILINE):
        return str(errors[-1])
    first = text.partition("\n")[0]
    return first.partition(", last available logs")[0][:500]


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))


def _new_id(run: str, kind: str) -> str:
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    return f"babelray-{kind}-{run}-{stamp}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
