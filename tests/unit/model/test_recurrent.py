"""The recurrent models against their formulas word by word, and their invariances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.build import build
from model.config import ModelConfig, ScoreName
from model.cost import batch_flops
from model.presets import PRESETS
from model.recurrent import Recurrence, RecurrentModel
from model.search import SearchOptions, search
from model.size import num_parameters
from trainer.flop_count import counted_by_torch

VOCAB, WIDTH = 37, 16
KINDS = ("rnn", "lstm", "gru")
SCORES = get_args(ScoreName)
CASES = [
    *((kind, "additive") for kind in KINDS),
    *(("gru", score) for score in SCORES if score != "additive"),
]


def _config(kind: str, **settings: Any) -> ModelConfig:
    values = {
        "kind": kind,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "attention": "additive",
        **settings,
    }
    return ModelConfig.model_validate(values)


def _model(kind: str, seed: int = 0, **settings: Any) -> RecurrentModel:
    torch.manual_seed(seed)
    model = build(_config(kind, **settings), VOCAB)
    assert isinstance(model, RecurrentModel)
    # Zero biases and unit gains would hide a wrong place of either.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean().detach()), std=0.1)
    return model


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Source, decoder input and references: 4 pairs, padded on the right."""
    generator = torch.Generator().manual_seed(11)
    source = torch.randint(4, VOCAB, (4, 7), generator=generator)
    target = torch.randint(4, VOCAB, (4, 6), generator=generator)
    target_in = torch.cat([torch.full((4, 1), 1), target[:, :-1]], 1)
    for row, (source_length, target_length) in enumerate([(7, 6), (3, 2), (5, 6), (1, 4)]):
        source[row, source_length:] = 0
        target[row, target_length:] = 0
        target_in[row, target_length:] = 0
    return source, target_in, target


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_that_a_unit_is_given_is_contiguous(kind: str) -> None:
    # cuDNN takes no other ("rnn: cx is not contiguous"); a CPU takes all.
    model, (source, target_in, _) = _model(kind), _batch()
    given: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        state = inputs[1]
        if state is not None:
            given.extend(state if isinstance(state, tuple) else [state])

    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(note)
    model.states(source, target_in)
    with torch.no_grad():
        state = model.start(source, 3)
        model.step(torch.full((12,), 1), state)
        model.step(torch.full((12,), 4), state)
    assert len(given) == 3 * 3 * (2 if kind == "lstm" else 1)
    assert all(part.is_contiguous() for part in given)


def _unit(kind: str, unit: nn.Module, input_D: Tensor, state: list[Tensor]) -> list[Tensor]:
    """One position of one unit, from the papers' formulas."""
    weights = dict(unit.named_parameters())
    from_input = weights["weight_ih_l0"] @ input_D + weights["bias_ih_l0"]
    from_state = weights["weight_hh_l0"] @ state[0] + weights["bias_hh_l0"]
    if kind == "rnn":
        return [torch.tanh(from_input + from_state)]
    if kind == "gru":
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (
            part.chunk(3) for part in (from_input, from_state)
        )
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        return [(1 - update) * new + update * state[0]]
    enter, forget, new, leave = (from_input + from_state).chunk(4)
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return [torch.sigmoid(leave) * torch.tanh(cell), cell]


def _read(kind: str, unit: nn.Module, inputs_LD: Tensor, state: list[Tensor]) -> Iterator[Tensor]:
    for input_D in inputs_LD:
        state = _unit(kind, unit, input_D, state)
        yield state[0]


def _score(model: RecurrentModel, query_D: Tensor, key_SD: Tensor) -> Tensor:
    name = model.config.attention
    weight = getattr(model.cross.score, "weight", None)
    if name == "additive":
        assert weight is not None
        return torch.tanh(query_D + key_SD) @ weight[0]
    if name == "general":
        assert weight is not None
        return key_SD @ (weight[0].T @ query_D)
    return key_SD @ query_D / (WIDTH**0.5 if name == "scaled_dot" else 1)


def _oracle(model: RecurrentModel, source_S: Tensor, target_in_T: Tensor) -> Tensor:
    """Final states [T, D] of one pair without padding, position by position."""
    kind, is_lstm = model.config.kind, model.config.kind == "lstm"
    table = model.matrices["shared"].weight
    zeros = [torch.zeros(WIDTH)] * (2 if is_lstm else 1)
    states_SD = table[source_S]
    for layer in model.encoder:
        inputs_SD = layer.norm(states_SD)
        there = torch.stack([*_read(kind, layer.forwards.unit, inputs_SD, zeros)])
        back = torch.stack([*_read(kind, layer.backwards.unit, inputs_SD.flip(0), zeros)]).flip(0)
        states_SD = states_SD + layer.output(torch.cat([there, back], 1))
    carried = model.bridge(torch.cat([there[-1], back[0]])).chunk(len(model.decoder))
    memory_SD = model.encoder_norm(states_SD)
    states_TD = table[target_in_T]
    for index, (layer, first) in enumerate(zip(model.decoder, carried, strict=True)):
        start = [first.tanh(), first] if is_lstm else [first.tanh()]
        outputs = [*_read(kind, layer.recurrence.unit, layer.norm(states_TD), start)]
        states_TD = states_TD + torch.stack(outputs)
        if index == 0:
            cross, found = model.cross, []
            for state_D in states_TD:
                query_D, key_SD = cross.query(cross.norm(state_D)), cross.key(memory_SD)
                found.append(_score(model, query_D, key_SD).softmax(0) @ memory_SD)
            states_TD = states_TD + cross.output(torch.stack(found))
    return model.decoder_norm(states_TD)


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_equal_to_the_formulas_of_each_pair_alone(kind: str, attention: str) -> None:
    model = _model(kind, attention=attention, dropout=0.0)
    source, target_in, target_out = _batch()
    hidden = model(source, target_in)
    loss = model.training_loss(source, target_in, target_out, 0.0)[0]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected_loss = torch.zeros(())
    for row in range(4):
        num_source, num_target = int((source[row] != 0).sum()), int((target_out[row] != 0).sum())
        states = _oracle(model, source[row, :num_source], target_in[row, :num_target])
        torch.testing.assert_close(hidden[row, :num_target], states, rtol=0, atol=1e-5)
        expected_loss = expected_loss + functional.cross_entropy(
            model.project(states), target_out[row, :num_target], reduction="sum"
        )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    model = _model(kind).eval()
    source, target_in, _ = _batch()
    hidden = model(source, target_in)
    wider = functional.pad(source, (0, 5)), functional.pad(target_in, (0, 4))
    torch.testing.assert_close(model(*wider)[:, :6], hidden, rtol=0, atol=1e-5)
    # Not even what stands where a padded target is read.
    target_in[1, 2:] = 9
    torch.testing.assert_close(model(source, target_in)[1, :2], hidden[1, :2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_steps_equal_one_pass(kind: str, attention: str) -> None:
    model = _model(kind, attention=attention).eval()
    source, target_in, _ = _batch()
    hidden = model(source, target_in)
    cross = model.attention_maps(source, target_in)["cross"]
    assert cross.shape == (1, 4, 1, 6, 7)
    assert cross.dtype == torch.float32
    torch.testing.assert_close(cross.sum(-1), torch.ones(cross.shape[:-1]))
    assert not cross[:, 1, :, :, 3:].any()
    with torch.inference_mode():
        state, record = model.start(source, 2), list[Tensor]()
        for position in range(6):
            # Two hypotheses of every sentence, the second always of the wrong past.
            ids = torch.stack([target_in[:, position], torch.full((4,), 5)], 1).flatten()
            stepped = model.step(ids, state, record).view(4, 2, -1)
            torch.testing.assert_close(stepped[:, 0], hidden[:, position], rtol=0, atol=2e-5)
            torch.testing.assert_close(
                record[-1][:, :, :1], cross[0][:, :, position : position + 1]
            )
            state.reorder(torch.tensor([[0, 0]] * 4))


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_finds_what_uncached_search_finds(kind: str) -> None:
    model = _model(kind, seed=3).eval()
    source, _, _ = _batch()
    options = SearchOptions(beam=3, num_best=3, length_penalty=0.0, max_extra_length=4)
    found = search([model], source, options)
    for row in range(4):
        num_source = int((source[row] != 0).sum())
        alone = _uncached_beam(model, source[row : row + 1, :num_source], options)
        assert [hypothesis.ids for hypothesis in found[row]] == [ids for ids, _ in alone]
        scores = [score for _, score in alone]
        assert [hypothesis.score for hypothesis in found[row]] == pytest.approx(scores, abs=1e-4)


def _uncached_beam(
    model: RecurrentModel, source: Tensor, options: SearchOptions
) -> list[tuple[list[int], float]]:
    """Beam search of one sentence over whole prefixes; no rule for length."""
    limit = source.size(1) + options.max_extra_length
    going: list[tuple[list[int], float]] = [([1], 0.0)]
    ended: list[tuple[list[int], float]] = []
    while going and len(ended) < options.beam:
        candidates = []
        for ids, total in going:
            with torch.no_grad():
                logits = model.project(model(source, torch.tensor([ids]))[0, -1])
            log_probs = logits.log_softmax(0)
            allowed = [2] if len(ids) == limit else [2, *range(4, VOCAB)]
            candidates += [([*ids, piece], total + float(log_probs[piece])) for piece in allowed]
        candidates.sort(key=lambda one: -one[1])
        ended += [(ids[1:-1], score) for ids, score in candidates[: options.beam] if ids[-1] == 2]
        going = [one for one in candidates[: 2 * options.beam] if one[0][-1] != 2][: options.beam]
        if len(ended) >= options.num_best:
            best = sorted((score for _, score in ended), reverse=True)
            going = going if going and going[0][1] > best[options.num_best - 1] else []
    return sorted(ended, key=lambda one: -one[1])[: options.num_best]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_close_to_float32(kind: str, how: str) -> None:
    model = _model(kind, dropout=0.0)
    batch = _batch()
    exact, _ = model.training_loss(*batch, 0.1)
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss_sum, nll_sum = model.training_loss(*batch, 0.1)
    halves = torch.autograd.grad(loss_sum, list(model.parameters()))
    assert loss_sum.dtype == nll_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, exact, rtol=0.02, atol=0)
    flat = [torch.cat([g.flatten().float() for g in group]) for group in (gradients, halves)]
    assert float(functional.cosine_similarity(*flat, dim=0)) > 0.99
    assert float(flat[1].norm() / flat[0].norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_read_is_finite(kind: str) -> None:
    model = _model(kind)
    source, target_in, target_out = _batch()
    source[1] = 0
    loss_sum, _ = model.training_loss(source, target_in, target_out, 0.1)
    loss_sum.backward()
    assert bool(torch.isfinite(loss_sum))
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
    # A rank without sentences takes part in a step's collectives.
    model.zero_grad()
    empty = torch.zeros(0, 4, dtype=torch.int64)
    loss_sum, nll_sum = model.training_loss(empty, empty, empty, 0.1)
    loss_sum.backward()
    assert float(loss_sum.detach()) == float(nll_sum) == 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_state_repeats_a_step_bitwise(kind: str) -> None:
    model = _model(kind, dropout=0.3).bfloat16()
    batch = _batch()

    def step() -> list[Tensor]:
        loss = model.training_loss(*batch, 0.1)[0]
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    state = torch.get_rng_state()
    first, second = step(), step()
    torch.set_rng_state(state)
    assert all(torch.equal(*pair) for pair in zip(step(), first, strict=True))
    assert not torch.equal(first[0], second[0])
    model.eval()
    assert torch.equal(model(*batch[:2]), model(*batch[:2]))


@pytest.mark.parametrize(
    ("kind", "attention", "tied"),
    [
        *((kind, "additive", False) for kind in KINDS),
        *((*case, True) for case in CASES),
    ],
)
def test_parameters_and_operations_are_those_reckoned(
    kind: str, attention: str, tied: bool
) -> None:
    config = _config(kind, attention=attention, tie_embeddings=tied)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(config, VOCAB).parameters())
    assert count == num_parameters(config, VOCAB)
    if tied:
        # The bridge is left out of the reckoning.
        bridge = 5 * 2 * (2 * WIDTH) * (3 * WIDTH)
        counted = counted_by_torch(config, VOCAB, [(5, 9, 7)])
        assert batch_flops(config, VOCAB, [9] * 5, [7] * 5) == counted - bridge


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_is_as_large_as_the_transformer_s(kind: str) -> None:
    assert set(PRESETS[kind]) >= {"tiny", "base"}  # type: ignore[index]
    transformer = num_parameters(ModelConfig(preset="tiny"), 6000)
    size = num_parameters(ModelConfig.model_validate({"kind": kind, "preset": "tiny"}), 6000)
    assert size == pytest.approx(transformer, rel=0.1)


def test_an_lstm_begins_with_open_forget_gates() -> None:
    torch.manual_seed(0)
    unit = Recurrence(_config("lstm")).unit
    biases = unit.bias_ih_l0 + unit.bias_hh_l0
    assert biases.tolist() == [0.0] * WIDTH + [1.0] * WIDTH + [0.0] * (2 * WIDTH)
    for gate in unit.weight_hh_l0.detach().split(WIDTH):
        torch.testing.assert_close(gate @ gate.T, torch.eye(WIDTH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_to_copy(kind: str) -> None:
    model = _model(kind, d_model=32, dropout=0.0, encoder_layers=1, decoder_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    nll = 99.0
    for _ in range(150):
        source = torch.randint(4, VOCAB, (32, 5), generator=generator)
        target_in = torch.cat([torch.ones(32, 1, dtype=torch.int64), source[:, :-1]], 1)
        loss_sum, nll_sum = model.training_loss(source, target_in, source, 0.0)
        optimizer.zero_grad()
        (loss_sum / source.numel()).backward()
        optimizer.step()
        nll = float(nll_sum) / source.numel()
    # Uniform guessing costs 3.5 nats.
    assert nll < 0.5
