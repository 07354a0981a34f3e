"""DeepSpeed, and everything that names it.

The rest of the trainer sees an ``Engine``: backward on a summed loss, one update, save, load. The
traps that this file steps around are listed where they are met.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from data_shards.errors import RunFailedError, UserError
from trainer.config import TrainerConfig


def _import_deepspeed() -> Any:
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
            # Copying gradients together spares a GPU's memory fragments; on a CPU it only costs.
            "contiguous_gradients": not (on_cpu and config.zero_stage < 2),
        },
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        values["bf16"] = {"enabled": True}
    elif config.precision == "fp16":
        values["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 14}
    return values


def _clips_itself(config: TrainerConfig) -> bool:
    return config.zero_stage == 0 and config.precision == "fp32"


class Engine:
    """A module, its optimizer and its gradients, shared out over the ranks by DeepSpeed.

    Args:
        module: called with a batch's tensors and the smoothing, returns ``(loss_sum, nll_sum)``.
        config: precision, ZeRO stage, Adam's constants and the clipping norm.
        world_size: ranks of the process group, which must be initialised.
        collective_timeout_s: longest wait of a collective before it is an error.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainerConfig,
        *,
        world_size: int,
        device: torch.device,
        collective_timeout_s: float = 600.0,
    ) -> None:
        if config.precision == "fp16" and device.type == "cpu":
            raise UserError(
                "trainer.precision: fp16 is not supported on a CPU: use bf16 or fp32, or a GPU"
            )
        deepspeed = _import_deepspeed()
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        self._config = config
        self._world_size = world_size
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(config, world_size=world_size, on_cpu=device.type == "cpu"),
            dist_init_required=False,
        )
        if config.zero_stage == 0:
            # Engine.step reduces by itself, so that it can see the norm before the update.
            self._engine.enable_backward_allreduce = False

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

    def backward(self, loss_sum: Tensor, *, target_tokens: int) -> None:
        """Add a micro-batch's gradient of ``loss_sum / target_tokens``.

        ``target_tokens`` is the step's *global* count. DeepSpeed averages over ranks, which the
        factor undoes: the sum over all micro-batches of all ranks is the gradient of the mean.
        """
        self._engine.backward(loss_sum * (self._world_size / target_tokens))

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update; every rank must call it.

        Returns:
            The global gradient norm before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm: Any = None
        if self._config.zero_stage == 0:
            self._engine.buffered_allreduce_fallback()
        if _clips_itself(self._config):
            bound = self._config.clip_norm or float("inf")
            norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), bound)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save(self, folder: Path) -> None:
        """Write this rank's part of the model's and the optimizer's state (a collective)."""
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, at the same number of ranks (a collective).

        DeepSpeed unpickles: only ever give it files that a run of ours wrote and that verified.
        """
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise RunFailedError(f"DeepSpeed found no checkpoint in {folder}")

    def full_weights(self) -> dict[str, Tensor]:
        """All weights in float32 by name: a collective; filled on rank 0, empty elsewhere.

        With mixed precision they are the optimizer's masters, not their rounded copies.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        rank = torch.distributed.get_rank()
        weights: dict[str, Tensor] = {}
        for name, parameter in self._engine.module.named_parameters():
            if self._config.zero_stage == 0:
                full = _stage0_master(self._optimizer, parameter)
            else:
                full = safe_get_full_fp32_param(parameter)
            if rank == 0:
                weights[name] = full.detach().to("cpu", torch.float32, copy=True)
        return weights


def _stage0_master(optimizer: Any, parameter: Tensor) -> Tensor:
    """The fp32 master of a half-precision parameter under stage 0's optimizers, else itself."""
    halves = getattr(optimizer, "fp16_groups", None)
    masters = getattr(optimizer, "fp32_groups", None)
    if halves is None or masters is None:
        return parameter
    for half_group, master_group in zip(halves, masters, strict=True):
        for half, master in zip(half_group, master_group, strict=True):
            if half is parameter:
                return cast(Tensor, master)
    return parameter
