"""The convolutional model against one written with conv1d, its invariances, and its search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.build import build
from model.config import ModelConfig
from model.convolutional import ConvolutionalModel, DecoderBlock, EncoderBlock, GatedConvolution
from model.encoder_decoder import EncoderDecoder
from model.search import EOS_ID, SearchOptions, search
from model.size import num_parameters
from trainer.flop_count import counted_by_cost, counted_by_torch

VOCAB = 37
SQRT_HALF = 0.5**0.5


def _config(**settings: Any) -> ModelConfig:
    values = {
        "kind": "convolutional",
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "positions": "learned",
        "max_positions": 40,
        **settings,
    }
    return ModelConfig.model_validate(values)


def _model(seed: int = 0, **settings: Any) -> ConvolutionalModel:
    torch.manual_seed(seed)
    model = build(_config(**settings), VOCAB)
    assert isinstance(model, ConvolutionalModel)
    # Zero biases and unit gains would hide a wrong place of either.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean().detach()), std=0.1)
    return model


def _batch(*, padded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Source, decoder input and references: 4 pairs, padded on the right."""
    generator = torch.Generator().manual_seed(11)
    source = torch.randint(4, VOCAB, (4, 7), generator=generator)
    target = torch.randint(4, VOCAB, (4, 6), generator=generator)
    target_in = torch.cat([torch.full((4, 1), 1), target[:, :-1]], 1)
    if padded:
        for row, (source_length, target_length) in enumerate([(7, 6), (3, 2), (5, 6), (7, 4)]):
            source[row, source_length:] = 0
            target[row, target_length:] = 0
            target_in[row, target_length:] = 0
    return source, target_in, target


def _conv1d(layer: GatedConvolution, inputs_LD: Tensor, before: int) -> Tensor:
    weight_OW = layer.linear.weight
    weight_ODW = weight_OW.unflatten(1, (layer.size, -1)).transpose(1, 2)
    padded_DL = functional.pad(inputs_LD.T, (before, layer.size - 1 - before))
    value, gate = functional.conv1d(padded_DL, weight_ODW, layer.linear.bias).T.chunk(2, 1)
    return value * torch.sigmoid(gate)


def _written_out(model: ConvolutionalModel, source_S: Tensor, target_in_T: Tensor) -> Tensor:
    """Final states [T, D] of one pair without padding, from the equations."""
    size = model.config.kernel_size
    table = model.matrices["shared"].weight * model.config.d_model**0.5
    positions = model.source_positions.weight, model.target_positions.weight
    assert positions[0] is not None
    assert positions[1] is not None
    source_SD = table[source_S] + positions[0][: len(source_S)]
    target_TD = table[target_in_T] + positions[1][: len(target_in_T)]
    states = source_SD
    for block in model.encoder:
        assert isinstance(block, EncoderBlock)
        states = states + _conv1d(block.convolution, block.norm(states), size // 2)
    keys = model.encoder_norm(states)
    values = (keys + source_SD) * SQRT_HALF
    states = target_TD
    for block in model.decoder:
        assert isinstance(block, DecoderBlock)
        states = states + _conv1d(block.convolution, block.norm(states), size - 1)
        query = block.query(block.attention_norm(states)) + target_TD
        weights = (query @ keys.T / model.config.d_model**0.5).softmax(-1)
        states = states + block.output(weights @ values)
    return model.decoder_norm(states)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kernel_size", [1, 3, 11])
def test_equals_the_equations_written_with_conv1d(kernel_size: int) -> None:
    model = _model(kernel_size=kernel_size, dropout=0.0).double()
    source, target_in, _ = _batch()
    hidden = model(source, target_in)
    parameters = list(model.parameters())
    for row in range(4):
        lengths = int((source[row] != 0).sum()), int((target_in[row] != 0).sum())
        ours = hidden[row, : lengths[1]]
        expected = _written_out(model, source[row, : lengths[0]], target_in[row, : lengths[1]])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
        gradients = torch.autograd.grad((ours * weights).sum(), parameters, retain_graph=True)
        expected_gradients = torch.autograd.grad((expected * weights).sum(), parameters)
        torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-8)


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_convolution_sees(causal: bool) -> None:
    torch.manual_seed(0)
    layer = GatedConvolution(_config(kernel_size=5), causal=causal)
    inputs = torch.randn(1, 9, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs)[0, 4].sum(), inputs)
    seen = gradient[0].abs().sum(1).nonzero()[:, 0].tolist()
    assert seen == ([0, 1, 2, 3, 4] if causal else [2, 3, 4, 5, 6])


def test_a_later_target_never_changes_an_earlier_output() -> None:
    model = _model().eval()
    source, target_in, _ = _batch(padded=False)
    hidden = model(source, target_in)
    for position in range(1, 6):
        changed = target_in.clone()
        changed[:, position:] = 5 + (changed[:, position:] - 4) % (VOCAB - 5)
        other = model(source, changed)
        torch.testing.assert_close(other[:, :position], hidden[:, :position], rtol=0, atol=1e-6)
        assert float((other[:, position] - hidden[:, position]).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("attention", ["scaled_dot", "dot", "general", "additive"])
def test_padding_and_the_other_pairs_change_nothing(attention: str) -> None:
    model = _model(attention=attention, kernel_size=5).eval()
    source, target_in, target_out = _batch()
    hidden = model(source, target_in)
    wider = functional.pad(source, (0, 5)), functional.pad(target_in, (0, 4))
    torch.testing.assert_close(model(*wider)[:, :6], hidden, rtol=0, atol=1e-5)

    together = model.training_loss(source, target_in, target_out, 0.1)
    apart = [0.0, 0.0]
    for row in range(4):
        lengths = int((source[row] != 0).sum()), int((target_out[row] != 0).sum())
        alone = model.training_loss(
            source[row : row + 1, : lengths[0]],
            target_in[row : row + 1, : lengths[1]],
            target_out[row : row + 1, : lengths[1]],
            0.1,
        )
        apart = [total + float(part.detach()) for total, part in zip(apart, alone, strict=True)]
    assert [float(total.detach()) for total in together] == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"kernel_size": 1}, {"attention": "additive"}])
def test_steps_equal_one_pass(settings: dict[str, Any]) -> None:
    model = _model(**settings).eval()
    source, target_in, _ = _batch()
    hidden = model(source, target_in)
    with torch.no_grad():
        state = model.start(source, 1)
        stepped = [model.step(target_in[:, position], state) for position in range(6)]
    torch.testing.assert_close(torch.stack(stepped, 1), hidden.detach(), rtol=0, atol=2e-5)


def _sources() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(4, VOCAB, (6, 6), generator=generator)
    for row in range(6):
        source[row, row] = EOS_ID
        source[row, row + 1 :] = 0
    return source


def _sharpened(**settings: Any) -> EncoderDecoder:
    model = _model(**settings).eval()
    # So that sentences differ and end at various lengths.
    model.get_parameter("matrices.shared.weight").data.mul_(2.0)
    return model


@pytest.mark.parametrize(
    ("beam", "settings"), [(1, {}), (4, {"kernel_size": 5}), (3, {"kernel_size": 1})]
)
def test_scores_of_a_search_are_those_of_whole_passes(beam: int, settings: dict[str, Any]) -> None:
    model = _sharpened(**settings)
    source = _sources()
    options = SearchOptions(beam=beam, num_best=beam, max_extra_length=6, length_penalty=0.0)
    for row, hypotheses in enumerate(search([model], source, options)):
        assert len(hypotheses) == beam
        for hypothesis in hypotheses:
            target_in = torch.tensor([[1, *hypothesis.ids]])
            with torch.no_grad():
                logits = model.project(model(source[row : row + 1, : row + 1], target_in))[0]
            steps = range(len(hypothesis.ids) + 1)
            expected = float(logits.log_softmax(-1)[steps, [*hypothesis.ids, EOS_ID]].sum())
            assert hypothesis.log_prob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("coverage_penalty", [0.0, 0.5])
def test_sentences_are_found_alone_as_in_a_batch(coverage_penalty: float) -> None:
    model = _sharpened()
    source = _sources()
    options = SearchOptions(beam=4, max_extra_length=8, coverage_penalty=coverage_penalty)
    together = search([model], source, options)
    for row in range(6):
        (alone,) = search([model], source[row : row + 1, : row + 1], options)
        assert [hypothesis.ids for hypothesis in together[row]] == [h.ids for h in alone]
        assert together[row][0].score == pytest.approx(alone[0].score, abs=1e-4)


def test_attention_maps_are_weights_over_the_source() -> None:
    model = _model().eval()
    source, target_in, _ = _batch()
    maps = model.attention_maps(source, target_in)
    assert set(maps) == {"cross"}
    weights = maps["cross"]
    assert weights.shape == (3, 4, 1, 6, 7)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not weights[:, 1, :, :, 3:].any()
    record: list[Tensor] = []
    with torch.no_grad():
        state = model.start(source, 1)
        for position in range(6):
            model.step(target_in[:, position], state, record)
    torch.testing.assert_close(torch.cat(record, 2), weights[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_close_to_float32(how: str) -> None:
    model = _model(dropout=0.0, d_model=32)
    batch = _batch()
    exact, exact_nll = model.training_loss(*batch, 0.1)
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss_sum, nll_sum = model.training_loss(*batch, 0.1)
    halves = torch.autograd.grad(loss_sum, list(model.parameters()))
    torch.testing.assert_close(loss_sum, exact, rtol=0.02, atol=0)
    torch.testing.assert_close(nll_sum, exact_nll, rtol=0.02, atol=0)
    whole, half = (torch.cat([g.flatten().float() for g in group]) for group in (gradients, halves))
    assert float(functional.cosine_similarity(whole, half, dim=0)) > 0.99
    assert float(half.norm() / whole.norm()) == pytest.approx(1, abs=0.05)


def test_sources_of_padding_alone_and_empty_batches_are_finite() -> None:
    model = _model()
    source, target_in, target_out = _batch()
    source[1] = 0
    model.training_loss(source, target_in, target_out, 0.1)[0].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.zero_grad()
    # So that a rank without sentences can take part in a step's collectives.
    empty = torch.zeros(0, 4, dtype=torch.int64)
    model.training_loss(empty, empty, empty, 0.1)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_dropout_is_repeated_by_the_generator_state_and_off_in_evaluation() -> None:
    model = _model(dropout=0.2)
    batch = _batch()
    state = torch.get_rng_state()
    first = model.training_loss(*batch, 0.1)[0]
    second = model.training_loss(*batch, 0.1)[0]
    torch.set_rng_state(state)
    assert torch.equal(model.training_loss(*batch, 0.1)[0], first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(*batch[:2]), model(*batch[:2]))


def test_beyond_the_learned_positions_is_refused() -> None:
    ids = torch.full((1, 41), 5)
    with pytest.raises(ValueError, match=r"41 pieces is longer than the model's 40 learned"):
        _model()(ids, ids)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention": "general", "kernel_size": 5},
        {"attention": "additive", "positions": "sinusoidal", "tie_embeddings": False},
        {"preset": "base"},
    ],
)
def test_parameters_and_operations_are_reckoned_as_they_are(settings: dict[str, Any]) -> None:
    config = _config(**settings)
    with torch.device("meta"):
        model = build(config, VOCAB)
    assert num_parameters(config, VOCAB) == sum(p.numel() for p in model.parameters())
    shapes = [(3, 9, 7), (1, 4, 11)]
    assert counted_by_cost(config, VOCAB, shapes) == counted_by_torch(config, VOCAB, shapes)


def test_tiny_is_about_as_large_as_the_transformers() -> None:
    sizes = [
        num_parameters(ModelConfig.model_validate({"kind": kind, "preset": "tiny"}), 6000)
        for kind in ("convolutional", "transformer")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_a_model_learns_to_reverse() -> None:
    torch.manual_seed(0)
    model = build(_config(d_model=32, dropout=0.0, encoder_layers=1, decoder_layers=2), VOCAB)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    nll = 99.0
    for _ in range(120):
        source = torch.randint(4, VOCAB, (32, 5), generator=generator)
        target = source.flip(1)
        target_in = torch.cat([torch.ones(32, 1, dtype=torch.int64), target[:, :-1]], 1)
        loss_sum, nll_sum = model.training_loss(source, target_in, target, 0.0)
        optimizer.zero_grad()
        (loss_sum / source.numel()).backward()
        optimizer.step()
        nll = float(nll_sum) / source.numel()
    # Uniform guessing costs 3.5 nats.
    assert nll < 0.5
