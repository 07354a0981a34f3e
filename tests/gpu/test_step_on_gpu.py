"""The step on a real device: batches copied ahead, the compiled layers, the losses, TF32, fp8."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from data_shards.errors import UserError
from model import packed
from model.build import build
from model.config import ModelConfig
from model.loss import fused_projection_loss
from model.loss_liger import liger_projection_loss
from model.packing import pack, unpack
from tests.gpu.test_packed_on_gpu import _LENGTHS, model_of, results
from tests.unit.model.test_packed import batch
from tests.unit.trainer.test_device_batches import steps
from tests.unit.trainer.test_device_step import config
from trainer.device_batches import DeviceBatches, Packer
from trainer.device_step import compiled_call, prepare_device_step

pytestmark = pytest.mark.gpu


def test_steps_arrive_on_the_device_as_they_were_read(device: torch.device) -> None:
    """The compute stream is kept busy, so that a copy it did not wait for would be seen."""
    busy = torch.randn((4096, 4096), device=device)
    expected = [pack([ids(one) for one in step.batches], bucketed=True)[0] for step in steps(40)]
    with DeviceBatches(steps(40), Packer(3, bucketed=True), device) as ready:
        for step, buffer in zip(ready, expected, strict=True):
            for _ in range(5):
                busy = busy @ busy * 1e-3
            [one] = step.passes
            assert one.ids[0].device.type == "cuda"
            assert one.packing is not None
            found = torch.cat([one.ids[0].cpu(), one.packing.source.positions_N.cpu()])
            assert torch.equal(found, buffer[: found.numel()])
            assert one.packing.source.starts_B.dtype == torch.int32


def ids(one: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(getattr(one, n) for n in ("source_BS", "target_in_BT", "target_out_BT"))  # type: ignore[return-value]


def test_memory_of_a_step_is_not_given_away_before_it_was_used(device: torch.device) -> None:
    """Steps come faster than they are used; each is summed late, on the compute stream."""
    busy = torch.randn((4096, 4096), device=device)
    sums, expected = [], []
    with DeviceBatches(steps(60), Packer(3), device) as ready:
        for step in ready:
            for _ in range(10):
                busy = busy @ busy * 1e-3
            sums.append(sum(one.ids[0].sum() + one.ids[2].sum() for one in step.passes))
            expected.append(
                sum(int(b.source_BS.sum() + b.target_out_BT.sum()) for b in step.batches)
            )
    assert [int(value) for value in sums] == expected


def test_a_gpu_packs_unless_it_is_told_otherwise(device: torch.device) -> None:
    for settings, packs in (
        ({"precision": "bf16"}, True),
        ({"precision": "bf16", "batches": "padded"}, False),
        ({"precision": "fp32"}, False),
    ):
        run = config(**settings)
        found = prepare_device_step(run, build(run.model, 20).to(device), device, lambda n: n)
        assert (found.packer.lanes_together is not None) == packs
        assert found.ahead
    run = config(precision="fp32", batches="packed")
    model = build(run.model, 20).to(device)
    with pytest.raises(UserError, match="fp32"):
        prepare_device_step(run, model, device, lambda n: n)


def test_tf32_is_what_was_asked_for(device: torch.device) -> None:
    for tf32, expected in ((True, "high"), (False, "highest")):
        run = config(precision="fp32", tf32=tf32)
        prepare_device_step(run, build(run.model, 20).to(device), device, lambda n: n)
        assert torch.get_float32_matmul_precision() == expected


@pytest.fixture(autouse=True)
def _precision_as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_are_near_those_as_they_are(device: torch.device) -> None:
    model = model_of(device).bfloat16()
    call = compiled_call()
    for lengths in (_LENGTHS, _LENGTHS[:4], _LENGTHS * 3):
        buffer, layout = pack([batch(lengths)], bucketed=True)
        *arguments, packing = unpack(buffer.to(device), layout)
        found = []
        for model.call_layer in (packed.call_layer, call):
            found.append(results(model, *arguments, 0.1, packing))
        for one, other in zip(*found, strict=True):
            assert (one - other).norm() <= 0.03 * one.norm() + 1e-3


@pytest.mark.filterwarnings("ignore")
def test_compiling_is_tried_and_taken(device: torch.device) -> None:
    run = config(precision="bf16", compile=True)
    model = build(run.model, 20).to(device)
    found = prepare_device_step(run, model, device, lambda n: n)
    assert found.eager_because is None
    assert found.packer.bucketed


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no liger-kernel")
def test_ligers_loss_is_ours(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn((700, 64), device=device, generator=generator)
    weight = torch.randn((1000, 64), device=device, generator=generator) * 0.2
    targets = torch.randint(0, 1000, (700,), device=device, generator=generator)
    targets[::9] = 0
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for compute in (fused_projection_loss, liger_projection_loss):
            h, w = (part.to(dtype).requires_grad_() for part in (hidden, weight))
            loss, nll = compute(h, w, targets, 0.1)
            loss.backward()
            found.append([part.detach().float() for part in (loss, nll, h.grad, w.grad)])
    exact, own_exact, own, liger = found[0], found[1], found[2], found[3]
    for one, other in zip(exact, own_exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    for one, other, reference in zip(own, liger, exact, strict=True):
        assert (other - reference).norm() < 2 * (one - reference).norm() + 1e-3 * reference.norm()


def test_big_trains_25000_tokens_a_side_in_80_gb(device: torch.device) -> None:
    """One pass, as reckoned: no activations are computed twice."""
    shape = ModelConfig(preset="big")
    model = build(shape, 37_000).to(device).bfloat16().train()
    buffer, layout = pack([batch([(50, 50)] * 500)], bucketed=True)
    *arguments, packing = unpack(buffer.to(device), layout)
    torch.cuda.reset_peak_memory_stats(device)
    drawn = packed.with_dropout(packing, shape, layout.lanes, [1])
    model(*arguments, 0.1, drawn)[0].backward()
    assert torch.cuda.max_memory_allocated(device) < 30e9
