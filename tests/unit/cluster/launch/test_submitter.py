"""The submitter of a RayJob, against a head of our own that is lost, refuses and forgets."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import submitter
from cluster.launch.follow import follow_training
from cluster.launch.jobs_api import JobsApi
from cluster.launch.submitter import Pace, Submitter, main
from cluster.launch.target import LogLine
from data_shards.errors import UserError
from tests.unit.cluster.launch.test_ray_jobs import Head, wrote
from trainer.config import RunConfig

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

ENTRYPOINT = "babelray train --workers 2 --name demo --start-or-resume --log-format json"
JOB = "train-demo-x7k2p"
PATH = f"/api/jobs/{JOB}"
QUICK = Pace(poll=0.02, answer=5.0, quiet=0.1, refused=60.0, silent=5.0, last_lines=10.0)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    server = Head()
    yield server
    server.close()


class Running:
    """A submitter in a thread, and what it has said."""

    def __init__(self, head: Head, pace: Pace = QUICK) -> None:
        self.lines: list[str] = []
        self.remarks: list[str] = []
        self.error: UserError | None = None
        self.submitter = Submitter(
            JobsApi(head.address),
            JOB,
            ENTRYPOINT,
            tell=self.lines.append,
            remark=self.remarks.append,
            pace=pace,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.submitter.run()
        except UserError as error:
            self.error = error

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, (self.lines, self.remarks)
            assert self.thread.is_alive(), (self.lines, self.remarks, self.error)
            time.sleep(0.005)

    def end(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive()


def begin(head: Head, text: str) -> None:
    head.jobs[JOB]["status"] = "RUNNING"
    head.texts[JOB] = wrote(JOB, text)


def posts(head: Head) -> int:
    return head.seen.count("POST /api/jobs/")


def test_the_job_is_handed_in_and_its_lines_are_told(head: Head) -> None:
    running = Running(head)
    running.wait_for(lambda: JOB in head.jobs)
    assert head.jobs[JOB]["entrypoint"] == ENTRYPOINT
    assert head.jobs[JOB]["entrypoint_num_cpus"] == 0
    begin(head, '{"event": 1}\nplain')
    running.wait_for(lambda: running.lines)
    head.texts[JOB] += " and more\nlast"
    head.jobs[JOB]["status"] = "SUCCEEDED"
    running.end()
    assert running.lines == ['{"event": 1}', "plain and more", "last"]
    assert (running.remarks, running.error, posts(head)) == ([], None, 1)


def test_a_stream_that_is_cut_or_ends_is_no_end_of_the_job(head: Head) -> None:
    lines = [f"step {number}" for number in range(30)]
    head.cuts = [3, 100, 150]  # then every stream is closed as if all was said
    running = Running(head)
    running.wait_for(lambda: JOB in head.jobs)
    begin(head, "\n".join(lines[:20]) + "\n")
    running.wait_for(lambda: head.seen.count(f"GET {PATH}/logs/tail") > 6)
    assert running.lines == lines[:20]
    head.texts[JOB] += "\n".join(lines[20:])
    head.cuts = [200]
    head.jobs[JOB]["status"] = "STOPPED"
    running.end()
    assert (running.lines, running.remarks, posts(head)) == (lines, [], 1)


def test_a_head_that_begins_anew_is_given_the_job_again(head: Head) -> None:
    running = Running(head)
    running.wait_for(lambda: JOB in head.jobs)
    begin(head, "first\nsecond\nunfinis")
    running.wait_for(lambda: len(running.lines) == 2)
    head.texts.clear()
    head.jobs.clear()
    running.wait_for(lambda: JOB in head.jobs)
    begin(head, "first\nthird\n")
    head.jobs[JOB]["status"] = "SUCCEEDED"
    running.end()
    assert running.lines == ["first", "second", "unfinis", "first", "third"]
    assert running.remarks == ["Ray's head has begun anew: the job is handed in again"]
    assert posts(head) == 2


def test_two_submitters_start_one_job(head: Head) -> None:
    """The second finds the job unknown, as the first did, and comes too late."""
    head.statuses[PATH] = [(404, "")]
    head.jobs[JOB] = {"type": "SUBMISSION", "status": "PENDING", "start_time": 1}
    refusal = f"ValueError: Job with submission_id {JOB} already exists."
    head.statuses["/api/jobs/"] = [(400, refusal)]
    running = Running(head)
    running.wait_for(lambda: posts(head) == 1)
    begin(head, "first\n")
    running.wait_for(lambda: running.lines)
    # Another submitter has given it to a new head meanwhile: another job, another log.
    head.texts[JOB] = wrote(JOB, "second\n")
    head.jobs[JOB] |= {"start_time": 2, "status": "FAILED"}
    running.end()
    assert (running.lines, running.remarks, posts(head)) == (["first", "second"], [], 1)


def test_an_outage_is_told_once_and_outlived(head: Head) -> None:
    running = Running(head)
    running.wait_for(lambda: JOB in head.jobs)
    begin(head, "first\n")
    running.wait_for(lambda: running.lines)
    head.statuses[PATH] = [(502, "bad gateway")] * 10_000
    running.wait_for(lambda: running.remarks)
    head.statuses.clear()
    running.wait_for(lambda: len(running.remarks) == 2)
    head.jobs[JOB]["status"] = "SUCCEEDED"
    running.end()
    told = [f"http://{head.address[7:]} answers 502 Bad Gateway: bad gateway; trying on"]
    assert running.remarks == [*told, "Ray's head answers again"]
    assert running.lines == ["first"]


@pytest.mark.parametrize("what", ["token", "submission"])
def test_refusals_are_borne_for_a_while(head: Head, what: str) -> None:
    if what == "token":
        head.token = "right"
    else:
        head.statuses["/api/jobs/"] = [(500, "No available agent")] * 10_000
    running = Running(head, Pace(poll=0.02, quiet=0.05, refused=0.3))
    running.end()
    assert len(running.remarks) == 1
    assert {"token": "asks for a token", "submission": "No available agent"}[what] in str(
        running.error
    )


def test_a_job_that_did_not_begin_says_why(head: Head) -> None:
    def refuse(details: dict[str, Any]) -> None:
        details |= {"status": "FAILED", "message": "the head's memory is full"}

    head.submitted = refuse
    head.statuses[f"{PATH}/logs/tail"] = [(500, "")] * 10
    running = Running(head)
    running.end()
    assert running.remarks == ["the job's command did not begin: the head's memory is full"]


def test_what_kuberay_did_not_say() -> None:
    out = io.StringIO()
    assert main([ENTRYPOINT], {"RAY_DASHBOARD_ADDRESS": "head:8265"}, out) == 2
    assert json.loads(out.getvalue())["level"] == "error"


def test_its_remarks_are_told_with_the_jobs_lines(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitter, "Pace", lambda: QUICK)

    def run_it(details: dict[str, Any]) -> None:
        details |= {"status": "FAILED", "message": "no such file"}

    head.submitted = run_it
    head.statuses[f"{PATH}/logs/tail"] = [(500, "")] * 10
    out = io.StringIO()
    environment = {"RAY_DASHBOARD_ADDRESS": head.address, "RAY_JOB_SUBMISSION_ID": JOB}
    words = ENTRYPOINT.split()
    thread = threading.Thread(target=main, args=(words, environment, out), daemon=True)
    thread.start()
    thread.join(10)
    said: list[tuple[str, str]] = []

    class Listener:
        def say(self, line: str, level: str = "info") -> None:
            said.append((line, level))

    lines = [LogLine(line) for line in out.getvalue().splitlines()]
    follow_training(lines, RunConfig(), Listener())  # type: ignore[arg-type]
    assert head.jobs[JOB]["entrypoint"] == ENTRYPOINT
    [(line, level)] = said
    assert line == "submitter: the job's command did not begin: no such file"
    assert level == "warning"


def test_sigterm_ends_it_at_once_and_does_not_look_like_the_jobs_end(
    head: Head, tmp_path: Path
) -> None:
    head.jobs[JOB] = {"type": "SUBMISSION", "status": "RUNNING", "start_time": 1}
    head.texts[JOB] = wrote(JOB, "übersetzt\n")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_DASHBOARD_ADDRESS": head.address.removeprefix("http://"),
        "RAY_JOB_SUBMISSION_ID": JOB,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path.cwd()),
        "LC_ALL": "C",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.launch.submitter", *ENTRYPOINT.split()],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "übersetzt\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        assert time.monotonic() - began < 2
