"""The trainer on real ranks: the same curve at every size, exact resume, every ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.shards import prepare
from tests.ranks import Job, run_ranks
from trainer.checkpoint import Checkpoints
from trainer.config import RecoveryConfig, RunConfig, parse_config
from trainer.control import HELD_FILE, HOLD_FILE
from trainer.run import load_model

pytestmark = pytest.mark.timeout(600)


def make_config(data_root: Path, **trainer: Any) -> RunConfig:
    model = trainer.pop("model", {})
    data = trainer.pop("data", {})
    recovery = trainer.pop("recovery", {})
    return parse_config(
        {
            "model": {
                "d_model": 32,
                "d_ff": 64,
                "num_heads": 4,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "dropout": 0.0,
                "norm": "pre",
                **model,
            },
            "data": {
                "corpus": "embedded",
                "embedded_pairs": 2000,
                "vocabulary_size": 300,
                "max_length": 64,
                "root": data_root,
                "lanes": 4,
                "tokens_per_step": 1024,
                **data,
            },
            "trainer": {
                "max_steps": 100,
                "warmup_steps": 50,
                "peak_learning_rate": 3e-3,
                "log_every": 1,
                "validate_every": 50,
                "checkpoint_every": 50,
                "metrics_port": 0,
                "threads": 1,
                **trainer,
            },
            "recovery": recovery,
        },
        where="test",
    )


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare(make_config(root).data)
    return root


def events(run_dir: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def checkpoints(run_dir: Path) -> Checkpoints:
    return Checkpoints.of(run_dir, RecoveryConfig())


def numbers(run_dir: Path, start: int = 1) -> list[tuple[Any, ...]]:
    """What must not depend on stops: the step, its loss, its gradient norm, its data."""
    return [
        (event["step"], event["loss"], event["grad_norm"], event["data_hash"])
        for event in events(run_dir)
        if event["step"] >= start
    ]


def test_the_curve_is_the_same_with_1_2_and_4_workers(data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root)
    for workers in (1, 2, 4):
        assert run_ranks(workers, [Job(config, tmp_path / f"w{workers}")]) == ["max_steps"]
    one, two, four = (events(tmp_path / f"w{workers}") for workers in (1, 2, 4))
    assert [event["step"] for event in one] == list(range(1, 101))
    for other in (two, four):
        assert [event["loss"] for event in other] == pytest.approx(
            [event["loss"] for event in one], rel=1e-4
        )
        assert [event["data_hash"] for event in other] == [event["data_hash"] for event in one]
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]


def test_the_curve_with_dropout_is_the_same_at_other_sizes(data_root: Path, tmp_path: Path) -> None:
    """The masks belong to the lane, not to the rank; three ranks do not divide four lanes."""
    config = make_config(data_root, max_steps=20, model={"dropout": 0.3})
    for workers in (1, 3):
        run_ranks(workers, [Job(config, tmp_path / f"w{workers}")])
    one, three = (events(tmp_path / f"w{workers}") for workers in (1, 3))
    assert [event["loss"] for event in three] == pytest.approx(
        [event["loss"] for event in one], rel=1e-4
    )


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    data_root: Path, tmp_path: Path
) -> None:
    """Stopped at 57 of 100, fp32, dropout on; and early in training for the other stages."""
    jobs, cases = [], []
    for stage, stop, end in ((1, 57, 100), (0, 7, 12), (2, 7, 12), (3, 7, 12)):
        whole = make_config(
            data_root, zero_stage=stage, max_steps=end, model={"dropout": 0.1}, threads=1
        )
        part = whole.model_copy(
            update={"trainer": whole.trainer.model_copy(update={"max_steps": stop})}
        )
        one, other = tmp_path / f"whole{stage}", tmp_path / f"parts{stage}"
        jobs += [Job(whole, one), Job(part, other), Job(whole, other, resume=True)]
        cases.append((one, other, stop, end))
    assert set(run_ranks(2, jobs)) == {"max_steps"}
    stages = [numbers(one)[:12] for one, *_ in cases]
    for other_stage in stages[1:]:
        assert [row[:3] for row in other_stage] == [
            pytest.approx(row[:3], rel=1e-4) for row in stages[0]
        ]
    for one, other, stop, end in cases:
        assert [event["step"] for event in events(other)] == list(range(1, end + 1))
        assert events(other, "resumed")[0]["step"] == stop
        assert numbers(other) == numbers(one)


def test_bf16_learns_at_every_stage_and_weights_are_saved_in_full(
    data_root: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    jobs = [
        Job(
            make_config(data_root, precision="bf16", zero_stage=stage, max_steps=60, ema_decay=0.9),
            tmp_path / f"z{stage}",
        )
        for stage in (0, 1, 2, 3)
    ]
    run_ranks(2, jobs)
    for job in jobs:
        losses = [event["loss"] for event in events(job.run_dir)]
        assert losses[-1] < 0.85 * losses[0]
        weights = load_file(checkpoints(job.run_dir).weights(60))
        # Masters, not their rounded copies: some value is not representable in bfloat16.
        assert any((value != value.bfloat16().float()).any() for value in weights.values())
        assert losses[-1] == pytest.approx(events(jobs[0].run_dir)[-1]["loss"], rel=0.02)
        # The moving average is a model of its own, near the last one.
        (job.run_dir / "config.json").write_text(job.config.to_json())
        last = load_model(job.run_dir, "last").model.state_dict()
        average = load_model(job.run_dir, "ema").model.state_dict()
        apart = {name: average[name] - weight for name, weight in last.items()}
        assert all(difference.any() for difference in apart.values())
        distance, size = (
            float(torch.cat([part.flatten() for part in parts.values()]).norm())
            for parts in (apart, last)
        )
        assert distance < 0.1 * size


def test_numbers_gone_wrong_end_the_run_where_there_is_nothing_to_go_back_to(
    data_root: Path, tmp_path: Path
) -> None:
    good = make_config(data_root, max_steps=5, checkpoint_every=5)
    bad = make_config(
        data_root,
        max_steps=40,
        checkpoint_every=1,
        peak_learning_rate=1e30,
        recovery={"max_skipped": 3, "then": "stop"},
    )
    outcomes = run_ranks(2, [Job(good, tmp_path / "run"), Job(bad, tmp_path / "run", resume=True)])
    assert outcomes[0] == "max_steps"
    assert outcomes[1].startswith("RunFailedError: 3 steps in a row")
    assert "No update was made with them" in outcomes[1]
    skipped = events(tmp_path / "run", "skipped")
    assert [event["step"] for event in skipped] == list(
        range(skipped[0]["step"], skipped[0]["step"] + 3)
    )
    assert {event["reason"] for event in skipped} <= {"loss_not_finite", "gradient_not_finite"}
    assert all(sum(map(len, event["pairs"].values())) > 0 for event in skipped)


def test_one_run_at_2_1_3_and_2_workers_is_the_run_at_2(data_root: Path, tmp_path: Path) -> None:
    """Also across ZeRO stages: the checkpoint knows neither."""
    whole = make_config(data_root, max_steps=60)
    run_ranks(2, [Job(whole, tmp_path / "whole")])
    for workers, end, stage in ((2, 15, 1), (1, 30, 2), (3, 45, 3), (2, 60, 0)):
        part = make_config(data_root, max_steps=end, zero_stage=stage)
        assert run_ranks(workers, [Job(part, tmp_path / "parts", resume=True)]) == ["max_steps"]
    one, other = events(tmp_path / "whole"), events(tmp_path / "parts")
    assert [event["step"] for event in other] == list(range(1, 61))
    assert [event["world_size"] for event in other][::15] == [2, 1, 3, 2]
    assert [event["loss"] for event in other] == pytest.approx(
        [event["loss"] for event in one], rel=1e-4
    )
    assert [event["data_hash"] for event in other] == [event["data_hash"] for event in one]


def test_a_damaged_checkpoint_is_passed_over_and_another_model_refused(
    data_root: Path, tmp_path: Path
) -> None:
    config = make_config(data_root, max_steps=6, checkpoint_every=2, keep_checkpoints=2)
    run_dir = tmp_path / "run"
    run_ranks(2, [Job(config, run_dir)])
    # Two newest and, when it is another one, the best are kept; the last step validates.
    steps = checkpoints(run_dir).committed()
    assert steps[-1] == 6
    assert len(steps) == 2
    weights = checkpoints(run_dir).weights(6)
    weights.write_bytes(weights.read_bytes()[:-7])
    further = make_config(data_root, max_steps=8, checkpoint_every=2)
    other = make_config(data_root, max_steps=8, model={"d_ff": 128})
    shutil.copytree(run_dir, tmp_path / "other")
    outcomes = run_ranks(
        2, [Job(further, run_dir, resume=True), Job(other, tmp_path / "other", resume=True)]
    )
    assert outcomes[0] == "max_steps"
    [resumed] = events(run_dir, "resumed")
    assert resumed["step"] == steps[0]
    assert "model.safetensors" in resumed["passed_over"]["6"][0]
    assert "model.d_ff was 64, is 128" in outcomes[1]
    assert "start a run under another name" in outcomes[1]


def poisoned(config: RunConfig, run_dir: Path, **place: Any) -> str:
    """Trains; rank 1's losses of some steps are not numbers, as those in ``poison.json`` say."""
    from trainer.attempt import train
    from trainer.loop import Loop
    from trainer.rank import Rank

    steps = json.loads((run_dir.parent / "poison.json").read_text())
    accumulate, loss_of = Loop._accumulate, Rank.loss

    def note_step(self: Loop, batches: Any, *arguments: Any) -> Any:
        self.rank.poisoned = place["rank"] == 1 and batches.step + 1 in steps  # type: ignore[attr-defined]
        return accumulate(self, batches, *arguments)

    def poison(self: Rank, *batch: Any) -> Any:
        loss, nll = loss_of(self, *batch)
        return (loss * float("nan"), nll) if getattr(self, "poisoned", False) else (loss, nll)

    Loop._accumulate, Rank.loss = note_step, poison  # type: ignore[method-assign]
    try:
        return train(config, run_dir, **place)
    finally:
        Loop._accumulate, Rank.loss = accumulate, loss_of  # type: ignore[method-assign]


def test_a_poisoned_step_is_skipped_on_all_ranks_and_a_series_leads_back(
    data_root: Path, tmp_path: Path
) -> None:
    config = make_config(
        data_root, max_steps=24, checkpoint_every=4, validate_every=100, recovery={"max_skipped": 3}
    )
    (tmp_path / "poison.json").write_text(json.dumps([6, 14, 15, 16]))
    run_dir = tmp_path / "run"
    assert run_ranks(2, [Job(config, run_dir, train=poisoned)]) == ["max_steps"]
    skipped = events(run_dir, "skipped")
    assert [event["step"] for event in skipped] == [6, 14, 15, 16]
    assert {event["reason"] for event in skipped} == {"loss_not_finite"}
    plan = Plan.of(Manifest.load(config.data.folder()), config.data, config.trainer.seed)
    for event in skipped:
        assert event["lanes"] == [1, 3]  # rank 1's
        batches = plan.step(event["step"] - 1)
        assert event["pairs"] == {str(b.lane): b.pair_ids.tolist() for b in batches}
    [rewound] = events(run_dir, "rewound")
    assert (rewound["step"], rewound["to_step"]) == (16, 12)
    trained = events(run_dir)
    assert [event["step"] for event in trained] == [
        step for step in range(1, 25) if step not in {6, 14, 15, 16}
    ]
    assert all(event["loss"] is not None for event in trained)
    # The weights are those of step 12, the data goes on: with the run's own rate, the loss is as
    # near to that of step 13 as two batches are to one another.
    by_step = {event["step"]: event["loss"] for event in trained}
    assert by_step[17] == pytest.approx(by_step[13], rel=0.05)
    # What was skipped is in the hash, and in the checkpoint that a resume starts from.
    assert trained[-1]["data_hash"] == f"{sum(map(plan.data_hash, range(24))) % 2**64:016x}"
    with checkpoints(run_dir).open(24) as reader:
        assert reader.state["guard"]["skipped"] == 4
        assert reader.state["guard"]["rewinds"] == 1


def held_at_7(config: RunConfig, run_dir: Path, **place: Any) -> str:
    """Trains; somebody asks for a handover while step 7 is made."""
    from trainer.attempt import train
    from trainer.loop import Loop

    accumulate = Loop._accumulate

    def ask(self: Loop, batches: Any, *arguments: Any) -> Any:
        if batches.step + 1 == 7 and place["rank"] == 0:
            (run_dir / HOLD_FILE).touch()
        return accumulate(self, batches, *arguments)

    Loop._accumulate = ask  # type: ignore[method-assign]
    try:
        return train(config, run_dir, **place)
    finally:
        Loop._accumulate = accumulate  # type: ignore[method-assign]


def test_a_handover_saves_the_very_step_and_loses_none(data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root, max_steps=12)
    run_dir = tmp_path / "run"
    [outcome] = run_ranks(2, [Job(config, run_dir, train=held_at_7)])
    assert outcome.startswith("Handover: saved at step 7")
    assert json.loads((run_dir / HELD_FILE).read_text()) == {"step": 7}
    assert checkpoints(run_dir).committed() == [7]
    assert run_ranks(1, [Job(config, run_dir, resume=True)]) == ["max_steps"]
    assert [event["step"] for event in events(run_dir)] == list(range(1, 13))
    assert not (run_dir / HOLD_FILE).exists()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_unasked(
    data_root: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_ranks(2, [Job(make_config(data_root, max_steps=2), run_dir)])
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    before = events(run_dir)
    [outcome] = run_ranks(2, [Job(make_config(data_root, max_steps=4), run_dir, resume=True)])
    assert outcome.startswith("RunFailedError: the run's log tells of checkpoints, the last of")
    assert "--overwrite" in outcome
    assert events(run_dir) == before


def test_early_stopping_and_the_clock_end_a_run_alike_on_all_ranks(
    data_root: Path, tmp_path: Path
) -> None:
    stale = make_config(
        data_root, max_steps=50, validate_every=1, patience=2, peak_learning_rate=3.0,
        warmup_steps=1,
    )  # fmt: skip
    timed = make_config(data_root, max_steps=None, max_minutes=0.1, decay_fraction=0.5)
    outcomes = run_ranks(2, [Job(stale, tmp_path / "stale"), Job(timed, tmp_path / "timed")])
    assert outcomes == ["early_stopping", "max_minutes"]
    rates = [event["learning_rate"] for event in events(tmp_path / "timed")]
    assert rates[-1] < 0.1 * max(rates)
    assert events(tmp_path / "timed", "finished")[0]["elapsed_s"] < 12


def test_a_truncated_shard_is_named(data_root: Path, tmp_path: Path) -> None:
    config = make_config(data_root, max_steps=30)
    folder = config.data.folder()
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    shard = Path(Manifest.load(broken).shard_path(0))
    shard.write_bytes(shard.read_bytes()[:3000])
    moved = config.model_copy(update={"data": config.data.model_copy(update={"dir": broken})})
    [outcome] = run_ranks(1, [Job(moved, tmp_path / "run")])
    assert outcome.startswith("DataError")
    assert shard.name in outcome
