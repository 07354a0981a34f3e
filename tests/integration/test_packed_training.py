"""Training on packed sequences: the curve of padded batches, at every size and ZeRO stage.

On a CPU, where a reference stands in for the variable-length kernel; all else is as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_training import data_root, events, make_config, numbers
from tests.ranks import Job, run_ranks

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

__all__ = ["data_root"]  # a fixture


def test_the_curve_is_that_of_padded_batches(data_root: Path, tmp_path: Path) -> None:
    padded = make_config(data_root, max_steps=15)
    together = make_config(data_root, max_steps=15, batches="packed")
    apart = make_config(data_root, max_steps=15, batches="packed", tokens_per_pass=1)
    jobs = {"padded": padded, "together": together, "apart": apart}
    run_ranks(1, [Job(config, tmp_path / name) for name, config in jobs.items()])
    one, *others = (events(tmp_path / name) for name in jobs)
    for other in others:
        assert [event["loss"] for event in other] == pytest.approx(
            [event["loss"] for event in one], rel=1e-4
        )
        assert [event["data_hash"] for event in other] == [event["data_hash"] for event in one]
        assert other[-1]["padding_efficiency"] == 1.0
    started = {name: events(tmp_path / name, "started")[0]["device_step"] for name in jobs}
    assert [started[name]["batches"] for name in jobs] == ["padded", "packed", "packed"]
    assert [started[name]["lanes_together"] for name in jobs] == [1, 97, 1]


def test_the_curve_with_dropout_is_the_same_at_other_sizes_and_stages(
    data_root: Path, tmp_path: Path
) -> None:
    """The masks belong to the lane; three ranks join two lanes, one and one of four."""
    cases = [(stage, tmp_path / f"stage{stage}") for stage in (0, 1, 2, 3)]
    jobs = [
        Job(
            make_config(
                data_root, max_steps=8, zero_stage=stage, batches="packed", model={"dropout": 0.3}
            ),
            folder,
        )
        for stage, folder in cases
    ]
    run_ranks(3, jobs)
    run_ranks(1, [Job(jobs[1].config, tmp_path / "alone")])
    expected = [event["loss"] for event in events(tmp_path / "alone")]
    for _, folder in cases:
        assert [event["loss"] for event in events(folder)] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    data_root: Path, tmp_path: Path
) -> None:
    whole = make_config(
        data_root, zero_stage=2, max_steps=9, batches="packed", model={"dropout": 0.1}
    )
    part = whole.model_copy(update={"trainer": whole.trainer.model_copy(update={"max_steps": 4})})
    one, other = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, [Job(whole, one), Job(part, other), Job(whole, other, resume=True)])
    assert numbers(one) == numbers(other)
    assert len(numbers(one)) == 9
