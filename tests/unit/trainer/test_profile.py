"""Requests of profiles, and the ranks' answers, around a loop of a few matrix products."""

from __future__ import annotations

import gzip
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.errors import UserError
from trainer.phases import Phases
from trainer.profile import (
    PROFILE_DIR,
    PROFILE_FILE,
    ProfileRequest,
    StepProfiler,
    folder_of,
    summary_name,
    trace_name,
)

CPU = torch.device("cpu")


class Ranks:
    """Some ranks that compute a little at each step, one after the other."""

    def __init__(self, run_dir: Path, world_size: int = 1) -> None:
        self.run_dir, self.step, self._asked = run_dir, 0, False
        self.profilers = [
            StepProfiler(run_dir, rank=rank, world_size=world_size, device=CPU, is_first=rank == 0)
            for rank in range(world_size)
        ]
        self.phases = [Phases(CPU) for _ in range(world_size)]
        self.weight = torch.randn(64, 64)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for profiler, phases in zip(self.profilers, self.phases, strict=True):
                profiler.step_begins(self.step, self._asked, phases)
                with phases("forward"):
                    self.weight = (self.weight @ self.weight).tanh()
            # Rank 0 looks during the step; all hear of it at its end.
            self._asked = (self.run_dir / PROFILE_FILE).exists()
            self.step += 1

    def close(self) -> None:
        for profiler in self.profilers:
            profiler.close()


def summary(folder: Path, rank: int = 0) -> dict[str, Any]:
    value = json.loads((folder / summary_name(rank)).read_text())
    assert isinstance(value, dict)
    return value


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / PROFILE_DIR).iterdir())


def test_a_request_survives_its_file(tmp_path: Path) -> None:
    assert ProfileRequest.read(tmp_path) is None
    request = ProfileRequest(3, 7, (0, 2), memory=True, token="x")
    request.write(tmp_path)
    assert ProfileRequest.read(tmp_path) == request
    ProfileRequest(3, 7).withdraw(tmp_path)  # another one: it stays
    assert ProfileRequest.read(tmp_path) == request
    request.withdraw(tmp_path)
    assert ProfileRequest.read(tmp_path) is None
    (tmp_path / PROFILE_FILE).write_text('{"first": 5, "last": 6}')
    assert ProfileRequest.read(tmp_path) == ProfileRequest(5, 6, (0,))


@pytest.mark.parametrize(
    "values",
    [
        {"first": 0, "last": 3},
        {"first": 4, "last": 3},
        {"first": 1, "last": 101},
        {"first": 1, "last": 2, "ranks": [0, 0]},
        {"first": 1, "last": 2, "ranks": [-1]},
        {"first": 1},
        {"first": 1, "last": 2, "speed": 3},
        {"first": "a", "last": 2},
        [1, 2],
    ],
)
def test_a_request_that_makes_no_sense_is_refused(values: Any, tmp_path: Path) -> None:
    (tmp_path / PROFILE_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"first|steps|ranks"):
        ProfileRequest.read(tmp_path)


def test_the_asked_steps_are_profiled_on_the_asked_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, world_size=3)
    ranks.train(3)
    ProfileRequest(6, 8, (1,), token="t").write(tmp_path)
    ranks.train(4)
    assert (tmp_path / PROFILE_FILE).exists()
    ranks.train(4)
    assert not (tmp_path / PROFILE_FILE).exists()
    ranks.close()
    assert folders(tmp_path) == ["steps-00006-00008"]
    folder = folder_of(tmp_path, "t")
    assert folder is not None
    assert folder.name == "steps-00006-00008"
    assert sorted(path.name for path in folder.iterdir()) == [
        "rank-001.json.gz", "rank-001.summary.json", "request.json",
    ]  # fmt: skip
    found = summary(folder, 1)
    assert (found["rank"], found["world_size"], found["device"]) == (1, 3, "cpu")
    assert found["steps"] == [6, 7, 8]
    # The three ranks share a thread here, and rank 1's steps hold a step of each.
    assert {row["name"]: row["calls"] for row in found["operators"]}["aten::mm"] == 9
    assert found["phases"]["forward"]["host_ms"] > 0
    assert found["unprofiled_step_ms"] > 0
    trace = json.loads(gzip.decompress((folder / trace_name(1)).read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 6", "step 7", "step 8", "phase: forward", "aten::mm"} <= names
    assert not any(phases.annotate for phases in ranks.phases)


def test_steps_that_are_past_become_as_many_from_now_on(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.train(10)
    for token in ("a", "b"):
        ProfileRequest(4, 5, token=token).write(tmp_path)
        ranks.train(4)
    ranks.close()
    assert folders(tmp_path) == ["steps-00012-00013", "steps-00016-00017"]
    assert summary(tmp_path / PROFILE_DIR / "steps-00016-00017")["steps"] == [16, 17]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    for token in ("a", "b"):
        ranks = Ranks(tmp_path)
        ProfileRequest(3, 3, token=token).write(tmp_path)
        ranks.train(5)
        ranks.close()
    assert folders(tmp_path) == ["steps-00003-00003", "steps-00003-00003-2"]
    assert folder_of(tmp_path, "b") == tmp_path / PROFILE_DIR / "steps-00003-00003-2"


def test_a_run_that_ends_in_the_middle_leaves_what_there_is(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ProfileRequest(3, 9, token="t", memory=True).write(tmp_path)
    ranks.train(5)
    ranks.close()
    found = summary(tmp_path / PROFILE_DIR / "steps-00003-00009")
    assert found["steps"] == [3, 4, 5]
    assert found["memory"]["cpu"]["peak_bytes"] > 0
    assert not (tmp_path / PROFILE_FILE).exists()


def test_after_an_error_the_next_ranks_answer_anew(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ProfileRequest(3, 5, token="t").write(tmp_path)
    ranks.train(4)

    def fail() -> None:
        with closing(ranks):
            raise ConnectionError("a rank died")

    with pytest.raises(ConnectionError):
        fail()
    assert summary(tmp_path / PROFILE_DIR / "steps-00003-00005")["steps"] == [3, 4]
    later = Ranks(tmp_path)
    later.train(6)
    later.close()
    assert folder_of(tmp_path, "t") == tmp_path / PROFILE_DIR / "steps-00003-00005-2"
    assert summary(tmp_path / PROFILE_DIR / "steps-00003-00005-2")["steps"] == [3, 4, 5]
    assert not (tmp_path / PROFILE_FILE).exists()


def test_a_withdrawn_request_is_forgotten(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    request = ProfileRequest(5, 6)
    request.write(tmp_path)
    ranks.train(3)
    request.withdraw(tmp_path)
    ranks.train(5)
    ranks.close()
    assert not (tmp_path / PROFILE_DIR).exists()


def test_nonsense_is_told_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(tmp_path)
    (tmp_path / PROFILE_FILE).write_text("{")
    ranks.train(3)
    assert not (tmp_path / PROFILE_FILE).exists()
    assert "profile.json" in caplog.text


def test_a_profiler_that_fails_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no counters on this machine")

    monkeypatch.setattr("torch.profiler.profile", fail)
    ranks = Ranks(tmp_path)
    ProfileRequest(3, 4, token="t").write(tmp_path)
    with caplog.at_level(logging.INFO):
        ranks.train(6)
    ranks.close()
    assert ranks.step == 6
    assert "no counters on this machine" in caplog.text
    assert "error" in summary(tmp_path / PROFILE_DIR / "steps-00003-00004")
    assert not (tmp_path / PROFILE_FILE).exists()


def test_a_trace_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.profile.gzip.open", fail)
    ranks = Ranks(tmp_path)
    ProfileRequest(2, 2, token="t").write(tmp_path)
    ranks.train(4)
    ranks.close()
    assert "No space left" in summary(tmp_path / PROFILE_DIR / "steps-00002-00002")["error"]
