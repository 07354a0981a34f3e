"""``babelray launch`` and what can be done about a run that was launched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.checks import Check
from cluster.cli import cli
from cluster.launch import records
from cluster.launch.records import Record, read_record, write_record
from cluster.launch.target import Job, LogLine, Place, Waiting
from data_shards.errors import UserError
from tests.targets import FakeTarget, ended

REPOSITORY = Path(__file__).resolve().parents[4]
TINY = str(REPOSITORY / "configs" / "tiny.yaml")
PODS = Place("kubernetes", "/mnt/babelray", overlay="gpu")
RUNNING = Job("one", "train", "train-one", "running", facts=(("pods", "3 of 3 ready"),))


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    fake = FakeTarget(PODS, workers="2")

    def open_target(place: Place, runs: Path | None = None) -> FakeTarget:
        fake.place = place
        return fake

    monkeypatch.setattr(records, "open_target", open_target)
    monkeypatch.setattr("cluster.launch.remote.open_target", open_target)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


@pytest.fixture
def babelray(tmp_path: Path, target: FakeTarget) -> Callable[..., Result]:
    def run(*arguments: object, **options: Any) -> Result:
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli, [*words, "--runs", str(tmp_path)], **options)

    return run


@pytest.fixture
def launched(tmp_path: Path, target: FakeTarget) -> FakeTarget:
    write_record(Record("one", PODS, "model:\n  preset: tiny\n", 1.0), tmp_path)
    return target


Babelray = Callable[..., Result]


def test_launch_submits_follows_and_tells_the_end(
    babelray: Babelray, target: FakeTarget, tmp_path: Path
) -> None:
    target.updates = [Waiting("pods come up"), LogLine("hello"), ended("succeeded")]
    target.checks = [Check("GPUs", "ok", "8"), Check("image", "warning", "by tag", "use a digest")]
    result = babelray("launch", "--config", TINY, "--name", "one", "--nodes", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == "one: finished\n"
    for part in (
        "launching one on a cluster", "warning  image: by tag", "use a digest", "launched: train-1",
        "waiting: pods come up", "hello", "next: babelray evaluate one",
    ):  # fmt: skip
        assert part in result.stderr
    assert "GPUs" not in result.stderr
    (submission,) = target.submitted
    assert submission.arguments[-2:] == ("--workers", "2")
    record = read_record("one", tmp_path)
    assert record is not None
    assert record.place == Place("kubernetes", "/mnt/babelray", overlay="gpu", nodes="2")
    assert record.config == submission.config


def test_a_check_that_fails_keeps_the_run_from_starting(
    babelray: Babelray, target: FakeTarget, tmp_path: Path
) -> None:
    target.checks = [
        Check("GPUs", "failure", "16 asked for, 8 free", "give --nodes 1"),
        Check("KubeRay", "failure", "not installed", "helm install it"),
    ]
    result = babelray("launch", "--config", TINY, "--name", "one")
    assert result.exit_code == 2
    for part in ("nothing was changed", "16 asked for", "give --nodes 1", "helm install it"):
        assert part in result.stderr
    assert target.submitted == []
    assert read_record("one", tmp_path) is None


def test_without_checks(babelray: Babelray, target: FakeTarget) -> None:
    target.checks = [Check("GPUs", "failure", "none")]
    result = babelray("launch", "--config", TINY, "--name", "one", "--no-checks", "--detach")
    assert result.exit_code == 0, result.output
    assert result.stdout == "train-1\n"


def test_a_dry_run_changes_nothing(babelray: Babelray, target: FakeTarget, tmp_path: Path) -> None:
    result = babelray("launch", "--config", TINY, "--name", "one", "--dry-run")
    assert result.stdout.startswith("rendered: train --name one")
    assert target.submitted == []
    assert list(tmp_path.iterdir()) == []


def test_interrupting_leaves_the_job(babelray: Babelray, target: FakeTarget) -> None:
    target.updates = [LogLine("hello"), KeyboardInterrupt()]
    result = babelray("launch", "--config", TINY, "--name", "one")
    assert result.exit_code == 130
    assert "one goes on. Watch: babelray logs one --follow" in result.stderr
    assert target.cancelled == []


@pytest.mark.parametrize(
    ("phase", "status", "parts"),
    [
        ("failed", 1, ["one failed on the cluster: out of memory", "babelray resume one"]),
        ("stopped", 0, ["go on: babelray resume one"]),
    ],
)
def test_how_it_ended(
    babelray: Babelray, target: FakeTarget, phase: str, status: int, parts: list[str]
) -> None:
    target.updates = [ended(phase, "out of memory")]
    result = babelray("launch", "--config", TINY, "--name", "one")
    assert result.exit_code == status
    for part in parts:
        assert part in result.stderr


def test_the_end_as_json(babelray: Babelray, target: FakeTarget) -> None:
    target.updates = [ended("failed", "out of memory")]
    result = babelray("launch", "--config", TINY, "--name", "one", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["message"] == "out of memory"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["launch"], ["give the configuration"]),
        (["launch", "--name", "one"], ["no run one was launched from here before"]),
        (["launch", "--name", "a b", "--config", TINY], ["run name 'a b'"]),
        (["launch", "--config", TINY, "--set", "trainer.steps=3"], ["unknown key trainer.steps"]),
        (["launch", "--config", TINY, "--nodes", "4:2"], ["the least comes first: 2:4"]),
        (["launch", "--config", TINY, "--set", "data.lanes=1"], ["data.lanes 1"]),
        (["resume", "one"], ["no run 'one'"]),
        (["resume", "one", "--nodes", "2"], ["--nodes: the run one was not launched"]),
        (["stop", "one"], ["no run 'one'"]),
    ],
)
def test_wrong_input_is_told(babelray: Babelray, arguments: list[str], parts: list[str]) -> None:
    result = babelray(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


def test_what_the_cluster_refuses_is_told_and_not_remembered(
    babelray: Babelray, target: FakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(submission: object) -> Job:
        raise UserError("the run one runs there already")

    monkeypatch.setattr(target, "submit", refuse)
    result = babelray("launch", "--config", TINY, "--name", "one")
    assert result.exit_code == 2
    assert "runs there already" in result.stderr
    assert read_record("one", tmp_path) is None


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no answer"), 2), (KeyboardInterrupt(), 130)]
)
def test_what_may_run_there_can_be_found(
    babelray: Babelray,
    target: FakeTarget,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
) -> None:
    def submit(submission: object) -> Job:
        target.jobs["train"] = RUNNING
        raise error

    monkeypatch.setattr(target, "submit", submit)
    assert babelray("launch", "--config", TINY, "--name", "one").exit_code == status
    assert read_record("one", tmp_path) is not None
    assert babelray("stop", "one", "--now").exit_code == 0


def test_a_refused_launch_leaves_the_record_of_the_one_before(
    babelray: Babelray, launched: FakeTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(submission: object) -> Job:
        raise UserError("refused")

    before = read_record("one", tmp_path)
    monkeypatch.setattr(launched, "submit", refuse)
    assert babelray("launch", "--config", TINY, "--name", "one", "--nodes", "4").exit_code == 2
    assert read_record("one", tmp_path) == before


def test_an_evaluation_that_cannot_run_is_not_submitted(
    babelray: Babelray, launched: FakeTarget
) -> None:
    launched.checks = [Check("GPUs", "failure", "none free", "wait")]
    result = babelray("evaluate", "one")
    assert result.exit_code == 2
    assert "none free" in result.stderr
    assert launched.submitted == []


def test_resume_launches_again_as_before(babelray: Babelray, launched: FakeTarget) -> None:
    launched.updates = [ended("succeeded")]
    result = babelray("resume", "one", "--set", "trainer.max_steps=7", "--nodes", "3")
    assert result.exit_code == 0, result.output
    (submission,) = launched.submitted
    assert "--start-or-resume" in submission.arguments
    assert submission.config == "model:\n  preset: tiny\ntrainer:\n  max_steps: 7\ndata: {}\n"
    assert launched.place == Place("kubernetes", "/mnt/babelray", overlay="gpu", nodes="3")


def test_status_asks_where_the_files_are(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = RUNNING
    launched.lines = ["one: training", "  step  100"]
    result = babelray("status", "one")
    assert result.stdout.splitlines() == [
        "one: running on a cluster", "  job   train-one", "  pods  3 of 3 ready", "",
        "one: training", "  step  100",
    ]  # fmt: skip
    assert launched.commands == [("status", "one", "--runs", "/mnt/babelray/runs")]


def test_hints_from_there_work_here(
    babelray: Babelray, launched: FakeTarget, tmp_path: Path
) -> None:
    launched.jobs["train"] = RUNNING
    launched.lines = ["next: babelray evaluate one --runs /mnt/babelray/runs"]
    assert f"next: babelray evaluate one --runs {tmp_path}\n" in babelray("status", "one").stdout


def test_status_as_json(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = RUNNING
    launched.lines = ["{", '  "summary": {"step": 100}', "}"]
    value = json.loads(babelray("status", "one", "--json").stdout)
    assert value["job"]["phase"] == "running"
    assert value["run"] == {"summary": {"step": 100}}


def test_status_without_a_machine_to_ask(
    babelray: Babelray, launched: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched.jobs["train"] = Job(
        "one", "train", "train-one", "queued", "waits for quota", attempt=2, attempts=4
    )

    def refuse(run: str, arguments: object) -> list[str]:
        raise UserError("no pod runs")

    monkeypatch.setattr(launched, "run", refuse)
    lines = babelray("status", "one").stdout.splitlines()
    assert lines[0] == "one: queued, attempt 2 of 4 (waits for quota) on a cluster"
    assert lines[-1] == "no pod runs"


def test_status_of_a_job_that_was_removed(babelray: Babelray, launched: FakeTarget) -> None:
    assert "go on: babelray resume one" in babelray("status", "one").stdout


def test_status_of_all_names_what_was_launched(babelray: Babelray, launched: FakeTarget) -> None:
    assert "one: launched on a cluster; babelray status one" in babelray("status").stdout
    assert launched.commands == []


def test_logs_come_from_there(babelray: Babelray, launched: FakeTarget) -> None:
    launched.lines = ["rank 1 | hello"]
    assert babelray("logs", "one", "--rank", "1").stdout == "rank 1 | hello\n"
    assert launched.commands == [("logs", "one", "--rank", "1", "--runs", "/mnt/babelray/runs")]


def test_logs_that_there_are_not(babelray: Babelray, launched: FakeTarget) -> None:
    launched.lines, launched.exit_status = ["babelray: error: no rank 7"], 2
    assert babelray("logs", "one", "--rank", "7").exit_code == 2


def test_following_the_logs_shows_the_progress(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = RUNNING
    launched.updates = [LogLine("hello"), ended("succeeded")]
    result = babelray("logs", "one", "--follow")
    assert "hello" in result.stderr
    assert result.stdout == "one: finished\n"


def test_stop_asks_the_run_itself(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = RUNNING
    launched.lines = ["one: stopped at step 120", "go on: babelray resume one --runs /mnt/x"]
    result = babelray("stop", "one")
    assert result.exit_code == 0, result.output
    assert launched.commands == [("stop", "one", "--runs", "/mnt/babelray/runs")]
    assert launched.cancelled == []
    assert "stopped at step 120" in result.stderr
    assert result.stderr.count("go on: babelray resume one") == 1
    assert "/mnt/x" not in result.stderr


@pytest.mark.parametrize("phase", ["queued", "starting"])
def test_stop_removes_what_does_not_run_yet(
    babelray: Babelray, launched: FakeTarget, phase: Any
) -> None:
    launched.jobs["train"] = Job("one", "train", "train-one", phase)
    assert babelray("stop", "one").exit_code == 0
    assert launched.cancelled == [launched.jobs["train"]]
    assert launched.commands == []


def test_stop_now(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = RUNNING
    assert babelray("stop", "one", "--now").exit_code == 0
    assert launched.cancelled == [RUNNING]


def test_stop_that_could_not_ask_says_how_to_end_it(
    babelray: Babelray, launched: FakeTarget
) -> None:
    launched.jobs["train"], launched.exit_status = RUNNING, 2
    result = babelray("stop", "one")
    assert result.exit_code == 2
    assert "babelray stop one --now" in result.stderr
    assert launched.cancelled == []


def test_stop_ends_an_evaluation(babelray: Babelray, launched: FakeTarget) -> None:
    launched.jobs["train"] = Job("one", "train", "train-one", "succeeded")
    launched.jobs["evaluate"] = Job("one", "evaluate", "evaluate-one", "running")
    assert babelray("stop", "one").stdout == "one: evaluation ended\n"
    assert launched.cancelled == [launched.jobs["evaluate"]]


def test_stop_waits_until_the_cluster_takes_it_for_ended(
    babelray: Babelray, launched: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched.jobs["train"], launched.looks_to_end = RUNNING, 5
    monkeypatch.setattr("cluster.commands.stop._POLL_S", 0.0)
    assert babelray("stop", "one").exit_code == 0
    assert launched.ending["train"] == 0
    launched.ending, launched.looks_to_end = {}, 10**9
    monkeypatch.setattr("cluster.commands.stop._END_S", 0.05)
    result = babelray("stop", "one", "--now")
    assert result.exit_code == 1
    assert "its job (train-one) is still running" in result.stderr


def test_a_run_that_ends_by_itself_need_not_be_asked(
    babelray: Babelray, launched: FakeTarget
) -> None:
    launched.jobs["train"], launched.exit_status = RUNNING, 2
    launched.ending["train"] = 2
    result = babelray("stop", "one")
    assert result.exit_code == 0, result.output


def test_a_refused_configuration_is_not_kept(
    babelray: Babelray, launched: FakeTarget, tmp_path: Path
) -> None:
    before = read_record("one", tmp_path)
    assert before is not None
    launched.updates = [ended("failed", "--resume would change it")]
    assert babelray("resume", "one", "--set", "model.dropout=0.3").exit_code == 1
    kept = read_record("one", tmp_path)
    assert kept is not None
    assert kept.config == before.config
    started = (
        '{"event": "resumed", "step": 3, "message": "m", "level": "info", "time": "2026-01-01"}'
    )
    launched.updates = [LogLine(started), ended("failed", "out of memory")]
    assert babelray("resume", "one", "--set", "trainer.max_steps=7").exit_code == 1
    kept = read_record("one", tmp_path)
    assert kept is not None
    assert "max_steps: 7" in kept.config


def test_a_second_run_of_a_name_is_refused(
    babelray: Babelray, launched: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    result = babelray("launch", "--config", TINY, "--name", "one", "--storage", "/other")
    assert result.exit_code == 2
    assert "files in /mnt/babelray (kubernetes), not /other (ray)" in result.stderr
    assert launched.submitted == []


def test_a_launched_run_whose_files_are_seen_is_asked_for_there(
    babelray: Babelray, launched: FakeTarget, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "ray.json").write_text('{"is_local": false}')
    launched.updates = [LogLine("BLEU  38.58"), ended("succeeded", kind="evaluate")]
    assert babelray("evaluate", "one").stdout == "BLEU  38.58\n"
    (folder / "ray.json").write_text('{"is_local": true}')
    assert "BLEU" not in babelray("evaluate", "one").stdout


def test_the_dashboard_as_json(babelray: Babelray, target: FakeTarget, tmp_path: Path) -> None:
    place = Place("ray", "/shared", address="http://127.0.0.1:8265")
    write_record(Record("one", place, "", 1.0), tmp_path)
    value = json.loads(babelray("dashboard", "one", "--json").stdout)
    assert value == {"name": "one", "dashboard_url": "http://127.0.0.1:8265"}


def test_nothing_to_stop(babelray: Babelray, launched: FakeTarget) -> None:
    result = babelray("stop", "one")
    assert result.exit_code == 2
    assert "nothing of the run one runs on a cluster" in result.stderr


def test_evaluate_is_a_job_there(babelray: Babelray, launched: FakeTarget) -> None:
    launched.updates = [LogLine("BLEU  38.58"), ended("succeeded", kind="evaluate")]
    result = babelray("evaluate", "one", "--checkpoint", "average:5")
    assert result.exit_code == 0, result.output
    assert result.stdout == "BLEU  38.58\n"
    (submission,) = launched.submitted
    assert submission.kind == "evaluate"
    assert submission.arguments == (
        "evaluate", "one", "--checkpoint", "average:5", "--runs", "/mnt/babelray/runs",
    )  # fmt: skip


def test_an_evaluation_as_json_is_alone_on_standard_output(
    babelray: Babelray, launched: FakeTarget
) -> None:
    lines = ["Job submitted", "{", '  "bleu": 38.58', "}", "translations: x"]
    launched.updates = [*map(LogLine, lines), ended("succeeded", kind="evaluate")]
    result = babelray("evaluate", "one", "--json")
    assert json.loads(result.stdout) == {"bleu": 38.58}
    assert "translations: x" in result.stderr


def test_an_evaluation_that_fails(babelray: Babelray, launched: FakeTarget) -> None:
    launched.updates = [ended("failed", "no checkpoint", kind="evaluate")]
    result = babelray("evaluate", "one")
    assert result.exit_code == 1
    assert "ended as failed (no checkpoint)" in result.stderr


def test_an_evaluation_goes_on_when_it_is_not_watched(
    babelray: Babelray, launched: FakeTarget
) -> None:
    launched.updates = [KeyboardInterrupt()]
    result = babelray("evaluate", "one")
    assert result.exit_code == 130
    assert "(evaluate-1) goes on" in result.stderr
    assert launched.cancelled == []


def test_the_dashboard_of_a_ray_cluster_is_an_address(
    babelray: Babelray, target: FakeTarget, tmp_path: Path
) -> None:
    place = Place("ray", "/shared", address="http://127.0.0.1:8265")
    write_record(Record("one", place, "", 1.0), tmp_path)
    result = babelray("dashboard", "one")
    assert result.exit_code == 0, result.output
    assert "Ray dashboard  http://127.0.0.1:8265" in result.stdout


def test_a_damaged_record_is_told(babelray: Babelray, tmp_path: Path) -> None:
    (tmp_path / ".launched").mkdir()
    (tmp_path / ".launched" / "one.json").write_text("{")
    for command in ("status", "logs", "stop", "evaluate", "resume", "dashboard"):
        result = babelray(command, "one")
        assert result.exit_code == 2, result.output
        assert "is damaged" in result.stderr
