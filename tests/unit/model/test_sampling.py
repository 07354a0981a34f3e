"""Samples follow the distribution they are drawn from, and depend on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.build import build
from model.config import ModelConfig
from model.sampling import draw, truncated, uniforms
from model.search import BOS_ID, EOS_ID, Hypothesis, SearchOptions, search
from model.transformer import Transformer

# The chi-square distribution's 99.9th percentile at 8 degrees of freedom.
_CHI_SQUARE_999 = 26.12


def _model(vocab: int = 12) -> Transformer:
    torch.manual_seed(4)
    config = ModelConfig(d_model=16, d_ff=24, num_heads=2, encoder_layers=1, decoder_layers=1)
    return build(config, vocab).eval()


def _first_probs(model: Transformer, source: Tensor, temperature: float) -> Tensor:
    """The distribution of the first piece over what may be written."""
    with torch.no_grad():
        logits_V = model.project(model(source, torch.tensor([[BOS_ID]])))[0, 0]
    logits_V[[0, BOS_ID, 3]] = -math.inf
    return (logits_V / temperature).softmax(0)


def _samples(model: Transformer, source: Tensor, **settings: Any) -> list[Hypothesis]:
    options = SearchOptions(method="sample", max_extra_length=4, **settings)
    return search([model], source, options)[0]


def _first_counts(found: list[Hypothesis], vocab: int) -> Tensor:
    firsts = torch.tensor([hypothesis.ids[0] if hypothesis.ids else EOS_ID for hypothesis in found])
    return torch.bincount(firsts, minlength=vocab).double()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_first_pieces_are_as_frequent_as_they_are_probable(temperature: float) -> None:
    model, source = _model(), torch.tensor([[5, 7, 9, EOS_ID]])
    found = _samples(model, source, num_best=3000, temperature=temperature)
    expected = _first_probs(model, source, temperature).double() * 3000
    counts = _first_counts(found, 12)
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # 12 pieces without PAD, BOS and UNK.
    assert int(possible.sum()) == 9
    assert float(statistic) < _CHI_SQUARE_999


def test_a_whole_translation_is_as_frequent_as_it_is_probable() -> None:
    model, source = _model(), torch.tensor([[5, 7, EOS_ID]])
    found = _samples(model, source, num_best=4000, top_k=2)
    # With two pieces to choose from at each step: what was drawn often, against the truth.
    counts: dict[tuple[int, ...], int] = {}
    for hypothesis in found:
        counts[tuple(hypothesis.ids)] = counts.get(tuple(hypothesis.ids), 0) + 1
    for ids, count in sorted(counts.items(), key=lambda item: -item[1])[:5]:
        probability = 1.0
        for place, piece in enumerate([*ids, EOS_ID]):
            if place + 1 == 7:
                break  # there it was made to end
            with torch.no_grad():
                states = model(source, torch.tensor([[BOS_ID, *ids[:place]]]))
            logits_V = model.project(states)[0, -1].detach()
            logits_V[[0, BOS_ID, 3]] = -math.inf
            probability *= float(truncated(logits_V[None], 2, 1.0)[0].softmax(0)[piece])
        deviation = math.sqrt(4000 * probability * (1 - probability))
        assert abs(count - 4000 * probability) < 4 * deviation


def test_samples_depend_on_seed_key_and_place_only() -> None:
    model = _model()
    source = torch.tensor([[5, 7, 9, EOS_ID], [6, 4, EOS_ID, 0], [5, 7, 9, EOS_ID]])
    options = SearchOptions(method="sample", num_best=5, max_extra_length=4)
    together = search([model], source, options, keys=[10, 20, 30])
    backwards = search([model], source.flip(0), options, keys=[30, 20, 10])[::-1]
    assert [[h.ids for h in one] for one in together] == [[h.ids for h in one] for one in backwards]
    (alone,) = search([model], source[1:2, :3], options, keys=[20])
    assert [h.ids for h in alone] == [h.ids for h in together[1]]
    # Fewer of them are among them; the same sentence under another key is drawn anew.
    fewer = SearchOptions(method="sample", num_best=3, max_extra_length=4)
    (some,) = search([model], source[:1], fewer, keys=[10])
    assert {tuple(h.ids) for h in some} <= {tuple(h.ids) for h in together[0]}
    assert [h.ids for h in together[0]] != [h.ids for h in together[2]]
    reseeded = SearchOptions(method="sample", num_best=5, max_extra_length=4, seed=2)
    assert search([model], source, reseeded, keys=[10, 20, 30]) != together


def test_a_samples_log_probability_is_the_models() -> None:
    model, source = _model(), torch.tensor([[5, 7, 9, EOS_ID]])
    for hypothesis in _samples(model, source, num_best=6, temperature=3.0, top_k=4):
        out = [*hypothesis.ids, EOS_ID]
        with torch.no_grad():
            states = model(source, torch.tensor([[BOS_ID, *hypothesis.ids]]))
            log_probs = model.project(states)[0].log_softmax(-1)
        assert hypothesis.log_prob == pytest.approx(
            float(log_probs[range(len(out)), out].sum()), abs=1e-4
        )


def test_a_single_piece_to_choose_from_is_greedy() -> None:
    model, source = _model(), torch.tensor([[5, 7, 9, EOS_ID], [4, EOS_ID, 0, 0]])
    greedy = search([model], source, SearchOptions(method="greedy", max_extra_length=4))
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}):
        options = SearchOptions(method="sample", max_extra_length=4, **settings)
        found = search([model], source, options)
        assert [h[0].ids for h in found] == [h[0].ids for h in greedy]


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9, unique=True),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1.0),
)
def test_truncation_keeps_the_smallest_sufficient_set(
    logits: list[float], top_k: int, top_p: float
) -> None:
    kept = (truncated(torch.tensor([logits]), top_k, top_p)[0] > -math.inf).nonzero()[:, 0].tolist()
    order = sorted(range(len(logits)), key=lambda index: -logits[index])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(logits[index]) for index in order]
    # The most probable, as many as kept: together enough, and without the last too little.
    assert sorted(kept) == sorted(order[: len(kept)])
    share = sum(weights[: len(kept)]) / sum(weights)
    assert share >= top_p - 1e-6
    assert sum(weights[: len(kept) - 1]) / sum(weights) < top_p + 1e-6


@given(st.integers(0, 2**31 - 1), st.floats(0, 1, exclude_max=True))
def test_an_impossible_piece_is_never_drawn(seed: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 20, generator=generator) * 10
    banned = torch.rand(1, 20, generator=generator) < 0.6
    banned[0, int(torch.randint(20, (), generator=generator))] = False
    logits[banned] = -math.inf
    for number in (uniform, 0.0, 1 - 2**-53):
        drawn = draw(logits, torch.tensor([number], dtype=torch.float64))
        assert not bool(banned[0, drawn[0]])


def test_uniforms_differ_by_every_number() -> None:
    assert torch.equal(uniforms(1, 2, 3, 8), uniforms(1, 2, 3, 8))
    assert torch.equal(uniforms(1, 2, 3, 8)[:4], uniforms(1, 2, 3, 4))
    others = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]
    assert len({tuple(uniforms(*numbers, 4).tolist()) for numbers in others}) == 5
