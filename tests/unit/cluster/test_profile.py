"""Asking for a profile: what is refused, and how the answer is waited for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner

from cluster import naming
from cluster import profile as asking
from cluster.cli import cli
from cluster.profile import Steps
from cluster.profile_table import rank_text
from data_shards.errors import RunFailedError, UserError
from trainer.config import RunConfig
from trainer.profile import PROFILE_FILE, ProfileRequest, StepProfiler, summary_name

pytestmark = pytest.mark.timeout(60)  # what waits could wait for ever


def write_event(run_dir: Path, **event: object) -> None:
    with (run_dir / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": 1.0, **event}) + "\n")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two workers at step 20 of 100,000."""
    folder = tmp_path / "demo"
    naming.write_config(RunConfig(), folder)
    write_event(folder, event="started", step=0, world_size=2)
    write_event(folder, event="step", step=20, world_size=2)
    return folder


@pytest.fixture
def training(run_dir: Path) -> Iterator[Path]:
    with naming.claim(run_dir):
        yield run_dir


def test_steps() -> None:
    assert Steps.parse("10:15") == Steps(10, 15)
    assert Steps.parse("12") == Steps(12, 12)
    assert Steps.parse("+2:+6") == Steps(2, 6, relative=True)
    assert Steps.parse("+2:+6").after(100) == Steps(102, 106)
    assert Steps.parse("10:15").after(100) == Steps(10, 15)
    for text in ("", "a", "1:2:3", "+1:5", "1:+5", "-1:5", "1.5", "6:2"):
        with pytest.raises(UserError, match=r"--steps"):
            Steps.parse(text)


def test_ranks() -> None:
    assert asking.parse_ranks("0") == (0,)
    assert asking.parse_ranks("3,0,3") == (0, 3)
    assert asking.parse_ranks("all") == ()
    for text in ("", "a", "0,", "-1", "0 1"):
        with pytest.raises(UserError, match=r"--ranks"):
            asking.parse_ranks(text)
    asking.check_ranks((0, 1), 2)
    asking.check_ranks((9,), None)
    with pytest.raises(UserError, match="no rank 2: the run has 2 workers, ranks 0 to 1"):
        asking.check_ranks((0, 2), 2)


def test_steps_ahead_are_settled(training: Path) -> None:
    steps, stands = asking.settle(training, Steps(2, 6, relative=True))
    assert steps == Steps(22, 26)
    assert stands.workers == 2
    assert asking.settle(training, Steps(21, 21))[0] == Steps(21, 21)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--steps", "20:25"], "is at step 20 already"),
        (["demo", "--steps", "30:25"], "the first step comes first"),
        (["demo", "--steps", "30:130"], "too many"),
        (["demo", "--steps", "99999:100001"], "the run ends at step 100000"),
        (["demo", "--steps", "30:31", "--ranks", "0,5"], "no rank 5"),
        (["other", "--steps", "30:31"], "no run 'other'"),
        (["--config", "x.yaml", "--steps", "+1:+3"], "give steps such as 10:15"),
        (["--config", "x.yaml", "--steps", "1:3"], "x.yaml"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    training: Path, arguments: list[str], said: str
) -> None:
    result = CliRunner().invoke(cli, ["profile", *arguments, "--runs", str(training.parent)])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1
    assert not (training / PROFILE_FILE).exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["demo", "--config", "x.yaml"], ["demo", "--workers", "2"], ["demo", "--set", "a.b=1"]],
)
def test_a_run_or_a_configuration(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["profile", *arguments, "--steps", "1:2"])
    assert result.exit_code == 2
    assert "--config" in result.output


def test_a_run_that_does_not_train_is_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match="not training"):
        asking.settle(run_dir, Steps(30, 31))


def test_a_run_that_does_not_train_is_gone_on_with_where_it_lies(run_dir: Path) -> None:
    with pytest.raises(UserError, match=f"--name demo --resume --runs {run_dir.parent}"):
        asking.settle(run_dir, Steps(30, 31))


def test_a_finished_run_has_no_steps_to_profile(run_dir: Path) -> None:
    write_event(run_dir, event="finished", step=20, reason="max_steps")
    with pytest.raises(UserError) as caught:
        asking.settle(run_dir, Steps(30, 31))
    assert "the run demo has finished (max_steps, step 20)" in str(caught.value)
    more = f"babelray train --name demo --resume --set trainer.max_steps=N --runs {run_dir.parent}"
    assert more in str(caught.value)
    assert "--config" in str(caught.value)


def test_one_profile_at_a_time(training: Path) -> None:
    ProfileRequest(50, 51).write(training)
    with pytest.raises(UserError, match="profiled already"):
        asking.settle(training, Steps(30, 31))


def test_a_request_is_withdrawn_when_the_wait_is_over(training: Path) -> None:
    request = asking.make_request(Steps(30, 31), (0,), memory=False, stacks=False)

    def interrupted() -> None:
        with asking.asked(training, request):
            assert ProfileRequest.read(training) == request
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (training / PROFILE_FILE).exists()


def test_the_answer_is_waited_for(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(asking, "_POLL_S", 0.01)
    request = asking.make_request(Steps(22, 23), (), memory=False, stacks=False)

    def train() -> None:
        profiler = StepProfiler(
            training, rank=0, world_size=1, device=torch.device("cpu"), is_first=True
        )
        for step in range(20, 25):
            profiler.step_begins(step, requested=True, phases=None)
        profiler.close()

    said: list[str] = []
    trainer = Thread(target=train)
    with asking.asked(training, request):
        trainer.start()
        folder = asking.wait(training, request, said.append)
    trainer.join()
    assert folder == training / "profile" / "steps-00022-00023"
    assert asking.missing(folder) == []
    result = asking.collect(folder, count=False)
    assert result["steps"] == [22, 23]
    assert result["ranks"][0]["trace"] == str(folder / "rank-000.json.gz")
    assert said[-1].startswith("profiling steps 22 to 23")


def test_a_run_that_ends_before_is_told(run_dir: Path) -> None:
    request = asking.make_request(Steps(30, 31), (0,), memory=False, stacks=False)
    with (
        asking.asked(run_dir, request),
        pytest.raises(RunFailedError, match="ended before step 30"),
    ):
        asking.wait(run_dir, request, lambda line: None)


def test_a_rank_that_says_nothing_is_told(run_dir: Path) -> None:
    request = asking.make_request(Steps(30, 31), (0, 1), memory=False, stacks=False)
    folder = run_dir / "profile" / "steps-00030-00031"
    folder.mkdir(parents=True)
    about = {"first": 30, "last": 31, "ranks": [0, 1], "world_size": 2, "time": 1.0}
    (folder / "request.json").write_text(json.dumps({**about, "token": request.token}))
    (folder / summary_name(0)).write_text("{}")
    with pytest.raises(RunFailedError, match="no profile came from rank 1"):
        asking.wait(run_dir, request, lambda line: None)


def test_a_gpus_table_shows_kernels_by_phase() -> None:
    rank = {
        "rank": 3,
        "world_size": 8,
        "device": "cuda",
        "steps": [10, 11],
        "total_ms": 200.0,
        "unprofiled_step_ms": 90.0,
        "phases": {
            "other": {"host_ms": 20.0, "device_ms": 0.0},
            "forward": {"host_ms": 180.0, "device_ms": 120.0},
        },
        "idle_of": "device",
        "idle_ms": 50.0,
        "collectives": [{"name": "ncclDevKernel_AllReduce", "calls": 4, "ms": 30.0}],
        "memory": {"cuda": {"peak_bytes": 10**9, "allocations": 4, "allocated_bytes": 10**8}},
        "operators": [
            {"name": "aten::mm", "calls": 8, "self_ms": 1.0, "device_ms": 100.0, "share": 0.9}
        ],
    }
    assert rank_text(rank).splitlines() == [
        "rank 3 of 8 on cuda, steps 10 to 11: 100.0 ms a step; 90.0 ms before, unprofiled (the "
        "median of the steps then)",
        "phase    ms a step  share  on the device",
        "forward      90.00  90.0%          60.00",
        "other        10.00  10.0%           0.00",
        "",
        "idle: 25.00 ms a step (25.0%) no kernel on the device",
        "ncclDevKernel_AllReduce: 2.0 calls, 15.00 ms a step",
        "memory (cuda): 1,000.0 MB at most, 2 allocations of 50.0 MB a step",
        "",
        "operator  calls a step  own ms a step  share",
        "aten::mm           4.0          50.00  90.0%",
    ]
    assert rank_text({**rank, "error": "no disk"}) == "rank 3 of 8 on cuda: no disk"


def test_a_new_run_does_nothing_but_its_steps() -> None:
    trainer = asking.for_profiling(RunConfig(), 15).trainer
    assert trainer.max_steps == 16
    assert min(trainer.validate_every, trainer.checkpoint_every) > 16
