"""What is decided of a rank's step, and what is said where it cannot be had."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_shards.errors import UserError
from model import packed
from model.build import build
from model.loss import fused_projection_loss
from model.transformer import Transformer
from trainer import device_step
from trainer.config import RunConfig, parse_config
from trainer.device_step import DeviceStep, prepare_device_step
from trainer.paper.memory import memory

_CPU = torch.device("cpu")
_SHAPE = {"d_model": 16, "d_ff": 16, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}


def config(*, model: dict[str, Any] | None = None, **trainer: Any) -> RunConfig:
    data = {"tokens_per_step": 1000, "lanes": 10, "max_length": 20}
    values = {"model": {**_SHAPE, **(model or {})}, "data": data, "trainer": trainer}
    return parse_config(values, where="test")


def prepared(run: RunConfig, *, refusals: float = 0.0) -> tuple[DeviceStep, Transformer]:
    model = build(run.model, 20)
    assert isinstance(model, Transformer)
    found = prepare_device_step(run, model, _CPU, lambda n: [n[0] + refusals])
    return found, model


def test_a_cpu_computes_padded_lanes_as_they_come() -> None:
    found, model = prepared(config())
    assert not found.ahead
    assert found.packer.lanes_together is None
    assert model.call_layer is packed.call_layer
    assert found.described()["batches"] == "padded"


def test_as_many_lanes_are_packed_as_a_pass_has_room_for() -> None:
    found, _ = prepared(config(batches="packed", tokens_per_pass=350))
    assert (found.packer.lanes_together, found.packer.bucketed, found.ahead) == (3, False, True)
    found, _ = prepared(config(batches="packed", tokens_per_pass=1))
    assert found.packer.lanes_together == 1


def test_packed_batches_on_a_cpu_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepared(config())
        assert not caplog.text
        prepared(config(batches="packed"))
    assert "sentence by sentence on a CPU" in caplog.text


def test_what_cannot_be_packed_is_an_error_where_it_was_asked_for() -> None:
    with pytest.raises(UserError, match=r"trainer\.batches: packed cannot be had: .*additive"):
        prepared(config(batches="packed", model={"attention": "additive"}))
    with pytest.raises(UserError, match="another rank's device"):
        prepared(config(batches="packed"), refusals=1.0)


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"trainer\.loss: liger computes on a GPU"):
        prepared(config(loss="liger"))

    class Gpu:  # which is a CPU
        type = "cuda"

    def tried(precision: str = "fp32") -> str:
        model = build(config().model, 20)
        with pytest.raises(UserError) as error:
            device_step._use_liger(model, precision, cast(Any, Gpu), lambda n: n)
        return str(error.value)

    monkeypatch.setattr(device_step, "is_installed", lambda: False)
    assert "pip install 'babelray[liger]', or use own" in tried()
    monkeypatch.setattr(device_step, "is_installed", lambda: True)

    def broken(*_: object) -> Any:
        raise ImportError("no Triton\nhere")

    monkeypatch.setattr(device_step, "liger_projection_loss", broken)
    monkeypatch.setattr(Tensor, "to", placed_on_the_cpu(Tensor.to, Gpu))
    assert tried() == ("trainer.loss: liger does not run here: ImportError: no Triton, or use own")

    def wrong(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return fused_projection_loss(hidden * 1.1, weight, *rest)

    monkeypatch.setattr(device_step, "liger_projection_loss", wrong)
    assert "other numbers" in tried()
    monkeypatch.setattr(device_step, "liger_projection_loss", fused_projection_loss)
    for precision in ("fp32", "bf16"):
        model = build(config().model, 20)
        device_step._use_liger(model, precision, cast(Any, Gpu), lambda n: n)
        assert model.matrices["shared"].projection_loss is fused_projection_loss
    with pytest.raises(UserError, match="another rank's device cannot, or use own"):
        device_step._use_liger(model, "fp32", cast(Any, Gpu), lambda n: [n[0] + 1])


def placed_on_the_cpu(to: Any, stand_in: object) -> Any:
    def moved(tensor: Tensor, *places: Any) -> Tensor:
        return cast(Tensor, to(tensor, *(_CPU if p is stand_in else p for p in places)))

    return moved


def test_lanes_are_computed_together_as_far_as_every_device_has_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = config(precision="bf16", batches="packed", tokens_per_pass=700)
    model = build(run.model, 20)

    def needed(num_lanes: int) -> float:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        of = memory(
            run.model, run.trainer, stage=1, num_parameters=parameters, num_devices=1,
            vocab_size=20, tokens_per_lane=100 * num_lanes,
        )  # fmt: skip
        assert of.total is not None
        return of.total

    def together(room: float, most: int = 7, others: tuple[int, ...] = ()) -> int:
        def total(numbers: list[float]) -> list[float]:
            if len(numbers) == 1:  # of one rank each
                return [float(1 + len(others))]
            return [n + others.count(lanes) for lanes, n in enumerate(numbers, 1)]

        return device_step._together_in(room, run, model, most, total)

    assert together(needed(7) / 0.8 + 1) == 7
    assert together(needed(10) / 0.8 + 1, most=25) == 25  # there are only ten lanes
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert together(needed(7) / 0.8 - 1) == 6
    assert "6 of 7 lanes are computed together" in caplog.text
    assert "trainer.tokens_per_pass=600" in caplog.text
    assert together(0) == 1
    assert together(1e12, others=(3,)) == 3  # two ranks, five lanes each


def test_what_cannot_be_compiled_is_computed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        def call(*_: Any) -> Any:
            raise FileNotFoundError("no working C compiler\nhere")

        return call

    monkeypatch.setattr(device_step, "compiled_call", broken)
    with caplog.at_level(logging.WARNING):
        found, model = prepared(config(batches="packed", compile=True))
    assert found.eager_because == "FileNotFoundError: no working C compiler"
    assert not found.packer.bucketed
    assert model.call_layer is packed.call_layer
    assert "layers are not compiled: FileNotFoundError" in caplog.text
    found, _ = prepared(config(compile=True))
    assert found.eager_because == "trainer.batches is padded"
    found, _ = prepared(config(batches="packed", compile=True, zero_stage=3))
    assert "ZeRO 3" in (found.eager_because or "")


def test_what_is_compiled_was_tried_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def watched() -> Any:
        def call(layer: Any, *arguments: Any) -> Any:
            output = packed.call_layer(layer, *arguments)
            output.register_hook(lambda _: called.append(type(layer).__name__))
            return output

        return call

    monkeypatch.setattr(device_step, "compiled_call", watched)
    found, model = prepared(config(batches="packed", compile=True))
    assert called == ["EncoderLayer", "DecoderLayer"]
    assert found.packer.bucketed
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of
def test_compiled_layers_compute_what_they_do_as_they_are() -> None:
    from model.packing import pack, unpack
    from tests.unit.model.test_packed import batch, model_of, results

    model = model_of()
    call = device_step.compiled_call()
    for lengths in ([(3, 5), (6, 4)], [(9, 2), (5, 5), (4, 40)]):
        source, target_in, target_out, packing = unpack(*pack([batch(lengths)], bucketed=True))
        arguments = source, target_in, target_out, 0.1, packing
        model.call_layer = packed.call_layer
        expected = results(model, *arguments)
        model.call_layer = call
        for one, other in zip(results(model, *arguments), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
