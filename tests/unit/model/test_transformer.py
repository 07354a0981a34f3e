"""The whole model against torch.nn.Transformer with the same weights, and its invariances."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.build import build
from model.config import ModelConfig
from model.layers import sinusoids
from model.presets import PRESETS
from model.transformer import Transformer

VOCAB = 37


def _config(**settings: Any) -> ModelConfig:
    values = {
        "d_model": 32,
        "d_ff": 48,
        "num_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 3,
        **settings,
    }
    return ModelConfig.model_validate(values)


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


def _model(seed: int = 0, **settings: Any) -> Transformer:
    torch.manual_seed(seed)
    model = build(_config(**settings), VOCAB)
    # Zero biases and unit gains would hide a wrong place of either.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean().detach()), std=0.1)
    return model


def _names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter names -> those of nn.Transformer, in the order in which ours joins them."""
    names: dict[str, list[str]] = {}

    def pair(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = [f"{theirs}.{kind}"]

    def attention(ours: str, theirs: str, *, over_memory: bool) -> None:
        for kind in ("weight", "bias"):
            joined = f"{theirs}.in_proj_{kind}"
            if over_memory:
                names[f"{ours}.query.{kind}"] = [f"{joined}:0:1"]
                names[f"{ours}.key_value.{kind}"] = [f"{joined}:1:3"]
            else:
                names[f"{ours}.query_key_value.{kind}"] = [f"{joined}:0:3"]
        pair(f"{ours}.output", f"{theirs}.out_proj")

    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(layers):
            ours, theirs = f"{side}.{layer}", f"{side}.layers.{layer}"
            attention(f"{ours}.attention", f"{theirs}.self_attn", over_memory=False)
            pair(f"{ours}.attention_norm", f"{theirs}.norm1")
            pair(f"{ours}.feed_forward.inner", f"{theirs}.linear1")
            pair(f"{ours}.feed_forward.outer", f"{theirs}.linear2")
            last = "norm3" if side == "decoder" else "norm2"
            pair(f"{ours}.feed_forward_norm", f"{theirs}.{last}")
            if side == "decoder":
                attention(f"{ours}.cross", f"{theirs}.multihead_attn", over_memory=True)
                pair(f"{ours}.cross_norm", f"{theirs}.norm2")
        if config.norm == "pre":
            pair(f"{side}_norm", f"{side}.norm")
    return names


def _part(tensors: dict[str, Tensor], name: str, width: int) -> Tensor:
    name, *bounds = name.split(":")
    if not bounds:
        return tensors[name]
    first, last = (int(bound) * width for bound in bounds)
    return tensors[name][first:last]


class _Oracle(nn.Module):
    """Embedding, torch.nn.Transformer and softmax with our weights."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        config = ours.config
        self.config, self.width = config, config.d_model
        self.core = nn.Transformer(
            config.d_model,
            config.num_heads,
            config.encoder_layers,
            config.decoder_layers,
            config.d_ff,
            dropout=0.0,
            batch_first=True,
            norm_first=config.norm == "pre",
        )
        if config.norm == "post":
            # The paper's layers end in a norm already.
            self.core.encoder.norm = self.core.decoder.norm = None
        self.table = nn.Parameter(ours.matrices["shared"].weight.detach().clone())
        theirs = {name: tensor.detach() for name, tensor in self.core.named_parameters()}
        for name, (other,) in _names(config).items():
            _part(theirs, other, self.width).copy_(ours.get_parameter(name).detach())

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        padding = source == 0
        positions = sinusoids(64, self.width, source.device, torch.float32)
        embed = lambda ids: self.table[ids] * self.width**0.5 + positions[: ids.size(1)]  # noqa: E731
        return self.core(
            embed(source),
            embed(target_in),
            tgt_mask=torch.ones(target_in.size(1), target_in.size(1)).triu(1).bool(),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_equals_torch_nn_transformer_with_gradients(norm: str, padded: bool) -> None:
    ours = _model(norm=norm, dropout=0.0)
    oracle = _Oracle(ours)
    source, target_in, target_out = _batch(padded=padded)

    hidden, expected = ours(source, target_in), oracle(source, target_in)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.project(hidden), expected @ oracle.table.T, rtol=0, atol=2e-5)

    loss_sum, nll_sum = ours.training_loss(source, target_in, target_out, 0.1)
    loss_sum.backward()
    flat = (expected @ oracle.table.T).flatten(0, 1), target_out.flatten()
    expected_loss = functional.cross_entropy(
        *flat, ignore_index=0, label_smoothing=0.1, reduction="sum"
    )
    expected_loss.backward()
    expected_nll = functional.cross_entropy(*flat, ignore_index=0, reduction="sum")
    torch.testing.assert_close(loss_sum, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(nll_sum, expected_nll.detach(), rtol=1e-5, atol=0)

    gradients = {n: p.grad for n, p in oracle.core.named_parameters() if p.grad is not None}
    names = _names(ours.config)
    assert {n for n, _ in ours.named_parameters()} == {*names, "matrices.shared.weight"}
    for name, (other,) in names.items():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, _part(gradients, other, 32), rtol=1e-4, atol=2e-5
        )
    torch.testing.assert_close(
        ours.matrices["shared"].weight.grad, oracle.table.grad, rtol=1e-4, atol=5e-5
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_later_target_never_changes_an_earlier_output(norm: str) -> None:
    model = _model(norm=norm).eval()
    source, target_in, _ = _batch(padded=False)
    hidden = model(source, target_in)
    for position in range(1, 6):
        changed = target_in.clone()
        changed[:, position:] = 5 + (changed[:, position:] - 4) % (VOCAB - 5)
        assert not torch.equal(changed, target_in)
        other = model(source, changed)
        torch.testing.assert_close(other[:, :position], hidden[:, :position], rtol=0, atol=1e-6)
        assert float((other[:, position] - hidden[:, position]).abs().max().detach()) > 1e-3


def test_padding_changes_nothing() -> None:
    model = _model().eval()
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


@pytest.mark.parametrize("preset", ["tiny", "base", "big"])
def test_parameter_counts(preset: Literal["tiny", "base", "big"]) -> None:
    with torch.device("meta"):
        model = build(ModelConfig(preset=preset), 37_000)
    shape = PRESETS["transformer"][preset]
    d_model, d_ff = shape["d_model"], shape["d_ff"]
    attention = 4 * (d_model * d_model + d_model)
    feed_forward = 2 * d_model * d_ff + d_ff + d_model
    norm = 2 * d_model
    expected = (
        37_000 * d_model
        + shape["encoder_layers"] * (attention + feed_forward + 2 * norm)
        + shape["decoder_layers"] * (2 * attention + feed_forward + 3 * norm)
        + (2 * norm if shape["norm"] == "pre" else 0)
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == expected
    # Table 3 says 65 and 213 million.
    published = {"base": 65e6, "big": 213e6}.get(preset)
    assert published is None or count == pytest.approx(published, rel=0.04)


def test_untied_embeddings_are_three_matrices() -> None:
    model = _model(tie_embeddings=False, positions="learned")
    model.training_loss(*_batch(), 0.1)[0].backward()
    assert set(model.matrices) == {"source", "target", "softmax"}
    assert all(parameter.grad is not None for parameter in model.parameters())
    tied = _model(positions="learned")
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tied.parameters())
    assert count == 2 * VOCAB * 32


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_close_to_float32(norm: str, how: str) -> None:
    model = _model(norm=norm, dropout=0.0)
    batch = _batch()
    exact, exact_nll = model.training_loss(*batch, 0.1)
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss_sum, nll_sum = model.training_loss(*batch, 0.1)
    halves = torch.autograd.grad(loss_sum, list(model.parameters()))
    assert loss_sum.dtype == nll_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, exact, rtol=0.02, atol=0)
    torch.testing.assert_close(nll_sum, exact_nll, rtol=0.02, atol=0)
    flat = [torch.cat([g.flatten().float() for g in group]) for group in (gradients, halves)]
    assert float(functional.cosine_similarity(*flat, dim=0)) > 0.99
    assert float(flat[1].norm() / flat[0].norm()) == pytest.approx(1, abs=0.05)


def test_a_source_of_padding_alone_is_finite() -> None:
    model = _model()
    source, target_in, target_out = _batch()
    source[1] = 0
    loss_sum, _ = model.training_loss(source, target_in, target_out, 0.1)
    loss_sum.backward()
    assert bool(torch.isfinite(loss_sum))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_an_empty_batch_has_zero_loss_and_gradients() -> None:
    # So that a rank without sentences can take part in a step's collectives.
    model = _model()
    empty = torch.zeros(0, 4, dtype=torch.int64)
    loss_sum, nll_sum = model.training_loss(empty, empty, empty, 0.1)
    loss_sum.backward()
    assert float(loss_sum.detach()) == float(nll_sum) == 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_dropout_is_repeated_by_the_generator_state_and_off_in_evaluation() -> None:
    model = _model(dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)
    batch = _batch()
    state = torch.get_rng_state()
    first = model.training_loss(*batch, 0.1)[0]
    second = model.training_loss(*batch, 0.1)[0]
    torch.set_rng_state(state)
    assert torch.equal(model.training_loss(*batch, 0.1)[0], first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(*batch[:2]), model(*batch[:2]))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_maps_are_the_weights_behind_the_output(norm: str) -> None:
    model = _model(norm=norm).eval()
    source, target_in, _ = _batch()
    maps = model.attention_maps(source, target_in)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == {
        "encoder": (2, 4, 4, 7, 7),
        "decoder": (3, 4, 4, 6, 6),
        "cross": (3, 4, 4, 6, 7),
    }
    for weights in maps.values():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not maps["encoder"][:, 1, :, :, 3:].any()
    assert not maps["cross"][:, 1, :, :, 3:].any()
    assert not maps["decoder"].triu(1).any()

    # The first encoder layer's, by the formula from the embeddings.
    positions = sinusoids(64, 32, source.device, torch.float32)
    states = model.matrices["shared"].weight[source] * 32**0.5 + positions[:7]
    layer = model.encoder[0]
    inputs = layer.attention_norm(states) if norm == "pre" else states
    joined = layer.attention.query_key_value
    query, key, _ = (inputs @ joined.weight.T + joined.bias).view(4, 7, 3, 4, 8).unbind(2)
    scores = torch.einsum("bqhk,bshk->bhqs", query, key) / 8**0.5
    scores = scores.masked_fill((source == 0)[:, None, None, :], -1e9)
    torch.testing.assert_close(maps["encoder"][0], scores.softmax(-1).detach(), rtol=0, atol=1e-6)


def test_steps_over_caches_equal_one_pass() -> None:
    model = _model().eval()
    source, target_in, _ = _batch()
    hidden = model(source, target_in)
    with torch.no_grad():
        state = model.start(source, 1)
        stepped = [model.step(target_in[:, position], state) for position in range(6)]
    torch.testing.assert_close(torch.stack(stepped, 1), hidden.detach(), rtol=0, atol=2e-5)


def test_a_model_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = build(_config(norm="pre", dropout=0.0, encoder_layers=1, decoder_layers=1), VOCAB)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    nll = 99.0
    for _ in range(120):
        source = torch.randint(4, VOCAB, (32, 5), generator=generator)
        target_in = torch.cat([torch.ones(32, 1, dtype=torch.int64), source[:, :-1]], 1)
        loss_sum, nll_sum = model.training_loss(source, target_in, source, 0.0)
        optimizer.zero_grad()
        (loss_sum / source.numel()).backward()
        optimizer.step()
        nll = float(nll_sum) / source.numel()
    # Uniform guessing costs 3.5 nats.
    assert nll < 0.5
