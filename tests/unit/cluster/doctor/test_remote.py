"""The doctor as a job: a target that answers as the test says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from cluster.checks import Check
from cluster.doctor import remote
from cluster.launch import ray_address
from cluster.launch.ray_checks import check_room
from cluster.launch.target import Ended, Job, LogLine, Phase, Place, Submission, Update, Waiting
from data_shards.errors import UserError
from trainer.config import load_config

_GOING = Job("doctor", "doctor", "doctor", "running", facts=(("submitted by", "ada"),))
_GOOD = Check("GPUs", "ok", "16 on 2 machines")


class FakeTarget:
    """Only what the doctor asks of a ``Target``."""

    place = Place("kubernetes", "/mnt/babelray", namespace="ada")
    storage = "/mnt/babelray"

    def __init__(self, lines: list[str], *, phase: Phase = "succeeded", **more: Any) -> None:
        self.lines, self.phase, self.more = lines, phase, more
        self.cancelled: list[str] = []
        self.found: list[Job | None] = more.get("found", [])

    def describe(self) -> str:
        return "a cluster"

    def workers(self) -> str:
        return "2:8"

    def preflight(self, submission: Submission) -> Iterator[Check]:
        yield _GOOD
        raise UserError("kubectl cannot reach the cluster: correct --context")

    def submit(self, submission: Submission) -> Job:
        if error := self.more.get("error"):
            raise error
        return Job(submission.run, submission.kind, "doctor", "starting")

    def find(self, run: str, kind: str) -> Job | None:
        assert (run, kind) == ("doctor", "doctor")
        return self.found.pop(0) if self.found else None

    def follow(self, job: Job) -> Iterator[Update]:
        yield Waiting("2 pods pending")
        for line in self.lines:
            yield LogLine(line)
        yield Ended(Job(job.run, job.kind, job.id, self.phase, self.more.get("message")))

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job.id)


def run(target: Any) -> tuple[list[tuple[str, Check]], list[str]]:
    said: list[str] = []
    job = Submission("doctor", "doctor", ())
    return list(remote.job_checks(target, job, say=said.append)), said


def test_what_it_finds_there_is_passed_on() -> None:
    lines = [remote.to_line(title, _GOOD) for title in ("This machine", "Cluster")]
    found, said = run(FakeTarget(["noise", *lines, '{"section": broken']))
    assert found == [("The cluster's head", _GOOD), ("Cluster", _GOOD)]
    assert said[-1] == "waiting: 2 pods pending"


def test_a_job_that_tells_nothing_is_a_failure_with_its_last_lines() -> None:
    [(_, check)], _ = run(FakeTarget(["Traceback", "ImportError: cluster"], phase="failed"))
    assert check.outcome == "failure"
    assert check.found == "the doctor's job failed: Traceback / ImportError: cluster"
    [(_, check)], _ = run(FakeTarget([], message="ImagePullBackOff", phase="failed"))
    assert "ImagePullBackOff" in check.found


def test_a_job_that_is_refused() -> None:
    [(_, check)], _ = run(FakeTarget([], error=UserError("one runs already: wait for it")))
    assert check == Check("cluster", "failure", "one runs already", "wait for it")


def test_whoever_stops_listening_ends_the_job() -> None:
    target: Any = FakeTarget([remote.to_line("Cluster", _GOOD)] * 3)
    listening = remote.job_checks(target, Submission("doctor", "doctor", ()), say=lambda _: None)
    next(listening)
    over = Job("doctor", "doctor", "doctor", "stopped")
    target.found = [_GOING, _GOING, over, _GOING]
    listening.close()  # type: ignore[attr-defined]
    assert target.cancelled == ["doctor"]
    assert target.found == [_GOING], "its end is waited for, and no longer"


def test_whoever_waits_no_longer_leaves_a_job_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "_END_S", 0.2)
    monkeypatch.setattr(remote, "_POLL_S", 0.1)
    target: Any = FakeTarget([remote.to_line("Cluster", _GOOD)] * 3)
    listening = remote.job_checks(target, Submission("doctor", "doctor", ()), say=lambda _: None)
    next(listening)
    target.found = [_GOING] * 20
    listening.close()  # type: ignore[attr-defined]
    assert 10 < len(target.found) < 20


def test_a_second_doctor_is_told_how_to_end_the_first() -> None:
    target: Any = FakeTarget([], found=[_GOING])
    [(_, check)], _ = run(target)
    assert check.outcome == "failure"
    assert check.found.endswith("its job doctor is running, submitted by ada")
    assert (check.mend or "").endswith("end it: kubectl --namespace ada delete rayjob doctor")
    target = FakeTarget([], found=[_GOING])
    target.place = Place("ray", "/mnt", address="http://ada:secret@head:8265")
    [(_, check)], _ = run(target)
    assert (check.mend or "").endswith("ray job stop --address http://head:8265 doctor")
    over = Job("doctor", "doctor", "doctor", "failed")
    assert "told nothing" in run(FakeTarget([], found=[over]))[0][0][1].found


def test_the_preflight_is_told_as_checks() -> None:
    target: Any = FakeTarget([])
    found = list(remote.preflight(target, Submission("doctor", "doctor", ())))
    assert [check.outcome for _, check in found] == ["ok", "failure"]
    assert not remote.may_go_on(found)


@pytest.mark.parametrize("given", [True, False])
def test_what_is_submitted(given: bool) -> None:
    settings = ("data.root=/mnt/babelray/mine",) if given else ()
    config = load_config(None, settings)
    target: Any = FakeTarget([])
    job = remote.submission(target, config, "{}", with_all_reduce=False, gbits=200.0)
    arguments = " ".join(job.arguments)
    assert arguments.startswith("doctor --on-cluster --json --runs /mnt/babelray/runs")
    assert ("--set data.root=/mnt/babelray/data" in arguments) is not given
    assert arguments.endswith("--no-all-reduce --link-gbits 200 --expect 2"), "as in the image"
    assert job.kind == "doctor"
    target.place = Place("ray", "/mnt/babelray", address="http://head:8265")
    job = remote.submission(target, config, "{}", with_all_reduce=True, gbits=None)
    requires = [text for name, text in pairwise(job.arguments) if name == "--requires"]
    assert any(text.startswith("torch") for text in requires)
    assert not [text for text in requires if "extra" in text]


def test_room_is_looked_for_as_the_job_will_expect_it() -> None:
    nodes = [{"resources_total": {"CPU": 8.0, "GPU": 1.0}}] * 2
    assert check_room(nodes, ("doctor", "--expect", "2")).outcome == "ok"
    check = check_room(nodes, ("doctor", "--on-cluster", "--expect", "128"))
    assert (check.outcome, "128 workers" in check.found) == ("warning", True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RAY_ADDRESS": "local"}, True),
        ({"RAY_ADDRESS": "http://head:8265"}, True),
        ({"RAY_ADDRESS": "auto"}, False),
        ({"RAY_ADDRESS": "ray://head:10001"}, False),
        ({"RAY_ADDRESS": "head:8265"}, True),
        ({"RAY_ADDRESS": "head:6379"}, False),
        ({"RAY_ADDRESS": "head:6379", "RAY_API_SERVER_ADDRESS": "http://head:8265"}, True),
        ({"RAY_ADDRESS": "head:6379", "RAY_API_SERVER_ADDRESS": "local"}, False),
    ],
)
def test_where_the_doctor_goes_as_a_job(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "is_dashboard", lambda address: address.endswith(":8265"))
    assert remote.goes_as_job(environment) is expected
