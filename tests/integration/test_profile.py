"""A profile of the real loop: what it leaves, and that the training does not notice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cluster.naming import write_config
from cluster.profile import collect, for_profiling
from cluster.profile_table import profile_text
from data_shards.shards import prepare
from tests.ranks import Job, run_ranks
from tests.runs import make_config
from trainer.config import RunConfig
from trainer.profile import PROFILE_FILE, ProfileRequest, folder_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    made = make_config(tmp_path_factory.mktemp("corpus"))
    changes = {"metrics_port": 0, "threads": 1, "log_every": 1, "warmup_steps": 10}
    made = made.model_copy(
        update={
            "trainer": made.trainer.model_copy(update=changes),
            "model": made.model.model_copy(update={"dropout": 0.1}),
        }
    )
    prepare(made.data)
    return for_profiling(made, 3)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [(event["loss"], event["grad_norm"]) for event in events if event["event"] == "step"]


def test_steps_2_to_3_of_a_real_loop(config: RunConfig, tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    for run_dir in (plain, profiled):
        write_config(config, run_dir)
    ProfileRequest(2, 3, token="t", memory=True).write(profiled)
    jobs = [Job(config, plain), Job(config, profiled)]
    assert run_ranks(1, jobs) == ["max_steps", "max_steps"]

    # Bitwise: the profile is no part of the run.
    assert len(losses(plain)) == 4
    assert losses(profiled) == losses(plain)
    assert not (profiled / PROFILE_FILE).exists()

    folder = folder_of(profiled, "t")
    assert folder == profiled / "profile" / "steps-00002-00003"
    trace = json.loads(gzip.decompress((folder / "rank-000.json.gz").read_bytes()))
    spans = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in spans)
    names = {event["name"] for event in spans}
    assert {"step 2", "step 3", "phase: forward", "phase: backward", "aten::addmm"} <= names

    result = collect(folder)
    [rank] = result["ranks"]
    assert result["steps"] == rank["steps"] == [2, 3]
    host = {name: phase["host_ms"] for name, phase in rank["phases"].items()}
    assert sum(host.values()) == pytest.approx(sum(rank["step_ms"]), rel=1e-3)
    assert min(host["forward"], host["backward"], host["optimizer"]) > 0
    assert 0 <= host["other"] < 0.5 * rank["total_ms"]
    assert {"aten::addmm", "aten::mm"} <= {row["name"] for row in rank["operators"]}
    assert 0 < rank["in_operators_ms"] < rank["total_ms"]
    assert rank["memory"]["cpu"]["peak_bytes"] > 0

    # The run's own counts of the same steps.
    steps = [json.loads(line) for line in (profiled / "events.jsonl").read_text().splitlines()]
    totals = {e["step"]: e for e in steps if e["event"] == "step"}
    work = result["work"]
    assert rank["target_tokens"] == work["target_tokens"]
    assert work["target_tokens"] == totals[3]["target_tokens"] - totals[1]["target_tokens"]
    assert work["flops"] == pytest.approx(totals[3]["flops"] - totals[1]["flops"], rel=1e-6)
    counts = work["counts"]
    assert counts["torch"] >= counts["cost"]
    assert counts["deepspeed_ratio"] == pytest.approx(1, abs=0.05)

    text = profile_text(result)
    for part in ("forward", "aten::", "tokens/s", "PyTorch's counter", "ui.perfetto.dev"):
        assert part in text
