"""What a model may be: each rule and what its breach is told; sizes of the paper's rows."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from model.build import build
from model.config import ModelConfig
from model.presets import PRESETS, Kind
from model.size import num_parameters


def _refusal(**settings: Any) -> str:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate(settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"preset": "bsae"}, "transformer has no preset 'bsae'; did you mean base? known: tiny,"),
        ({"kind": "gru", "preset": "big"}, "gru has no preset 'big'; known: tiny, base"),
        ({"preset": "B-dk-16"}, "did you mean B-d_k-16?"),
    ],
)
def test_an_unknown_preset_is_told_with_what_may_be_meant(
    settings: dict[str, Any], told: str
) -> None:
    assert told in _refusal(**settings)


def test_an_unknown_kind_is_told_whatever_the_preset() -> None:
    message = _refusal(kind="attentive", preset="tiny")
    assert "kind" in message
    assert "'transformer', 'rnn', 'lstm', 'gru' or 'convolutional'" in message


@pytest.mark.parametrize(
    ("kind", "field", "value", "of"),
    [
        ("lstm", "d_ff", 64, "transformer"),
        ("rnn", "num_heads", 4, "transformer"),
        ("gru", "local_radius", 3, "transformer"),
        ("convolutional", "d_k", 16, "transformer"),
        ("convolutional", "norm", "pre", "transformer"),
        ("gru", "positions", "learned", "transformer or convolutional"),
        ("transformer", "kernel_size", 5, "convolutional"),
    ],
)
def test_a_field_of_another_kind_is_refused(kind: str, field: str, value: object, of: str) -> None:
    message = _refusal(kind=kind, **{field: value})
    assert f"model.{field} is of kind {of}; {kind} has none: leave it out" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": ["tiny"]},
        {"preset": {"a": 1}},
        {"preset": 5},
        {"preset": "tiny", "kind": ["x"]},
        {"preset": "tiny", "kind": {}},
    ],
)
def test_a_preset_or_kind_that_is_no_word_is_told_as_such(settings: dict[str, Any]) -> None:
    wrong = "kind" if "kind" in settings else "preset"
    message = _refusal(**settings)
    assert f"\n{wrong}\n" in message
    assert "Input should be" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "lstm", "d_model": 100},
        {"kind": "rnn", "d_model": 33},
        {"kind": "convolutional", "d_model": 100},
        {"kind": "convolutional", "d_model": 33, "positions": "learned"},
        {"d_model": 33, "num_heads": 3, "positions": "learned"},
    ],
)
def test_a_width_need_only_suit_what_the_model_has(settings: dict[str, Any]) -> None:
    model = build(ModelConfig(encoder_layers=1, decoder_layers=1, **settings), 16)
    ids = torch.randint(4, 16, (2, 3))
    loss, _ = model.training_loss(ids, ids, ids, 0.1)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("missing", [{}, {"d_k": 16}, {"d_v": 16}])
def test_heads_that_do_not_divide_the_width_need_both_widths(missing: dict[str, int]) -> None:
    message = _refusal(d_model=512, num_heads=6, **missing)
    assert "d_model 512 is not divisible by num_heads 6" in message
    assert "give d_k and d_v" in message
    config = ModelConfig(d_model=512, num_heads=6, d_k=16, d_v=32)
    assert (config.key_width, config.value_width) == (16, 32)


def test_widths_of_heads_follow_the_model_unless_given() -> None:
    config = ModelConfig(d_model=512, num_heads=8, d_k=16)
    assert (config.key_width, config.value_width) == (16, 64)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "convolutional", "kernel_size": 4}, "kernel_size must be odd"),
        ({"d_model": 33, "num_heads": 3}, "d_model must be even"),
        ({"kind": "convolutional", "d_model": 33}, "d_model must be even"),
        ({"d_modle": 32}, "d_modle"),
        ({"attention": "dotted"}, "'scaled_dot', 'dot', 'general' or 'additive'"),
        ({"local_radius": -1}, "greater than or equal to 0"),
    ],
)
def test_other_rules(settings: dict[str, Any], told: str) -> None:
    assert told in _refusal(**settings)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_preset_is_a_valid_model_that_gives_way_to_what_is_said(kind: Kind) -> None:
    assert {"tiny", "base"} <= set(PRESETS[kind])
    for name in PRESETS[kind]:
        config = ModelConfig(kind=kind, preset=name)
        assert ModelConfig.model_validate(config.model_dump()) == config
        assert ModelConfig(kind=kind, preset=name, dropout=0.35).dropout == 0.35


# Table 3, in millions; rows that change no parameter are base's 65.
PUBLISHED = {
    "base": 65, "B-d_k-16": 58, "B-d_k-32": 60, "C-2-layers": 36, "C-4-layers": 50,
    "C-8-layers": 80, "C-d_model-256": 28, "C-d_model-1024": 168, "C-d_ff-1024": 53,
    "C-d_ff-4096": 90, "big": 213,
}  # fmt: skip


def test_narrow_keys_take_as_many_parameters_away_as_they_are_narrower() -> None:
    # 18 attentions; queries and keys of 8 heads, with biases.
    base = num_parameters(ModelConfig(preset="base"), 37_000)
    for width in (16, 32):
        narrow = num_parameters(ModelConfig(preset=f"B-d_k-{width}"), 37_000)
        assert base - narrow == 18 * 2 * (512 + 1) * 8 * (64 - width)
        difference = PUBLISHED["base"] - PUBLISHED[f"B-d_k-{width}"]
        assert round((base - narrow) / 1e6) in {difference, difference - 1, difference + 1}
