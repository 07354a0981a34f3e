"""Packed sequences compute what padded batches do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import packed_check
from model.build import build
from model.config import ModelConfig
from model.packed import Packing, varlen_attention, with_dropout
from model.packed_check import why_not
from model.packing import Packed, bucket, pack, unpack
from model.transformer import Transformer

_SHAPE = {"d_model": 16, "d_ff": 24, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
_LENGTHS = [(3, 5), (1, 2), (7, 1), (7, 9), (2, 4)]


def batch(lengths: list[tuple[int, int]], seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch of pairs of these lengths, end signs included."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros((len(lengths), max(s for s, _ in lengths)), dtype=torch.int64)
    target_in, target_out = torch.zeros((2, len(lengths), max(t for _, t in lengths))).long()
    for row, (s, t) in enumerate(lengths):
        source[row, :s] = torch.randint(4, 30, (s,), generator=generator)
        target_out[row, :t] = torch.randint(4, 30, (t,), generator=generator)
        target_out[row, t - 1] = 2
        target_in[row, :t] = torch.cat([torch.tensor([1]), target_out[row, : t - 1]])
    return source, target_in, target_out


def packed(*batches: tuple[Tensor, Tensor, Tensor], bucketed: bool = False) -> Packed:
    return unpack(*pack(batches, bucketed=bucketed))


def model_of(**settings: Any) -> Transformer:
    torch.manual_seed(3)
    model = build(ModelConfig.model_validate({**_SHAPE, "dropout": 0.0, **settings}), 30)
    assert isinstance(model, Transformer)
    return model.train()


def results(model: Transformer, *arguments: Any) -> list[Tensor]:
    """The two losses and every gradient."""
    model.zero_grad()
    loss, nll = model(*arguments)
    loss.backward()
    return [loss.detach(), nll, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "pre", "tie_embeddings": False, "attention": "dot"},
        {"local_radius": 2, "positions": "learned", "d_k": 4, "d_v": 4},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_padded_batches(
    settings: dict[str, Any], bucketed: bool
) -> None:
    model = model_of(**settings)
    padded = batch(_LENGTHS)
    source, target_in, target_out, packing = packed(padded, bucketed=bucketed)
    assert source.numel() == (64 if bucketed else 20)
    expected = results(model, *padded, 0.1)
    found = results(model, source, target_in, target_out, 0.1, packing)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_states_are_those_of_padded_batches_in_bf16() -> None:
    model = model_of().to(torch.bfloat16).eval()
    source, target_in, target_out = batch(_LENGTHS)
    expected = model(source, target_in)[target_out != 0]
    ids, inputs, _, packing = packed((source, target_in, target_out))
    torch.testing.assert_close(model(ids, inputs, packing=packing), expected, rtol=0.03, atol=0.03)


def test_lanes_computed_together_drop_what_they_drop_alone() -> None:
    model = model_of(dropout=0.3, norm="pre")
    lanes = [batch(_LENGTHS, 1), batch(_LENGTHS[:2], 2), batch(_LENGTHS[1:], 3)]
    seeds = [11, 12, 13]

    def computed(which: list[int]) -> list[Tensor]:
        buffer, layout = pack([lanes[index] for index in which], bucketed=True)
        source, target_in, target_out, packing = unpack(buffer, layout)
        drawn = with_dropout(packing, model.config, layout.lanes, [seeds[i] for i in which])
        return results(model, source, target_in, target_out, 0.1, drawn)

    together = computed([0, 1, 2])
    alone = [torch.stack(parts).sum(0) for parts in zip(*map(computed, ([0], [1], [2])))]  # noqa: B905
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    seeds[1] = 99
    assert not torch.equal(computed([0, 1, 2])[0], together[0])


def test_dropout_keeps_as_much_as_it_should() -> None:
    config = ModelConfig.model_validate({**_SHAPE, "dropout": 0.25})
    buffer, layout = pack([batch(_LENGTHS)], bucketed=False)
    packing = unpack(buffer, layout).packing
    assert with_dropout(packing, config.model_copy(update={"dropout": 0.0}), (), ()) is packing
    drawn = with_dropout(packing, config, layout.lanes, [5])
    source, target = drawn.source.masks_CND, drawn.target.masks_CND
    assert source is not None
    assert target is not None
    assert source.shape == (5, 20, 16)
    assert target.shape == (7, 21, 16)
    assert abs(source.float().mean().item() - 0.75) < 0.05
    assert abs(target.float().mean().item() - 0.75) < 0.05
    assert not torch.equal(source[0], source[1])
    # Fillers beside a lane's own tokens change nothing of what it drops; they are kept.
    buffer, filled = pack([batch(_LENGTHS)], bucketed=True)
    wider = with_dropout(unpack(buffer, filled).packing, config, filled.lanes, [5])
    assert wider.source.masks_CND is not None
    assert torch.equal(wider.source.masks_CND[:, :20], source)
    assert wider.source.masks_CND[:, 20:].all()


def test_modules_are_called_in_the_order_of_padded_batches() -> None:
    model = model_of()
    names = {module: name for name, module in model.named_modules()}
    called: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.append(names[module]))
    padded = batch(_LENGTHS)
    model(*padded, 0.1)
    expected = called.copy()
    called.clear()
    ids = packed(padded)
    model(*ids[:3], 0.1, ids.packing)
    assert called == expected


def test_a_packed_buffer_has_everything_once() -> None:
    padded = batch(_LENGTHS)
    source, target_in, target_out, (one, other) = packed(padded, batch([(2, 3)], 7), bucketed=True)
    assert source.numel() == target_in.numel() == target_out.numel() == 64
    assert one.starts_B.dtype == torch.int32
    assert one.starts_B.tolist()[:7] == [0, 3, 4, 11, 18, 20, 22]
    assert other.starts_B.tolist()[:7] == [0, 5, 7, 8, 17, 21, 24]
    # Fillers are dealt to sequences no longer than the longest real one; then come empty ones.
    assert one.starts_B.diff()[6:].tolist()[:7] == [7, 7, 7, 7, 7, 7, 0]
    assert one.starts_B[-1] == other.starts_B[-1] == 64
    assert one.positions_N[:11].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6]
    assert source[:3].tolist() == padded[0][0, :3].tolist()
    assert target_in[[0, 5]].tolist() == [1, 1]
    assert target_out[[4, 6]].tolist() == [2, 2]
    assert not source[22:].any()
    assert (one.longest, other.longest) == (7, 9)


def test_buckets_are_few_and_near() -> None:
    sizes = {bucket(size) for size in range(1, 32_769)}
    assert len(sizes) < 150
    assert all(size <= bucket(size) <= max(64, size * 17 / 16 + 4) for size in range(1, 32_769))
    assert bucket(25_000) == 25_600


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "lstm"}, "lstm"),
        ({"attention": "additive"}, "additive"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"activation_dropout": 0.1}, "activation_dropout"),
        ({"d_k": 4, "d_v": 8}, "d_k"),
    ],
)
def test_what_cannot_be_packed_says_why(settings: dict[str, Any], reason: str) -> None:
    shape = {"d_model": 16} if "kind" in settings else _SHAPE
    config = ModelConfig.model_validate({**shape, **settings})
    assert reason in (why_not(config, "bf16", torch.device("cpu")) or "")


def test_a_gpu_wants_half_precision_and_known_widths() -> None:
    config = ModelConfig.model_validate(_SHAPE)
    assert why_not(config, "fp32", torch.device("cpu")) is None
    assert "fp32" in (why_not(config, "fp32", torch.device("cuda")) or "")
    odd = ModelConfig.model_validate({**_SHAPE, "d_k": 12, "d_v": 12})
    assert "12 wide" in (why_not(odd, "bf16", torch.device("cuda")) or "")


@pytest.mark.parametrize("attention", ["scaled_dot", "dot"])
def test_a_kernel_that_is_wrong_or_missing_is_not_used(
    monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    config = ModelConfig.model_validate({**_SHAPE, "attention": attention})

    def tried(compute: Any) -> str | None:
        monkeypatch.setattr(packed_check, "varlen_attention", compute)
        return packed_check._trial(config, torch.bfloat16, torch.device("cpu"))

    assert tried(varlen_attention) is None
    assert "other numbers" in (tried(lambda q, k, v, *_, **__: q + k.mean() * v.mean()) or "")
    # (What a direction alone would not tell.)
    assert "other numbers" in (tried(lambda *a, **k: varlen_attention(*a, **k) * 1.05) or "")
    assert "other numbers" in (
        tried(lambda *a, **k: varlen_attention(*a, **{**k, "scale": 0.5})) or ""
    )
    with pytest.raises(RuntimeError, match="not for this device"):
        tried(lambda *_, **__: (_ for _ in ()).throw(RuntimeError("not for this device")))


def test_other_kinds_have_no_packed_states() -> None:
    model = build(ModelConfig(kind="lstm", d_model=16, encoder_layers=1, decoder_layers=1), 30)
    ids = torch.ones(3, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="padded"):
        model(ids, ids, packing=Packing(*[None] * 2))


@pytest.mark.slow
def test_the_kernels_interface_takes_what_the_layers_give_it() -> None:
    """On the device "meta" PyTorch checks shapes and types of its kernel, and computes nothing."""
    buffer, layout = pack([batch(_LENGTHS)], bucketed=True)
    for settings in ({}, {"norm": "pre", "local_radius": 3, "d_k": 16, "d_v": 16}):
        model = model_of(**settings).to(device="meta", dtype=torch.bfloat16)
        source, target_in, _, packing = unpack(buffer.to("meta"), layout)
        states = model(source, target_in, packing=packing)
        assert states.shape == (layout.target_tokens, 16)
        states.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
