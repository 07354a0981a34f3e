"""Beam search against exhaustive search, against itself without caches, and its promises."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.search import BOS_ID, EOS_ID, Hypothesis, SearchOptions, best_pieces, search
from model.transformer import Transformer, build

VOCAB = 7


def _model(seed: int = 0, vocab: int = VOCAB, **settings: Any) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(
        d_model=16, d_ff=24, num_heads=2, encoder_layers=1, decoder_layers=2, **settings
    )
    model = build(config, vocab)
    # Sharper than at the start, so that sentences differ and end at various lengths.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def _sources(count: int, longest: int, vocab: int = VOCAB, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, vocab, (count, longest), generator=generator)
    for row in range(count):
        length = 1 + row % longest
        source[row, length - 1] = EOS_ID
        source[row, length:] = 0
    return source


def _log_prob(model: Transformer, source_S: Tensor, ids: list[int]) -> float:
    """The log-probability of a whole translation, in one uncached pass."""
    model.eval()
    target_in = torch.tensor([[BOS_ID, *ids]])
    with torch.no_grad():
        logits = model.project(model(source_S[None], target_in))[0]
    return float(logits.log_softmax(-1)[range(len(ids) + 1), [*ids, EOS_ID]].sum())


def _search(model: Transformer, source: Tensor, **settings: Any) -> list[list[Hypothesis]]:
    values = {"max_extra_length": 3, "allow_unknown": True, **settings}
    return search([model], source, SearchOptions(**values))


@pytest.mark.parametrize("exponent", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_wide_beam_finds_what_exhaustive_search_finds(norm: str, exponent: float) -> None:
    model = _model(norm=norm)
    source = torch.tensor([[5, 3, EOS_ID]])
    # Up to 3 pieces besides EOS: 1 + 4 + 16 + 64 translations.
    everything = [list(ids) for n in range(4) for ids in product([3, 4, 5, 6], repeat=n)]
    # UNK is an ordinary piece; EOS, BOS and PAD never stand inside.
    expected = []
    for ids in everything:
        log_prob = _log_prob(model, source[0], ids)
        expected.append((log_prob / ((5 + len(ids) + 1) / 6) ** exponent, ids))
    expected.sort(reverse=True)

    (found,) = _search(
        model, source, beam=400, length_penalty=exponent, max_extra_length=1, num_best=85
    )
    assert len(found) == len(expected) == 85
    assert [hypothesis.score for hypothesis in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-4
    )
    assert {tuple(hypothesis.ids) for hypothesis in found} == {tuple(ids) for ids in everything}
    assert found[0].ids == expected[0][1]


@pytest.mark.parametrize("settings", [{}, {"positions": "learned"}, {"tie_embeddings": False}])
@pytest.mark.parametrize("beam", [1, 4])
def test_scores_with_caches_equal_those_without(beam: int, settings: dict[str, Any]) -> None:
    model = _model(vocab=30, **settings)
    source = _sources(12, 9, 30)
    found = _search(model, source, beam=beam, max_extra_length=25, num_best=beam)
    lengths = set()
    for row, hypotheses in enumerate(found):
        assert hypotheses == sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)
        for hypothesis in hypotheses:
            lengths.add(len(hypothesis.ids))
            sentence = source[row][: int((source[row] != 0).sum())]
            assert hypothesis.log_prob == pytest.approx(
                _log_prob(model, sentence, hypothesis.ids), abs=2e-4
            )
            penalty = ((5 + len(hypothesis.ids) + 1) / 6) ** 0.6
            assert hypothesis.score == pytest.approx(hypothesis.log_prob / penalty)
    # Beyond one growth of the cache, and of various lengths, or the test shows little.
    assert max(lengths) > 16
    assert len(lengths) > 2


@pytest.mark.parametrize("beam", [1, 3])
def test_the_other_sentences_of_a_batch_change_nothing(beam: int) -> None:
    model = _model(vocab=30)
    source = _sources(9, 8, 30)
    together = _search(model, source, beam=beam, num_best=beam)
    backwards = _search(model, source.flip(0), beam=beam, num_best=beam)[::-1]
    for row in range(9):
        sentence = source[row : row + 1, : int((source[row] != 0).sum())]
        (alone,) = _search(model, sentence, beam=beam, num_best=beam)
        for other in (alone, backwards[row]):
            assert [h.ids for h in together[row]] == [h.ids for h in other]
            assert [h.score for h in together[row]] == pytest.approx(
                [h.score for h in other], rel=1e-4
            )


def test_beam_one_is_greedy() -> None:
    model = _model(vocab=30).eval()
    source = _sources(8, 6, 30)
    found = _search(model, source, beam=1, max_extra_length=4)
    for row, (hypothesis,) in enumerate(found):
        sentence = source[row : row + 1, : int((source[row] != 0).sum())]
        ids: list[int] = []
        with torch.no_grad():
            while len(ids) + 1 < sentence.size(1) + 4:
                logits = model.project(model(sentence, torch.tensor([[BOS_ID, *ids]])))[0, -1]
                logits[:2] = -math.inf
                best = int(logits.argmax())
                if best == EOS_ID:
                    break
                ids.append(best)
        assert hypothesis.ids == ids


@pytest.mark.parametrize("extra", [0, 2])
def test_lengths_are_bounded_and_special_pieces_absent(extra: int) -> None:
    model = _model()
    with torch.no_grad():
        # Make PAD and BOS by far the likeliest everywhere, and EOS the least.
        model.matrices["shared"].weight[EOS_ID] *= -3
    source = _sources(10, 6)
    lengths = (source != 0).sum(1).tolist()
    for row, hypotheses in enumerate(_search(model, source, max_extra_length=extra, num_best=4)):
        assert hypotheses
        for hypothesis in hypotheses:
            assert len(hypothesis.ids) + 1 <= lengths[row] + extra
            assert min(hypothesis.ids, default=3) >= 3
            assert math.isfinite(hypothesis.score)


def test_a_wider_beam_finds_no_worse_on_the_whole() -> None:
    model = _model(vocab=30)
    source = _sources(30, 8, 30)
    scores = [
        sum(
            hypotheses[0].log_prob
            for hypotheses in _search(model, source, beam=beam, length_penalty=0.0)
        )
        for beam in (1, 4, 16)
    ]
    assert scores[0] < scores[1] <= scores[2] + 1e-3


def test_learned_positions_bound_the_length() -> None:
    model = _model(positions="learned", max_positions=6)
    source = _sources(6, 6)
    for hypotheses in _search(model, source, max_extra_length=50):
        assert len(hypotheses[0].ids) < 6


def test_bfloat16_and_autocast_decode() -> None:
    model = _model(vocab=30)
    source = _sources(5, 6, 30)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _search(model, source)
    half = _search(model.bfloat16(), source)
    assert all(math.isfinite(found[0].score) for found in cast + half)


def test_a_ruined_model_ends_with_empty_translations() -> None:
    model = _model()
    with torch.no_grad():
        model.matrices["shared"].weight.fill_(math.nan)
    found = _search(model, _sources(3, 4))
    assert [[hypothesis.ids for hypothesis in hypotheses] for hypotheses in found] == [[[]]] * 3


def test_the_mode_of_the_model_is_put_back() -> None:
    model = _model(dropout=0.5)
    source = _sources(4, 5)
    model.train()
    assert _search(model, source) == _search(model, source)
    assert model.training
    model.eval()
    _search(model, source)
    assert not model.training


def test_more_hypotheses_than_the_beam_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_best 5 must lie between 1 and beam \(4\)"):
        _search(_model(), _sources(1, 3), num_best=5)


@pytest.mark.parametrize("columns", [5, 800, 1003])
def test_best_pieces_are_the_greatest_of_all_rows(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(40, columns, generator=generator)
    logits[:, :2] = -math.inf
    offsets = torch.randn(40, 1, generator=generator)
    offsets[1::4] = -math.inf
    values, rows, found = best_pieces(logits, offsets, 4, 5)
    expected = (logits + offsets).view(10, -1).topk(5, dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(rows * columns + found, expected.indices)


def test_an_empty_batch() -> None:
    assert _search(_model(), torch.zeros(0, 5, dtype=torch.int64)) == []
