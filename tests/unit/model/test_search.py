"""Search against exhaustive search, against itself without caches, and its promises."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from model.build import build
from model.config import ModelConfig
from model.search import BOS_ID, EOS_ID, Hypothesis, SearchOptions, best_pieces, search
from model.transformer import Transformer

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


DEFAULTS: dict[str, Any] = {"max_extra_length": 3, "allow_unknown": True}


def _search(
    model: Transformer,
    source: Tensor,
    *,
    prefixes: list[list[int]] | None = None,
    keys: list[int] | None = None,
    **settings: Any,
) -> list[list[Hypothesis]]:
    options = SearchOptions(**{**DEFAULTS, **settings})
    return search([model], source, options, prefixes=prefixes, keys=keys)


def _expected_score(
    log_prob: float, coverage_S: Tensor, length: int, settings: dict[str, Any]
) -> float:
    """The papers' formulas, written out once more."""
    strength, beta = settings["length_penalty"], settings.get("coverage_penalty", 0.0)
    score = {
        "wu": log_prob / (((5 + length) ** strength) / (6**strength)),
        "average": log_prob / length**strength,
        "reward": log_prob + strength * length,
    }[settings.get("length_rule", "wu")]
    covered = coverage_S.tolist()
    if settings.get("coverage_rule", "wu") == "wu":
        return score + beta * sum(math.log(min(sum_, 1.0)) for sum_ in covered)
    return score - beta * (-len(covered) + sum(max(sum_, 1.0) for sum_ in covered))


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        ("post", {"length_penalty": 0.0}),
        ("pre", {"length_penalty": 0.6}),
        ("pre", {"length_penalty": 2.0}),
        ("pre", {"length_penalty": 1.0, "length_rule": "average"}),
        ("post", {"length_penalty": 1.3, "length_rule": "reward"}),
        ("pre", {"length_penalty": 0.6, "coverage_penalty": 0.4}),
        ("pre", {"length_penalty": 0.6, "coverage_penalty": 3.0, "coverage_rule": "summary"}),
        ("post", {"length_penalty": 0.7, "length_rule": "average", "coverage_penalty": 0.9}),
        (
            "pre",
            {
                "length_penalty": 2.0, "length_rule": "reward",
                "coverage_penalty": 1.0, "coverage_rule": "summary",
            },
        ),
    ],
)  # fmt: skip
def test_a_wide_beam_finds_what_exhaustive_search_finds(
    norm: str, settings: dict[str, Any]
) -> None:
    model = _model(norm=norm).eval()
    source = torch.tensor([[5, 3, EOS_ID]])
    # Up to 3 pieces besides EOS: 1 + 4 + 16 + 64 translations. UNK is an ordinary piece; EOS, BOS
    # and PAD never stand inside.
    everything = [list(ids) for n in range(4) for ids in product([3, 4, 5, 6], repeat=n)]
    expected = []
    for ids in everything:
        target_in = torch.tensor([[BOS_ID, *ids]])
        coverage_S = model.attention_maps(source, target_in)["cross"][-1, 0].mean(0).sum(0)
        log_prob = _log_prob(model, source[0], ids)
        expected.append((_expected_score(log_prob, coverage_S, len(ids) + 1, settings), ids))
    expected.sort(reverse=True)

    (found,) = _search(model, source, beam=400, max_extra_length=1, num_best=85, **settings)
    assert len(found) == len(expected) == 85
    assert [hypothesis.score for hypothesis in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-4
    )
    assert {tuple(hypothesis.ids) for hypothesis in found} == {tuple(ids) for ids in everything}
    # Stopping early, too, loses nothing: what it finds is the best of all.
    (best,) = _search(model, source, beam=40, max_extra_length=1, **settings)
    assert [found[0].ids, best[0].ids] == [expected[0][1]] * 2


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


def test_greedy_is_a_beam_of_one() -> None:
    model = _model(vocab=30)
    source = _sources(8, 6, 30)
    assert _search(model, source, method="greedy", beam=4) == _search(model, source, beam=1)


def test_rules_change_what_is_best() -> None:
    # Without this the scores above might be right and the rules never matter.
    model = _model(vocab=30)
    source = _sources(30, 8, 30)
    lengths = {}
    for rule, penalty in (("wu", 0.0), ("average", 1.0), ("reward", 2.0)):
        found = _search(
            model, source, beam=8, max_extra_length=6, length_rule=rule, length_penalty=penalty
        )
        lengths[rule] = sum(len(hypotheses[0].ids) for hypotheses in found)
    assert lengths["wu"] < lengths["average"]
    assert lengths["wu"] < lengths["reward"]


@pytest.mark.parametrize(("rule", "penalty"), [("wu", 2.0), ("average", 1.0), ("reward", 3.0)])
def test_stopping_early_loses_nothing(rule: str, penalty: float) -> None:
    model = _model(vocab=30)
    with torch.no_grad():
        # So that a longer translation often turns out better than those that are finished.
        for parameter in model.parameters():
            parameter.mul_(0.5)
    source = _sources(40, 8, 30)
    settings: dict[str, Any] = {
        "beam": 6, "max_extra_length": 12, "length_rule": rule, "length_penalty": penalty,
    }  # fmt: skip
    # As many as the beam are only there once it is full: that search never stops earlier.
    full = _search(model, source, num_best=6, **settings)
    early = _search(model, source, num_best=1, **settings)
    assert [found[0].ids for found in early] == [found[0].ids for found in full]


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_coverage_ignores_padding_and_the_rest_of_the_batch(method: str) -> None:
    model = _model(vocab=30)
    source = _sources(9, 8, 30)
    settings: dict[str, Any] = {"method": method, "coverage_penalty": 0.5, "num_best": 2}
    together = _search(model, source, **settings)
    for row in range(9):
        sentence = source[row : row + 1, : int((source[row] != 0).sum())]
        (alone,) = _search(model, sentence, keys=[row], **settings)
        assert [h.ids for h in together[row]] == [h.ids for h in alone]
        assert [h.score for h in together[row]] == pytest.approx([h.score for h in alone], rel=1e-4)


def test_an_ensemble_of_one_model_twice_is_the_model() -> None:
    model = _model(vocab=30)
    source = _sources(8, 6, 30)
    for settings in ({"num_best": 4}, {"method": "sample"}, {"coverage_penalty": 0.3}):
        once = _search(model, source, **settings)
        twice = search([model, model], source, SearchOptions(**{**DEFAULTS, **settings}))
        for one, two in zip(once, twice, strict=True):
            assert [h.ids for h in one] == [h.ids for h in two]
            assert [h.score for h in one] == pytest.approx([h.score for h in two], rel=1e-4)


def test_an_ensemble_averages_probabilities() -> None:
    models = [_model(seed, vocab=30).eval() for seed in (1, 2, 3)]
    source = torch.tensor([[5, 9, 12, EOS_ID]])
    (found,) = search(models, source, SearchOptions(max_extra_length=3))
    target_in = torch.tensor([[BOS_ID, *found[0].ids]])
    with torch.no_grad():
        probs = [model.project(model(source, target_in))[0].softmax(-1) for model in models]
    mean_TV = sum(probs) / 3
    out = [*found[0].ids, EOS_ID]
    assert found[0].log_prob == pytest.approx(
        float(mean_TV.log()[range(len(out)), out].sum()), abs=1e-4
    )


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_prefixes_are_kept_and_scored(method: str) -> None:
    model = _model(vocab=30)
    source = _sources(5, 6, 30)
    # None, longer than any translation may be, and one with the forbidden unknown piece.
    prefixes = [[7], [], [4, 4, 9], [5] * 12, [3, 8]]
    found = _search(model, source, prefixes=prefixes, method=method, allow_unknown=False)
    free = _search(model, source, method=method, allow_unknown=False)
    for row, (prefix, (hypothesis, *_)) in enumerate(zip(prefixes, found, strict=True)):
        assert hypothesis.ids[: len(prefix)] == prefix
        assert 3 not in hypothesis.ids[len(prefix) :]
        sentence = source[row][: int((source[row] != 0).sum())]
        assert hypothesis.log_prob == pytest.approx(
            _log_prob(model, sentence, hypothesis.ids), abs=2e-4
        )
        if not prefix:
            assert hypothesis == free[row][0]
    assert found[3][0].ids == [5] * 12


def test_the_best_translation_as_a_prefix_gives_itself() -> None:
    model = _model(vocab=30)
    source = _sources(6, 6, 30)
    best = [hypotheses[0] for hypotheses in _search(model, source)]
    again = _search(model, source, prefixes=[hypothesis.ids for hypothesis in best])
    for hypothesis, hypotheses in zip(best, again, strict=True):
        found = {tuple(other.ids): other.log_prob for other in hypotheses}
        assert len(hypotheses[0].ids) >= len(hypothesis.ids)
        if tuple(hypothesis.ids) in found:
            assert found[tuple(hypothesis.ids)] == pytest.approx(hypothesis.log_prob, abs=1e-4)


@pytest.mark.parametrize("special", [0, BOS_ID, EOS_ID])
def test_special_pieces_in_a_prefix_are_refused(special: int) -> None:
    with pytest.raises(ValueError, match="prefix 1 holds PAD, BOS or EOS"):
        _search(_model(), _sources(2, 3), prefixes=[[4], [4, special]])


def test_the_unknown_piece_is_written_only_where_allowed() -> None:
    model = _model()
    with torch.no_grad():
        model.matrices["shared"].weight[3] *= 4
    source = _sources(10, 6)
    allowed = _search(model, source, num_best=4)
    forbidden = _search(model, source, num_best=4, allow_unknown=False)
    assert any(3 in h.ids for hypotheses in allowed for h in hypotheses)
    assert not any(3 in h.ids for hypotheses in forbidden for h in hypotheses)


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


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_a_ruined_model_ends_with_empty_translations(method: str) -> None:
    model = _model()
    with torch.no_grad():
        model.matrices["shared"].weight.fill_(math.nan)
    found = _search(model, _sources(3, 4), method=method)
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
