"""Transformers with other attentions, widths of heads and neighbourhoods: sizes, costs, search."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.build import build
from model.config import ModelConfig
from model.cost import Work, forward_flops
from model.search import BOS_ID, EOS_ID, Hypothesis, SearchOptions, search
from model.size import num_parameters
from model.transformer import Transformer
from trainer.flop_count import logits, torch_flops

VARIANTS: list[dict[str, Any]] = [
    {"d_k": 5, "d_v": 11},
    {"num_heads": 3, "d_k": 4, "d_v": 4},
    {"attention": "dot", "d_k": 3},
    {"attention": "general"},
    {"attention": "additive", "d_v": 3},
    {"local_radius": 2},
    {"local_radius": 0, "attention": "general"},
    {"local_radius": 1, "attention": "additive", "d_k": 6, "norm": "pre"},
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def _config(**settings: Any) -> ModelConfig:
    values = {"d_model": 16, "d_ff": 24, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    return ModelConfig.model_validate({**values, **settings})


def _fresh(**settings: Any) -> Transformer:
    torch.manual_seed(0)
    return build(_config(**settings), 30).eval()


def _model(vocab: int, **settings: Any) -> Transformer:
    torch.manual_seed(0)
    model = build(_config(**settings), vocab)
    # Sharper than at the start, so that sentences differ and end at various lengths.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model.eval()


def _sources(count: int, longest: int, vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, vocab, (count, longest), generator=generator)
    for row in range(count):
        length = 1 + row % longest
        source[row, length - 1] = EOS_ID
        source[row, length:] = 0
    return source


def _log_prob(model: Transformer, source_S: Tensor, ids: list[int]) -> float:
    """The log-probability of a whole translation, in one uncached pass without padding."""
    source_S = source_S[source_S != 0]
    with torch.no_grad():
        scores = model.project(model(source_S[None], torch.tensor([[BOS_ID, *ids]])))[0]
    return float(scores.log_softmax(-1)[range(len(ids) + 1), [*ids, EOS_ID]].sum())


@each_variant
def test_size_and_cost_are_those_of_the_built_model(variant: dict[str, Any]) -> None:
    config = _config(**variant)
    model = build(config, 50)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config, 50)
    shape = 3, 11, 9
    work = Work.of([shape[1]] * shape[0], [shape[2]] * shape[0])
    ids = torch.full(shape[:2], 5), torch.full((shape[0], shape[2]), 5)
    counted = torch_flops(lambda: logits(model, *ids))
    assert counted == forward_flops(config, work, vocab_size=50)


@each_variant
def test_padding_and_the_rest_of_the_batch_change_nothing(variant: dict[str, Any]) -> None:
    model = _fresh(**variant)
    source, target_in = _sources(6, 6, 30), torch.randint(4, 30, (6, 9))
    hidden = model(source, target_in)
    for row in range(6):
        sentence = source[row : row + 1, : int((source[row] != 0).sum())]
        alone = model(sentence, target_in[row : row + 1, :7])
        torch.testing.assert_close(hidden[row, :7], alone[0], rtol=0, atol=3e-5)


@each_variant
def test_every_parameter_has_a_gradient_and_steps_equal_one_pass(variant: dict[str, Any]) -> None:
    model = _fresh(**variant)
    source, target_in = _sources(6, 6, 30), torch.randint(4, 30, (6, 20))
    hidden = model(source, target_in)
    with torch.no_grad():
        state = model.start(source, 1)
        stepped = [model.step(target_in[:, position], state) for position in range(20)]
    torch.testing.assert_close(torch.stack(stepped, 1), hidden.detach(), rtol=0, atol=5e-5)
    model.training_loss(source, target_in, target_in, 0.1)[0].backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)


@each_variant
def test_parameters_are_used_in_the_forward_of_their_module_alone(variant: dict[str, Any]) -> None:
    # As ZeRO stage 3 has it, which gathers them there and lets go of them behind it.
    model = _fresh(**variant)
    batch = _sources(6, 6, 30), torch.randint(4, 30, (6, 9))
    expected = [model(*batch), model.attention_maps(*batch)["cross"], _two_steps(model, batch)]
    kept = {parameter: parameter.detach().clone() for parameter in model.parameters()}

    def gather(module: nn.Module, _inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept[parameter]

    def let_go(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.full_like(kept[parameter], math.nan)

    for module in model.modules():
        let_go(module, None, None)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(let_go)
    with torch.no_grad():
        found = [model(*batch), model.attention_maps(*batch)["cross"], _two_steps(model, batch)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def _two_steps(model: Transformer, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        state = model.start(batch[0], 1)
        return torch.stack([model.step(batch[1][:, position], state) for position in range(2)])


@each_variant
def test_attention_maps_keep_to_the_neighbourhood(variant: dict[str, Any]) -> None:
    model = _fresh(**variant)
    maps = model.attention_maps(_sources(6, 6, 30), torch.randint(4, 30, (6, 9)))
    heads, radius = model.config.num_heads, model.config.local_radius
    assert maps["cross"].shape == (2, 6, heads, 9, 6)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    for name, length in (("encoder", 6), ("decoder", 9)):
        torch.testing.assert_close(
            maps[name].sum(-1), torch.ones(maps[name].shape[:-1]), rtol=1e-5, atol=1e-5
        )
        if radius is not None:
            assert not maps[name][..., distance[:length, :length] > radius].any()
    # Of cross-attention all is seen, whatever the neighbourhood.
    assert bool((maps["cross"][:, 5] > 0).all())


def test_a_neighbourhood_bounds_how_far_a_word_reaches() -> None:
    model = _fresh(local_radius=2, encoder_layers=2)
    source = torch.randint(4, 30, (1, 12))
    changed = source.clone()
    changed[0, 6] = 4 + (source[0, 6] - 3) % 26
    difference = (model.double().encode(source) - model.encode(changed)).abs().amax(-1)[0]
    # Two layers of two positions each.
    assert (difference > 1e-13).nonzero()[:, 0].tolist() == list(range(2, 11))


@pytest.mark.parametrize("method", ["beam", "sample", "greedy"])
@pytest.mark.parametrize("variant", VARIANTS[-3:] + VARIANTS[:1], ids=str)
def test_scores_with_caches_equal_those_without(variant: dict[str, Any], method: Any) -> None:
    model = _model(30, **variant)
    source = _sources(8, 5, 30)
    prefixes = [[7] if row % 3 == 0 else [] for row in range(8)]
    num_best = 1 if method == "greedy" else 3
    options = SearchOptions(
        method=method, beam=4, num_best=num_best, max_extra_length=20, allow_unknown=True
    )
    found = search([model], source, options, prefixes=prefixes)
    lengths = set()
    for row, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            lengths.add(len(hypothesis.ids))
            assert hypothesis.ids[: len(prefixes[row])] == prefixes[row]
            assert hypothesis.log_prob == pytest.approx(
                _log_prob(model, source[row], hypothesis.ids), abs=5e-4
            )
    # Beyond one growth of the cache, and of various lengths, or the test shows little.
    assert max(lengths) > 16
    assert len(lengths) > 1


@pytest.mark.parametrize("variant", VARIANTS[-2:], ids=str)
def test_a_wide_beam_finds_what_exhaustive_search_finds(variant: dict[str, Any]) -> None:
    model = _model(7, **variant)
    source = torch.tensor([[5, 3, EOS_ID]])
    everything = [list(ids) for n in range(4) for ids in product([3, 4, 5, 6], repeat=n)]
    expected = sorted(((_log_prob(model, source[0], ids), ids) for ids in everything), reverse=True)
    options = SearchOptions(
        beam=400, num_best=85, max_extra_length=1, length_penalty=0.0, allow_unknown=True
    )
    (found,) = search([model], source, options)
    assert [hypothesis.score for hypothesis in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-4
    )
    assert {tuple(hypothesis.ids) for hypothesis in found} == {tuple(ids) for ids in everything}


def test_sentences_that_leave_a_local_beam_change_nothing() -> None:
    model = _model(30, local_radius=1, d_v=3)
    source = _sources(8, 8, 30)
    options = SearchOptions(beam=3, num_best=3, max_extra_length=8)
    together = search([model], source, options)

    def ids(hypotheses: list[Hypothesis]) -> list[list[int]]:
        return [hypothesis.ids for hypothesis in hypotheses]

    for row in range(8):
        sentence = source[row : row + 1, : int((source[row] != 0).sum())]
        (alone,) = search([model], sentence, options)
        assert ids(alone) == ids(together[row])
        assert math.isfinite(alone[0].score)


@pytest.mark.parametrize("variant", VARIANTS[-3:], ids=str)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_close_to_float32(variant: dict[str, Any], how: str) -> None:
    torch.manual_seed(0)
    model = build(_config(dropout=0.0, **variant), 30)
    source, target = _sources(6, 6, 30), torch.randint(4, 30, (6, 6))
    exact = model.training_loss(source, target, target, 0.1)[0]
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model.training_loss(source, target, target, 0.1)[0]
    halves = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    flat = [torch.cat([g.flatten().float() for g in group]) for group in (gradients, halves)]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.99
