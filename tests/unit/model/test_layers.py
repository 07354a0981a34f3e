"""Positions, the vocabulary matrix, and where parameters are used."""

from __future__ import annotations

import math

import pytest
import torch

from model.config import ModelConfig
from model.layers import FeedForward, Positions
from model.vocabulary_matrix import VocabularyMatrix


def _positions(**settings: object) -> Positions:
    values = {"d_model": 16, "num_heads": 2, "dropout": 0.0, **settings}
    return Positions(ModelConfig.model_validate(values))


@pytest.mark.parametrize("length", [1, 40, 700])
def test_sinusoids_follow_section_3_5(length: int) -> None:
    d_model = 16
    output = _positions()(torch.zeros(1, length, d_model))[0]
    for position in {0, 1, length // 2, length - 1}:
        if position >= length:
            continue
        for i in range(d_model // 2):
            angle = position / 10000 ** (2 * i / d_model)
            assert output[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert output[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_embeddings_are_scaled_before_positions_are_added(kind: str) -> None:
    positions = _positions(positions=kind)
    embedded = torch.randn(2, 5, 16)
    plain = positions(torch.zeros(2, 5, 16))
    torch.testing.assert_close(positions(embedded), plain + 4.0 * embedded)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_a_later_first_position_gives_the_same_vectors(kind: str) -> None:
    positions = _positions(positions=kind)
    whole = positions(torch.zeros(1, 9, 16))
    assert torch.equal(positions(torch.zeros(1, 3, 16), 6), whole[:, 6:])


def test_beyond_learned_positions_the_message_says_the_mend() -> None:
    positions = _positions(positions="learned", max_positions=8)
    positions(torch.zeros(1, 8, 16))
    with pytest.raises(ValueError, match=r"sequence of 9 pieces .* 8 .*model\.max_positions"):
        positions(torch.zeros(1, 9, 16))


def test_tables_made_while_decoding_serve_training() -> None:
    positions = _positions(max_positions=3000)
    with torch.inference_mode():
        positions(torch.zeros(1, 2900, 16))
    embedded = torch.zeros(1, 2900, 16, requires_grad=True)
    positions(embedded).sum().backward()
    assert embedded.grad is not None


def test_the_vocabulary_matrix_embeds_and_projects_by_its_rows() -> None:
    matrix = VocabularyMatrix(11, 6)
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(matrix(ids, "embed"), matrix.weight[ids])
    states = torch.randn(2, 5, 6)
    expected = torch.einsum("bld,vd->blv", states, matrix.weight)
    torch.testing.assert_close(matrix(states, "project"), expected)


def test_the_embedding_starts_with_the_deviation_that_the_softmax_needs() -> None:
    torch.manual_seed(0)
    weight = VocabularyMatrix(4000, 64).weight.detach()
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.01)


def test_feed_forward_is_two_maps_with_a_rectifier() -> None:
    layer = FeedForward(ModelConfig(d_model=8, d_ff=12, num_heads=2))
    inputs = torch.randn(3, 4, 8)
    inner = (inputs @ layer.inner.weight.T + layer.inner.bias).clamp(min=0)
    torch.testing.assert_close(layer(inputs), inner @ layer.outer.weight.T + layer.outer.bias)
