"""The papers' formulas by hand, and what stopping early rests on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.scoring import CoverageRule, LengthRule, coverage_score, length_score

RULES: list[LengthRule] = ["wu", "average", "reward"]


def test_length_rules_by_hand() -> None:
    # (5 + 7) / 6 = 2.
    assert length_score(-6.0, 7, "wu", 1.0) == pytest.approx(-3.0)
    assert length_score(-6.0, 7, "wu", 2.0) == pytest.approx(-1.5)
    assert length_score(-6.0, 4, "average", 1.0) == pytest.approx(-1.5)
    assert length_score(-6.0, 4, "average", 0.5) == pytest.approx(-3.0)
    assert length_score(-6.0, 4, "reward", 0.5) == pytest.approx(-4.0)
    for rule in RULES:
        assert length_score(-6.0, 4, rule, 0.0) == -6.0


@given(
    st.sampled_from(RULES),
    st.floats(-1e3, 0),
    st.integers(1, 500),
    st.integers(0, 500),
    st.floats(0, 10),
)
def test_no_score_falls_with_the_length_alone(
    rule: LengthRule, log_prob: float, length: int, more: int, strength: float
) -> None:
    shorter = length_score(log_prob, length, rule, strength)
    assert length_score(log_prob, length + more, rule, strength) >= shorter


def test_coverage_rules_by_hand() -> None:
    coverage = torch.tensor([[0.5, 1.0, 2.5, 0.0], [0.25, 3.0, 0.5, 1.25]])
    keep = torch.tensor([[True, True, True, False], [True, True, True, True]])
    wu = coverage_score(coverage, keep, "wu", 2.0)
    assert wu.tolist() == pytest.approx([2 * math.log(0.5), 2 * (math.log(0.25) + math.log(0.5))])
    summary = coverage_score(coverage, keep, "summary", 2.0)
    assert summary.tolist() == pytest.approx([-3.0, -4.5])


@pytest.mark.parametrize("rule", ["wu", "summary"])
def test_coverage_is_finite_and_never_a_gain(rule: CoverageRule) -> None:
    coverage = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) * 3
    coverage[0] = 0.0
    scores = coverage_score(coverage, torch.ones(50, 6, dtype=torch.bool), rule, 0.7)
    assert bool(torch.isfinite(scores).all())
    assert float(scores.max()) <= 0
