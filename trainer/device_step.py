"""How a rank computes its steps: what of packing, joining, compiling and kernels its device takes.

Decided once, before training, and alike on all ranks: they make equally many passes, and ZeRO 3
gathers weights in the order in which modules are called.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from model import packed
from model.encoder_decoder import EncoderDecoder
from model.loss import fused_projection_loss
from model.loss_liger import is_installed, liger_projection_loss
from model.packed import PackedLayer, call_layer
from model.packed_check import why_not
from model.packing import pack, unpack
from model.transformer import Transformer
from model.vocabulary_matrix import VocabularyMatrix
from trainer.device_batches import Packer
from trainer.paper.memory import memory

if TYPE_CHECKING:
    from trainer.config import RunConfig

log = logging.getLogger(__name__)

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Of a device's memory that a pass is reckoned into; the rest is for what no formula knows.
_SHARE_OF_MEMORY = 0.8

# Of Liger's numbers in half precision, relative to the model's own loss in float32.
_LIGER_ERROR = 0.03


@dataclass(frozen=True)
class DeviceStep:
    """What was decided.

    Attributes:
        packer: how a step's batches become passes.
        ahead: whether they are brought to the device ahead of the step.
        padded_because: why batches are padded; None where they are packed or none were asked for.
        eager_because: why layers are not compiled; None where they are or need not be.
        loss: whose kernels compute the loss.
    """

    packer: Packer
    ahead: bool
    padded_because: str | None = None
    eager_because: str | None = None
    loss: Literal["own", "liger"] = "own"

    @property
    def computed(self) -> str:
        """What of it can change how sums are rounded: told where a run goes on otherwise."""
        together = self.packer.lanes_together
        lanes = "padded" if together is None else f"packed, lanes together: {together}"
        compiled = ", compiled" if self.packer.bucketed else ""
        return f"{lanes}{compiled}, loss: {self.loss}"

    def described(self) -> dict[str, Any]:
        """For the run's log."""
        return {
            "batches": "padded" if self.packer.lanes_together is None else "packed",
            "padded_because": self.padded_because,
            "lanes_together": self.packer.lanes_together or 1,
            "compiled": self.packer.bucketed,
            "eager_because": self.eager_because,
            "loss": self.loss,
        }


def prepare_device_step(
    config: RunConfig,
    model: EncoderDecoder,
    device: torch.device,
    total: Callable[[list[float]], list[float]],
) -> DeviceStep:
    """Decide, and give the model what was decided (a collective).

    Args:
        model: on the device, before DeepSpeed has it.
        total: sums numbers over all ranks.

    Raises:
        UserError: what the configuration insists on cannot be had.
    """
    trainer = config.trainer
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.set_float32_matmul_precision("high" if trainer.tf32 else "highest")
    if trainer.loss == "liger":
        _use_liger(model, trainer.precision, device, total)
    if trainer.batches == "padded" or (trainer.batches == "auto" and not on_cuda):
        eager = "trainer.batches is padded" if trainer.compile else None
        _tell(None, eager)
        return DeviceStep(Packer(None), on_cuda, None, eager, trainer.loss)
    reason = _agreed(why_not(config.model, trainer.precision, device), total)
    if reason is not None:
        if trainer.batches == "packed":
            raise UserError(
                f"trainer.batches: packed cannot be had: {reason}; leave it at auto, or mend that"
            )
        eager = "batches are padded" if trainer.compile else None
        _tell(reason, eager)
        return DeviceStep(Packer(None), on_cuda, reason, eager, trainer.loss)
    if not on_cuda:
        log.warning(
            "trainer.batches: packed attention is computed sentence by sentence on a CPU, which is "
            "slow: padded or auto is faster"
        )
    eager = None
    if trainer.compile:
        assert isinstance(model, Transformer), "why_not lets only Transformers pass"
        eager = _agreed(_compile(model, config, device), total)
        if eager is not None:
            model.call_layer = call_layer
    lane_tokens = config.data.tokens_per_step // config.data.lanes
    together = max(1, trainer.tokens_per_pass // lane_tokens)
    if on_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device)  # what is reserved holds the weights
        together = _together_in(room, config, model, together, total)
    packer = Packer(together, bucketed=trainer.compile and eager is None)
    _tell(None, eager)
    return DeviceStep(packer, True, None, eager, trainer.loss)


def _tell(padded_because: str | None, eager_because: str | None) -> None:
    if padded_because is not None:
        log.warning("batches are padded, not packed: %s", padded_because)
    if eager_because is not None:
        log.warning("trainer.compile: layers are not compiled: %s", eager_because)


def _agreed(reason: str | None, total: Callable[[list[float]], list[float]]) -> str | None:
    """A reason of any rank is one for all."""
    [num_refusals] = total([float(reason is not None)])
    return reason or ("another rank's device cannot" if num_refusals else None)


def _together_in(
    room_bytes: float,
    config: RunConfig,
    model: EncoderDecoder,
    most: int,
    total: Callable[[list[float]], list[float]],
) -> int:
    """Of how many lanes, ``most`` at most, a pass fits into every rank's device (a collective).

    Args:
        room_bytes: what this rank's device has for the run, the model's weights included.
    """
    world_size = round(total([1.0])[0])
    lane_tokens = config.data.tokens_per_step // config.data.lanes
    num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def needed_bytes(num_lanes: int) -> float:
        reckoned = memory(
            config.model,
            config.trainer,
            stage=config.trainer.zero_stage,
            num_parameters=num_parameters,
            num_devices=world_size,
            vocab_size=model.vocab_size,
            tokens_per_lane=num_lanes * lane_tokens,
        ).total
        assert reckoned is not None, "why_not lets only Transformers pass"
        return reckoned

    wanted = min(most, -(-config.data.lanes // world_size))  # no rank has more
    fitting = wanted
    while fitting > 1 and needed_bytes(fitting) > _SHARE_OF_MEMORY * room_bytes:
        fitting -= 1
    # The least of all ranks, from a sum: how many ranks can have each number.
    able = [0.0] * wanted
    able[fitting - 1] = 1.0
    fitting = 1 + next(index for index, ranks in enumerate(total(able)) if ranks)
    if fitting == wanted:
        return most
    log.warning(
        "%d of %d lanes are computed together, that a pass fits into the device's memory "
        "(this rank's has %.1f GB for the run, of which %.0f %% are counted on); "
        "trainer.tokens_per_pass=%d says the same",
        fitting,
        wanted,
        room_bytes / 1e9,
        100 * _SHARE_OF_MEMORY,
        fitting * lane_tokens,
    )
    return fitting


def _use_liger(
    model: EncoderDecoder,
    precision: str,
    device: torch.device,
    total: Callable[[list[float]], list[float]],
) -> None:
    reason = _agreed(_why_not_liger(model.config.d_model, precision, device), total)
    if reason is not None:
        raise UserError(f"trainer.loss: {reason}, or use own")
    for module in model.modules():
        if isinstance(module, VocabularyMatrix):
            module.projection_loss = liger_projection_loss


def _why_not_liger(d_model: int, precision: str, device: torch.device) -> str | None:
    """Why Liger's loss is not to be had here; None: it was tried, forward and backward."""
    if device.type != "cuda":
        return "liger computes on a GPU: take one"
    if not is_installed():
        return "liger needs the package liger-kernel: pip install 'babelray[liger]'"
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn((8, d_model), generator=generator)
    weight_VD = torch.randn((40, d_model), generator=generator) * d_model**-0.5
    targets_N = torch.tensor([1, 2, 3, 4, 39, 0, 20, 0])

    def computed(compute: Callable[..., Any], place: torch.device, dtype: torch.dtype) -> Any:
        inputs = [part.to(place, dtype).requires_grad_() for part in (hidden_ND, weight_VD)]
        loss, nll = compute(*inputs, targets_N.to(place), 0.1)
        grads = torch.autograd.grad(loss, inputs)
        return [part.detach().float().cpu() for part in (loss, nll, *grads)]

    expected = computed(fused_projection_loss, torch.device("cpu"), torch.float32)
    try:
        found = computed(liger_projection_loss, device, _TYPES[precision])
    except Exception as error:  # whatever ails a compiler of kernels
        return f"liger does not run here: {_first_line(error)}"
    for own, other in zip(expected, found, strict=True):
        # (Written so that it is also false of what is no number.)
        if not (own - other).norm() < _LIGER_ERROR * own.norm():
            return "liger gives other numbers here than the model's own loss"
    return None


def _compile(model: Transformer, config: RunConfig, device: torch.device) -> str | None:
    """Give the model a compiled call of its layers; a reason why there is none.

    One compiled function serves all layers and, because numbers of tokens are left open, all
    batches. It is tried here, forward and backward, on layers of the run's type: a compiler that is
    missing says so before the training and not in it.
    """
    if config.trainer.zero_stage == 3:
        return "ZeRO 3 gathers weights by hooks, which cannot be compiled: use trainer.zero_stage 2"
    model.call_layer = compiled_call()
    lengths = torch.tensor([[4, 4, 4], [4, 4, 0]])
    twins = unpack(*pack([(lengths, lengths, lengths)], bucketed=True))
    source, target = (
        side._replace(positions_N=side.positions_N.to(device), starts_B=side.starts_B.to(device))
        for side in twins.packing
    )
    dtype = _TYPES[config.trainer.precision]
    try:
        for layer in (model.encoder[0], model.decoder[0]):
            twin = copy.deepcopy(layer).to(dtype).train()
            states_ND = torch.randn(
                (source.positions_N.numel(), config.model.d_model), device=device, dtype=dtype
            ).requires_grad_()
            masks_CND = None
            if config.model.dropout > 0:
                num_residuals = 2 if layer is model.encoder[0] else 3
                masks_CND = torch.ones((num_residuals, *states_ND.shape), device=device).bool()
            arguments: list[Any] = [states_ND]
            if layer is model.decoder[0]:
                arguments.append(states_ND.detach().clone().requires_grad_())
                arguments.append(PackedLayer(target, source, masks_CND))
            else:
                arguments.append(PackedLayer(source, None, masks_CND))
            model.call_layer(twin, *arguments).float().square().sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever ails a compiler is a reason to do without it
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def compiled_call() -> Callable[..., Tensor]:
    """``packed.call_layer``, compiled for any number of tokens."""

    def call(layer: nn.Module, *arguments: Any) -> Tensor:
        return call_layer(layer, *arguments)

    packed.cpu_attention = torch.compiler.disable(packed.reference_attention)  # type: ignore[no-untyped-call]
    compiled: Callable[..., Tensor] = torch.compile(call, dynamic=True)
    return compiled
