"""A model in words: what a list, a paper's sentence and its references say."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from model import description
from model.config import ModelConfig
from model.presets import Kind


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"preset": "tiny"}, "4+4 layers, width 128, 4 heads, pre-norm"),
        ({"preset": "B-d_k-16"}, "6+6 layers, width 512, 8 heads, post-norm, d_k 16"),
        (
            {"preset": "tiny", "d_v": 8, "attention": "general", "local_radius": 0},
            "4+4 layers, width 128, 4 heads, pre-norm, d_v 8, general attention, "
            "self-attention within 0",
        ),
        (
            {"kind": "lstm", "preset": "tiny", "encoder_layers": 2, "decoder_layers": 2},
            "LSTM, 2+2 layers, width 128, additive attention",
        ),
        (
            {
                "kind": "convolutional",
                "d_model": 128,
                "encoder_layers": 4,
                "decoder_layers": 4,
                "kernel_size": 5,
            },
            "convolutional, 4+4 layers, width 128, kernel 5, scaled_dot attention",
        ),
    ],
)
def test_a_line_says_the_shape_and_what_is_unusual(settings: dict[str, Any], expected: str) -> None:
    assert description.line(ModelConfig.model_validate(settings)) == expected


def test_a_sentence_says_all_that_differs_from_the_paper() -> None:
    plain = description.sentence(ModelConfig(preset="base"))
    assert plain == (
        "a Transformer (Vaswani et al., 2017) with 6 encoder and 6 decoder layers, width 512, "
        "8 attention heads, feed-forward layers of width 2048, layer normalisation after each "
        "sub-layer, sinusoidal positions, one matrix for both embeddings and the softmax, and "
        "dropout of 0.1"
    )
    other = description.sentence(
        ModelConfig(
            preset="base",
            d_k=16,
            d_v=24,
            attention="additive",
            local_radius=4,
            positions="learned",
            tie_embeddings=False,
            norm="pre",
            attention_dropout=0.2,
        )
    )
    for part in (
        "keys of width 16 a head",
        "values of width 24 a head",
        "additive attention (Bahdanau et al., 2015)",
        "self-attention within 4 positions",
        "layer normalisation before each sub-layer",
        "learned positions",
        "separate embeddings and softmax",
        "dropout of 0.1, attention dropout of 0.2",
    ):
        assert part in other
        assert part not in plain


@pytest.mark.parametrize("kind", get_args(Kind))
def test_only_the_transformers_scaled_dot_product_goes_without_saying(kind: Kind) -> None:
    said = description.sentence(ModelConfig(kind=kind))
    assert ("scaled dot-product attention (Vaswani et al., 2017)" in said) == (
        kind != "transformer"
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_is_said_is_cited_once(kind: Kind) -> None:
    for attention in ("scaled_dot", "dot", "general", "additive"):
        config = ModelConfig.model_validate({"kind": kind, "attention": attention})
        said, cited = description.sentence(config), description.references(config)
        assert len(set(cited)) == len(cited)
        for name, title in {
            "Vaswani et al.": "Attention Is All You Need",
            "Bahdanau et al.": "Jointly Learning to Align",
            "Luong et al.": "Effective Approaches",
            "Gehring et al.": "Convolutional Sequence",
        }.items():
            if name in said:
                assert any(title in reference for reference in cited), name
