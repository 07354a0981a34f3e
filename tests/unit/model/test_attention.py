"""Every implementation of every attention against its formula, and against numbers by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import attention, attention_kernels
from model.attention import (
    Score,
    ScoreName,
    causal_mask,
    local_mask,
    make_score,
    padding_mask,
    self_mask,
    use_explicit,
)

SHAPES = [(3, 5, 5), (2, 1, 7), (2, 16, 16), (1, 33, 20)]
NAMES = get_args(ScoreName)
HEADS, KEYS, VALUES = 4, 8, 6


def _heads(batch: int, queries: int, keys: int, *, values: int = VALUES) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    shapes = (queries, KEYS), (keys, KEYS), (keys, values)
    return tuple(torch.randn(batch, HEADS, *shape, generator=generator) for shape in shapes)


def _padding(batch: int, keys: int) -> Tensor:
    lengths = torch.arange(batch) % keys + 1
    return padding_mask(torch.arange(keys)[None, :] < lengths[:, None])


def _score(name: ScoreName, *, width: int = KEYS) -> Score:
    torch.manual_seed(4)
    return make_score(name, HEADS, width)


def _others(score: Score, *, local: bool = False) -> list[attention.How]:
    """What is no reference; FlexAttention, which is slow to start, has a test of its own."""
    without = {"reference", "flex"} if local else {"reference", "flex", "blocks"}
    return [how for how in score.implementations if how not in without]


def _plain_loops(score: Score, query: Tensor, key: Tensor) -> Tensor:
    """Scores [B, H, T, S], one number at a time, by the papers' formulas."""
    batch, heads, queries, width = query.shape
    scores = torch.empty(batch, heads, queries, key.size(2))
    for b, h, t, s in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).tolist():
        q, k = query[b, h, t], key[b, h, s]
        match score:
            case attention.AdditiveScore():
                scores[b, h, t, s] = sum(score.weight[h] * torch.tanh(q + k))
            case attention.GeneralScore():
                scores[b, h, t, s] = q @ (score.weight[h] @ k)
            case attention.DotScore(scaled=True):
                scores[b, h, t, s] = (q @ k) / math.sqrt(width)
            case _:
                scores[b, h, t, s] = q @ k
    return scores


def test_the_reference_equals_numbers_worked_by_hand() -> None:
    query = torch.tensor([[[[2.0, 0.0]]]])
    key = torch.tensor([[[[math.log(3) / math.sqrt(2), 5.0], [0.0, -5.0]]]])
    value = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    record: list[Tensor] = []
    score = make_score("scaled_dot", 1, 2)
    output = score(query, key, value, record=record)
    # Scores log 3 and 0: weights 3/4 and 1/4.
    torch.testing.assert_close(record[0], torch.tensor([[[[0.75, 0.25]]]]))
    torch.testing.assert_close(output, torch.tensor([[[[3.0, 2.0]]]]))
    # Without the scale sqrt(2) log 3 and 0.
    output = make_score("dot", 1, 2)(query, key, value, how="reference")
    odds = 3 ** math.sqrt(2)
    torch.testing.assert_close(output, torch.tensor([[[[4 * odds / (1 + odds), 8 / (1 + odds)]]]]))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_papers_formula(name: ScoreName) -> None:
    score = _score(name)
    query, key, value = _heads(2, 3, 4)
    record: list[Tensor] = []
    output = score(query, key, value, _padding(2, 4), record=record)
    scores = _plain_loops(score, query, key)
    hidden = torch.arange(4)[None, :] >= torch.tensor([1, 2])[:, None]
    expected = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
    torch.testing.assert_close(record[0], expected, rtol=1e-5, atol=1e-6)
    assert record[0].shape == (2, HEADS, 3, 4)
    torch.testing.assert_close(
        output, torch.einsum("bhts,bhsv->bhtv", expected, value), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_equals_the_reference_with_gradients(
    monkeypatch: pytest.MonkeyPatch, name: ScoreName, shape: tuple[int, int, int], masked: bool
) -> None:
    # Of the additive hidden layer a few rows or queries at a time, the last piece shorter.
    monkeypatch.setitem(attention_kernels._ADDITIVE_ELEMENTS, "cpu", 1000)
    score = _score(name)
    heads = tuple(part.requires_grad_() for part in _heads(*shape))
    mask = _padding(shape[0], shape[2]) if masked else None
    leaves = [*heads, *score.parameters()]

    def of(how: attention.How) -> list[Tensor]:
        output = score(*heads, mask, how=how)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad((output * weights).sum(), leaves)]

    expected = of("reference")
    for how in _others(score):
        for one, other in zip(of(how), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        with torch.no_grad():
            output = score(*heads, mask, how=how)
        torch.testing.assert_close(output, expected[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("causal", "radius"), [(True, None), (False, 2), (True, 3), (False, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_self_attention_may_see(
    name: ScoreName, masked: bool, causal: bool, radius: int | None
) -> None:
    score = _score(name)
    heads = _heads(3, 9, 9)
    mask = _padding(3, 9) if masked else None
    record: list[Tensor] = []
    expected = score(*heads, mask, causal=causal, radius=radius, record=record)
    for how in _others(score, local=radius is not None):
        output = score(*heads, mask, causal=causal, radius=radius, how=how)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    row, column = torch.arange(9)[:, None], torch.arange(9)[None, :]
    allowed = torch.ones(9, 9, dtype=torch.bool)
    if causal:
        allowed &= column <= row
    if radius is not None:
        allowed &= (row - column).abs() <= radius
    for sentence, length in enumerate((1, 2, 3) if masked else (9, 9, 9)):
        open_ = allowed & (column < length)
        seen = record[0][sentence] > 0
        assert torch.equal(seen[:, :length], open_[:length].expand(HEADS, -1, -1))
        # Padding sees something, itself at least: never a softmax over nothing.
        assert bool(seen[:, length:].any(-1).all())


@pytest.mark.parametrize(("causal", "radius"), [(False, 3), (True, 20), (False, 17)])
@pytest.mark.parametrize("length", [1, 16, 50])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["scaled_dot", "additive"])
def test_blocks_equal_the_whole_square_with_gradients(
    name: ScoreName, masked: bool, length: int, causal: bool, radius: int
) -> None:
    score = _score(name)
    heads = tuple(part.requires_grad_() for part in _heads(3, length, length))
    # Of the second and third sentence all but one or two positions are padding.
    mask = _padding(3, length).flip(0) if masked else None
    leaves = [*heads, *score.parameters()]

    def of(how: attention.How) -> list[Tensor]:
        output = score(*heads, mask, causal=causal, radius=radius, how=how)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        return [output, *torch.autograd.grad((output * weights).sum(), leaves)]

    for one, other in zip(of("blocks"), of("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_only_long_neighbourhoods_are_computed_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    class Recorded(attention.Blocks):
        def __init__(self, length: int, radius: int, *, causal: bool) -> None:
            made.append(length)
            super().__init__(length, radius, causal=causal)

    monkeypatch.setattr(attention, "Blocks", Recorded)
    score = _score("scaled_dot")
    for length, radius in ((383, 4), (400, 60), (384, 4)):
        score(*_heads(1, length, length), radius=radius)
    assert made == [384]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["scaled_dot", "dot", "general"])
def test_flex_attention_equals_the_reference(name: ScoreName) -> None:
    score = _score(name)
    heads = _heads(3, 40, 40, values=KEYS)
    with torch.no_grad():
        for mask in (None, _padding(3, 40)):
            for causal, radius in ((False, None), (True, None), (False, 5), (True, 5)):
                seen = {"causal": causal, "radius": radius}
                torch.testing.assert_close(
                    score(*heads, mask, **seen, how="flex"),
                    score(*heads, mask, **seen, how="reference"),
                    rtol=1e-5,
                    atol=1e-5,
                )


def test_what_an_implementation_cannot_is_told() -> None:
    score, heads = _score("scaled_dot"), _heads(1, 3, 3)
    with pytest.raises(ValueError, match="give a radius"):
        score(*heads, how="blocks")
    with pytest.raises(ValueError, match="FlexAttention drops no weights"):
        score(*heads, how="flex", dropout=0.1)
    with pytest.raises(ValueError, match="no gradients on a CPU"):
        score(heads[0].requires_grad_(), *heads[1:], how="flex")


def test_a_mask_restricted_to_a_neighbourhood() -> None:
    cpu = torch.device("cpu")
    near = local_mask(70, 3, cpu, causal=False)[0, 0] == 0
    distance = (torch.arange(70)[:, None] - torch.arange(70)).abs()
    assert torch.equal(near, distance <= 3)
    assert torch.equal(local_mask(70, 3, cpu, causal=True)[0, 0] == 0, near.tril())
    padding = _padding(3, 9)
    assert self_mask(padding, 9, cpu, causal=False, radius=None) is padding


def test_causal_mask_is_lower_triangular_and_cached() -> None:
    mask = causal_mask(5, torch.device("cpu"))
    assert mask.shape == (1, 1, 5, 5)
    assert torch.equal(mask[0, 0] == 0, torch.ones(5, 5).tril().bool())
    assert causal_mask(9, torch.device("cpu")).data_ptr() == mask.data_ptr()
    assert causal_mask(100, torch.device("cpu")).shape == (1, 1, 100, 100)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_row_of_the_whole(name: ScoreName) -> None:
    # J hypotheses of a sentence as so many queries; keys and values made once.
    score = _score(name)
    query, key, value = _heads(3, 5, 7)
    mask = _padding(3, 7)
    whole = score(query, key, value, mask)
    with torch.inference_mode():
        for step in range(0, 4, 2):
            record: list[Tensor] = []
            some = query[:, :, step : step + 2]
            stepped = score(some, key, value, mask)
            recorded = score(some, key, value, mask, record=record)
            for output in (stepped, recorded):
                torch.testing.assert_close(
                    output, whole[:, :, step : step + 2], rtol=1e-5, atol=1e-5
                )
            assert record[0].shape == (3, HEADS, 2, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close_to_float32(name: ScoreName, autocast: bool) -> None:
    score = _score(name)
    heads = _heads(2, 6, 6)
    expected = score(*heads, how="reference")
    if not autocast:
        score.bfloat16()
    narrow = tuple(part.bfloat16() for part in heads)
    for how in ("reference", *_others(score)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # As an LSTM's states under autocast: a query of another type than the keys.
            output = score(heads[0], *narrow[1:], how=how)
        assert output.dtype == torch.bfloat16
        # The products of unscaled scores have an error of 2**-9 of up to 15.
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_has_the_gradients_of_its_mask(
    monkeypatch: pytest.MonkeyPatch, name: ScoreName
) -> None:
    # With the draws fixed every implementation is a smooth function: check it by differences.
    def fixed(like: Tensor, probability: float) -> tuple[Tensor, float]:
        kept = torch.rand(like.shape, generator=torch.Generator().manual_seed(8)) >= probability
        return kept.to(like.dtype), 1 / (1 - probability)

    monkeypatch.setattr(attention_kernels, "keep_mask", fixed)
    monkeypatch.setattr("model.dropout.keep_mask", fixed)
    score = _score(name).double()
    heads = [part[:1, :, :3].double().requires_grad_() for part in _heads(1, 3, 4)]
    wide = score(*heads, dropout=0.4, how="explicit")
    torch.testing.assert_close(wide, score(*heads, dropout=0.4, how="reference"))
    assert not torch.allclose(wide, score(*heads, how="reference"))
    torch.autograd.gradcheck(
        lambda *parts: score(*parts[:3], dropout=0.4, how="explicit"),
        [*heads, *score.parameters()],
    )


@pytest.mark.parametrize("name", NAMES)
def test_huge_scores_neither_overflow_nor_vanish(name: ScoreName) -> None:
    score = _score(name)
    heads = tuple(tensor * 1e4 for tensor in _heads(2, 5, 6))
    expected = score(*heads, how="reference")
    assert bool(torch.isfinite(expected).all())
    for how in _others(score):
        torch.testing.assert_close(score(*heads, how=how), expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name: ScoreName) -> None:
    score = _score(name)
    heads = [part[:0].requires_grad_() for part in _heads(1, 3, 4)]
    for how in ("reference", *_others(score)):
        output = score(*heads, how=how)
        assert output.shape == (0, HEADS, 3, VALUES)
        output.sum().backward()


def test_an_implementation_that_an_attention_lacks_is_told() -> None:
    with pytest.raises(ValueError, match="AdditiveScore has no implementation 'fused': fastest"):
        _score("additive")(*_heads(1, 2, 2), how="fused")


def test_only_short_attention_on_a_cpu_is_explicit() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for gradients in (False, True):
        assert use_explicit(cpu, torch.bfloat16, 14, 14, gradients=gradients)
        assert not use_explicit(cpu, torch.bfloat16, 999, 999, gradients=gradients)
        assert not use_explicit(cuda, torch.bfloat16, 14, 14, gradients=gradients)


def test_only_the_scores_with_parameters_have_any() -> None:
    shapes = {
        name: [tuple(parameter.shape) for parameter in _score(name).parameters()] for name in NAMES
    }
    assert shapes == {
        "scaled_dot": [],
        "dot": [],
        "general": [(HEADS, KEYS, KEYS)],
        "additive": [(HEADS, KEYS)],
    }


def test_the_scale_keeps_the_variance_of_the_scores() -> None:
    torch.manual_seed(0)
    for width in (16, 256):
        query, key = torch.randn(2, 1, 1, 300, width).unbind(0)
        variances = {
            name: float(make_score(name, 1, width).scores(query, key).var())
            for name in ("scaled_dot", "dot")
        }
        assert variances["scaled_dot"] == pytest.approx(1, rel=0.1)
        assert variances["dot"] == pytest.approx(width, rel=0.1)


def test_the_fused_kernel_is_pytorchs() -> None:
    heads = _heads(2, 7, 7)
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True)
    assert torch.equal(_score("scaled_dot")(*heads, causal=True, how="fused"), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_too_large_for_float32_change_no_other_sentence(masked: bool) -> None:
    # Their exponentials would leave float32's range without the largest one taken away.
    score = _score("scaled_dot")
    query, key, value = (part.clone() for part in _heads(3, 5, 5))
    mask = padding_mask(torch.arange(5) < torch.tensor([[5], [3], [4]])) if masked else None
    alone = score(query, key, value, mask, how="explicit")
    for factor in (1e3, -1e3):
        query[1] = factor * key[1]
        together = score(query, key, value, mask, how="explicit")
        assert torch.equal(together[::2], alone[::2])
        expected = score(query, key, value, mask, how="reference")
        torch.testing.assert_close(together, expected)
