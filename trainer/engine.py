"""DeepSpeed, and everything that names it.

The rest of the trainer sees an ``Engine``: backward on a summed loss, one update, and the state
that a checkpoint must hold. The traps that this file steps around are listed where they are met.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data_shards.errors import UserError
from trainer.alone import FlatGroup, UpdateAlone, exact_norm
from trainer.config import TrainerConfig
from trainer.parts import EMA, MOMENTS, WEIGHT
from trainer.phases import Phases
from trainer.reduction import OverlappedReduction


def import_deepspeed() -> Any:
    """DeepSpeed without the noise that it makes, and without what it would compile."""
    if not torch.cuda.is_available():
        # Without it DeepSpeed looks for other accelerators and warns on every rank.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops

    # init_distributed would compile a shared-memory library that only inference uses: over a
    # minute, and a lock left behind if it is killed. An empty table of operators switches it off.
    ops.__dict__["__compatible_ops__"] = {}
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


# Elements of a reduction. DeepSpeed's default of half a billion makes it hold buffers of that size,
# a gigabyte in bf16, whatever the model.
_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(config: TrainerConfig, *, world_size: int, on_cpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of one run.

    Batches are ours (the plan deals them), so its own batch arithmetic is set to one and gradient
    accumulation is left to the caller: ``step()`` is the boundary.
    """
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        # Stage 0 in fp32 does not tell the norm that it clips by: Engine.step clips there.
        "gradient_clipping": 0.0 if _clips_itself(config) else config.clip_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            # Below 2 it cannot where gradient accumulation is the caller's.
            "overlap_comm": config.zero_stage == 3
            or (config.zero_stage == 2 and not on_cpu and world_size > 1),
            # Copying gradients together spares a GPU's memory fragments; on a CPU it only costs,
            # and where the update is ours it would be a buffer that nobody uses.
            "contiguous_gradients": not (
                _updates_alone(config, world_size) or (on_cpu and config.zero_stage < 2)
            ),
        },
        "steps_per_print": None,
    }
    if config.gradient_dtype is not None and world_size > 1:
        values["communication_data_type"] = config.gradient_dtype
    if config.precision == "bf16":
        values["bf16"] = {"enabled": True}
    elif config.precision == "fp16":
        values["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 14}
    return values


# The same without ZeRO, where the sums begin during the backward pass: a few buckets, so that there
# is something to begin with, each large enough for the network.
_OVERLAPPED_ELEMENTS = 8_000_000

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Of DeepSpeed's backend: what its stages 0 to 3 call while training.
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "barrier",
)


def _time_collectives(backend: Any, phases: Phases) -> None:
    """Let the clock see DeepSpeed's collectives, wherever in a step it makes them.

    Of one that goes on in the background only the call is seen; what is waited for later counts to
    the phase that waits.
    """
    for name in _COLLECTIVES:
        # From the class, so that a second engine of this process does not wrap the first's wrapper.
        original = getattr(type(backend), name).__get__(backend)

        def timed(*arguments: Any, _call: Any = original, **named: Any) -> Any:
            with phases("communication"):
                return _call(*arguments, **named)

        setattr(backend, name, functools.wraps(original)(timed))


def _clips_itself(config: TrainerConfig) -> bool:
    return config.zero_stage == 0 and config.precision == "fp32"


def _updates_alone(config: TrainerConfig, world_size: int) -> bool:
    """One rank, and DeepSpeed keeps its weights flat (but fp16's loss scale is its own affair)."""
    return world_size == 1 and config.zero_stage == 1 and config.precision != "fp16"


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one parameter, whose master and moments this rank keeps.

    Attributes:
        name: the parameter's name in the module.
        start: its first element in the flattened parameter.
        tensors: of each of ``Engine.kinds``: flat float32 views of the live state, of equal
            length, on the optimizer's device. The next update changes them.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What became of an update; alike on all ranks.

    Attributes:
        grad_norm: global norm before clipping; infinite or not a number where the gradient is.
        applied: False if weights, moments and Adam's count are as they were.
        overflow: fp16's loss scale was too high for this gradient, and still can be lowered.
    """

    grad_norm: float
    applied: bool
    overflow: bool


@dataclass(frozen=True)
class _Place:
    """Elements ``start`` and on of a parameter lie at ``offset`` and on of a flattened master."""

    parameter: nn.Parameter
    start: int
    master: Tensor
    offset: int
    length: int


# Of the loss scaler, whose class differs from stage to stage but whose names are the same.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """A module, its optimizer and its gradients, shared out over the ranks by DeepSpeed.

    Args:
        module: called with a batch's tensors and the smoothing, returns ``(loss_sum, nll_sum)``.
        config: precision, ZeRO stage, Adam's constants and the clipping norm.
        world_size: ranks of the process group, which must be initialised.
        collective_timeout_s: longest wait of a collective before it is an error.
        phases: the rank's clock; DeepSpeed's collectives count as communication.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainerConfig,
        *,
        world_size: int,
        device: torch.device,
        collective_timeout_s: float = 600.0,
        phases: Phases | None = None,
    ) -> None:
        if config.precision == "fp16" and device.type == "cpu":
            raise UserError(
                "trainer.precision: fp16 is not supported on a CPU: use bf16 or fp32, or a GPU"
            )
        deepspeed = import_deepspeed()
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        if phases is not None:
            _time_collectives(deepspeed.comm.comm.cdb, phases)
        assert all(parameter.requires_grad for parameter in module.parameters()), (
            "a frozen parameter would be in no checkpoint"
        )
        if world_size == 1 and config.zero_stage == 0:
            # Nobody to share with: both hold everything, and stage 1 updates it as one tensor.
            config = config.model_copy(update={"zero_stage": 1})
        self._config = config
        self._world_size = world_size
        self._rank = torch.distributed.get_rank()
        self._adam = torch.optim.AdamW(
            module.parameters(),
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        # Shut: stage 0's half-precision optimizer makes an update with zeros while it is built,
        # which would count as Adam's first.
        self._veto = True
        self._updates = 0
        self._own_norm: float | None = None
        self._adam.register_step_pre_hook(self._before_update)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._adam,
            config=deepspeed_config(config, world_size=world_size, on_cpu=device.type == "cpu"),
            dist_init_required=False,
        )
        self._phases = phases
        self._reduction: OverlappedReduction | None = None
        if config.zero_stage == 0:
            # Reduced here, so that the sums overlap with the backward pass, and so that Engine.step
            # can see the norm before the update.
            self._engine.enable_backward_allreduce = False
            if world_size > 1:
                self._reduction = OverlappedReduction(
                    list(module.parameters()),
                    lambda gradient: deepspeed.comm.comm.cdb.all_reduce(gradient, async_op=True),
                    world_size=world_size,
                    dtype=_DTYPES.get(config.gradient_dtype or ""),
                    bucket_elements=_OVERLAPPED_ELEMENTS,
                )
        elif config.precision == "fp16":
            # The guard decides when a run is over, and says so better than an Exception.
            self._optimizer.loss_scaler.raise_error_at_min_scale = False
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._alone: UpdateAlone | None = None
        if _updates_alone(config, world_size):
            # DeepSpeed keeps masters and weights, and calls this where it would make the update.
            self._engine.enable_backward_allreduce = False
            self._alone = UpdateAlone(self._flat_groups(), self._adam, config.clip_norm)
            self._optimizer.step = self._alone
        self._create_moments()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of each parameter: ``weight``, Adam's moments, ``ema`` if configured."""
        average = () if self._config.ema_decay is None else (EMA,)
        return (WEIGHT, *MOMENTS, *average)

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies the loss by; 1 in other precisions."""
        return float(self._scaler_state().get("cur_scale", 1.0))

    @property
    def module(self) -> nn.Module:
        """The wrapped module, with its parameters as this stage holds them."""
        return cast(nn.Module, self._engine.module)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run the module through DeepSpeed's hooks."""
        return cast("tuple[Tensor, Tensor]", self._engine(*arguments))

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss_sum: Tensor, *, target_tokens: int, last: bool = False) -> None:
        """Add a micro-batch's gradient of ``loss_sum / target_tokens``.

        ``last`` says that it is this rank's last one of the step, so that gradients can be summed
        over the ranks as they come; if any rank says so, all must.

        ``target_tokens`` is the step's *global* count. DeepSpeed averages over ranks, which the
        factor undoes: the sum over all micro-batches of all ranks is the gradient of the mean.
        """
        loss = loss_sum * (self._world_size / target_tokens)
        if self._config.zero_stage == 0:
            # DeepSpeed 0.19 scales only for ZeRO's optimizers, yet stage 0's divides by the scale.
            loss = loss * self._scaler_state().get("cur_scale", 1.0)
        if self._reduction is not None and last:
            self._reduction.arm()
        self._engine.backward(loss)
        if self._reduction is not None and last:
            self._reduction.launch_rest()

    def step(self, learning_rate: float, *, veto: bool = False) -> StepResult:
        """Reduce, clip, update; every rank must call it.

        A gradient whose norm is not finite is never applied.

        Args:
            veto: make no update: weights, moments, Adam's count and the loss scale stay as they
                are, and the gradients are cleared. Must be the same on all ranks.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._reduction is not None:
            with self._phases("communication") if self._phases else nullcontext():
                self._reduction.launch_rest()
                self._reduction.finish()
        if _clips_itself(self._config):
            parameters = list(self._names)
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._own_norm = exact_norm(gradients)
            if self._config.clip_norm > 0:
                nn.utils.clip_grads_with_norm_(
                    parameters, self._config.clip_norm, torch.tensor(self._own_norm)
                )
        self._veto = veto
        updates, scaler = self._updates, self._scaler_state()
        self._engine.step()
        if veto:
            self._set_scaler_state(scaler)
        if self._updates > updates:
            self._update_average()
        after = self._scaler_state()
        # At the smallest scale nothing is lowered any more: the gradient itself is not finite.
        lowered = [
            name
            for name in ("cur_scale", "cur_hysteresis")
            if after.get(name, 0) < scaler.get(name, 0)
        ]
        # Stage 0 in fp16 tells the norm of the scaled gradient.
        scale = scaler.get("cur_scale", 1.0) if self._config.zero_stage == 0 else 1.0
        return StepResult(
            grad_norm=self._global_norm() / scale,
            applied=self._updates > updates,
            overflow=bool(lowered),
        )

    def _before_update(self, adam: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Adam's pre-step hook: where an update that must not be made is held back.

        By now DeepSpeed knows the global norm at every stage. Adam passes over what has no
        gradient, and DeepSpeed goes on to clear the rest as after any step.
        """
        if not self._veto and math.isfinite(self._global_norm()):
            self._updates += 1
            return
        for group in adam.param_groups:
            for master in group["params"]:
                master.grad = None

    def _update_average(self) -> None:
        """Draw the moving average towards the new masters.

        Early on it looks back over no more than a part of the updates so far, or it would remember
        the initial weights: the decay is at most ``(1 + t) / (10 + t)`` after t updates.
        """
        if self._config.ema_decay is None:
            return
        decay = min(self._config.ema_decay, (1 + self._updates) / (10 + self._updates))
        masters = self._masters()
        averages = [self._adam.state[master][EMA] for master in masters]
        get_ema_multi_avg_fn(decay)(averages, masters, None)  # type: ignore[no-untyped-call]

    def _global_norm(self) -> float:
        """The norm of the update being made or just made; stage 0 in fp16: times the loss scale."""
        if self._own_norm is not None:
            return self._own_norm
        if self._alone is not None:
            return self._alone.norm
        return float(self._optimizer._global_grad_norm)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's whole shape, in the module's order."""
        # Stage 3 leaves a parameter empty between its uses and notes its shape.
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for parameter, name in self._names.items()
        }

    def fragments(self) -> list[Fragment]:
        """This rank's share of masters and moments; all ranks' cover each parameter exactly once.

        No collective and no copy.
        """
        return [
            Fragment(self._names[place.parameter], place.start, self._tensors(place))
            for place in self._places(share=True)
        ]

    def scalars(self) -> dict[str, Any]:
        """What else the optimizer remembers, ready for JSON; the same on all ranks."""
        updates = int(self._adam.state[self._masters()[0]]["step"].item())
        scaler, decay = self._scaler_state(), self._config.ema_decay
        return {
            "updates": updates,
            **({"loss_scale": scaler} if scaler else {}),
            **({} if decay is None else {"ema_decay": decay}),
        }

    def restore(
        self, read: Callable[[str, str, int, int], Tensor], scalars: dict[str, Any]
    ) -> None:
        """Take over the state of a checkpoint, whatever stage and world size wrote it.

        A collective; works before any step and on a used engine.

        Args:
            read: ``read(kind, name, start, length)`` gives that part of the flattened parameter,
                float32 on the CPU; kinds as in ``Fragment.tensors``. Stage 0 asks every rank for
                everything.
            scalars: what ``scalars()`` gave.
        """
        for place in self._places():
            for kind, tensor in self._tensors(place).items():
                part = read(kind, self._names[place.parameter], place.start, place.length)
                assert part.shape == tensor.shape, (kind, part.shape, tensor.shape)
                tensor.copy_(part)
        for master in self._masters():
            self._adam.state[master]["step"].fill_(scalars["updates"])
        self._updates = scalars["updates"]
        self._set_scaler_state(scalars.get("loss_scale", {}))
        with torch.no_grad():
            self._refresh_weights()

    def _tensors(self, place: _Place) -> dict[str, Tensor]:
        moments = self._adam.state[place.master]
        whole = {WEIGHT: place.master.detach()}
        whole |= {kind: moments[kind] for kind in self.kinds if kind != WEIGHT}
        return {
            kind: tensor.view(-1).narrow(0, place.offset, place.length)
            for kind, tensor in whole.items()
        }

    def _create_moments(self) -> None:
        """Adam's state, which it would create in its first update; names and types are Adam's.

        The moving average, which Adam passes over, lies beside it.
        """
        for master in self._masters():
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS},
            }
            if EMA in self.kinds:
                self._adam.state[master][EMA] = master.detach().clone()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that Adam updates on this rank."""
        if self._config.zero_stage == 0:
            return [master for _, master in self._pairs()]
        if self._config.zero_stage < 3:
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Stage 0: each parameter and its master, which in fp32 is itself."""
        if self._config.precision == "fp32":
            yield from ((parameter, parameter) for parameter in self._names)
            return
        groups = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
        for halves, masters in groups:
            yield from zip(halves, masters, strict=True)

    def _places(self, *, share: bool = False) -> Iterator[_Place]:
        """Where this rank's part of each parameter is; what only pads a partition is left out.

        Args:
            share: at stage 0, where every rank keeps everything, only this rank's share of it:
                of all parameters in a row, the rank-th of world_size equal stretches.
        """
        if self._config.zero_stage == 0:
            total = sum(parameter.numel() for parameter in self._names)
            bounds = [total * rank // self._world_size for rank in (self._rank, self._rank + 1)]
            first, last = bounds if share else (0, total)
            before = 0  # elements of the parameters so far
            for parameter, master in self._pairs():
                start = max(first - before, 0)
                length = min(last - before, parameter.numel()) - start
                if length > 0:
                    yield _Place(parameter, start, master, start, length)
                before += parameter.numel()
        elif self._config.zero_stage < 3:
            # All parameters in a row, padded, and cut into one partition a rank.
            masters = self._masters()
            for parameter in self._names:
                part = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
                if part is not None:
                    source, target = part.lp_fragment_address, part.hp_fragment_address
                    master = masters[part.param_group_index]
                    yield _Place(parameter, source.start, master, target.start, source.numel)
        else:
            # Each parameter padded and cut by itself; a rank's parts of all of them in a row.
            for parameters, master in zip(
                self._optimizer.fp16_groups, self._masters(), strict=True
            ):
                offset = 0
                for parameter in parameters:
                    partition = parameter.partition_numel()
                    start = self._rank * partition
                    length = min(partition, parameter.ds_numel - start)
                    if length > 0:
                        yield _Place(parameter, start, master, offset, length)
                    offset += partition

    def _flat_groups(self) -> list[FlatGroup]:
        """ZeRO 1 with one rank: parameters in the order in which the masters hold them."""
        groups = []
        for index, master in enumerate(self._masters()):
            places = [place for place in self._places() if place.master is master]
            places.sort(key=lambda place: place.offset)
            ends = [0, *(place.offset + place.length for place in places)]
            assert ends[:-1] == [place.offset for place in places], "masters have gaps"
            weights = self._optimizer.bit16_groups_flat[index]
            groups.append(FlatGroup([place.parameter for place in places], weights, master))
        return groups

    def _refresh_weights(self) -> None:
        """Give the module what the masters hold, as DeepSpeed does after an update."""
        zero = self._optimizer
        if self._config.zero_stage == 0:
            for parameter, master in self._pairs():
                parameter.copy_(master)
        elif self._config.zero_stage < 3:
            zero.update_lp_params()
        else:
            # Lets go of the small parameters' whole copies, too; the next use gathers them anew.
            zero._partition_all_parameters()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)

    def _scaler(self) -> Any:
        stage0 = self._config.zero_stage == 0
        return self._optimizer.loss_scale_config if stage0 else self._optimizer.loss_scaler

    def _scaler_state(self) -> dict[str, Any]:
        """fp16's dynamic loss scale; empty in other precisions."""
        if self._config.precision != "fp16":
            return {}
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in _SCALER_STATE if hasattr(scaler, name)}

    def _set_scaler_state(self, state: dict[str, Any]) -> None:
        if self._config.precision == "fp16":
            for name in state.keys() & self._scaler_state().keys():
                setattr(self._scaler(), name, state[name])
