"""One rank: its place among the others, and all that it trains with."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed
from torch import Tensor

from data_shards.errors import RunFailedError
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.plan_file import open_plan
from data_shards.stream import StepBatches, Stream
from model.build import build
from model.packed import with_dropout
from trainer import startup
from trainer.checkpoint import Checkpoints, check_settings
from trainer.config import RunConfig
from trainer.device_batches import DeviceBatches, DeviceStep, Pass
from trainer.device_step import prepare_device_step
from trainer.engine import Engine
from trainer.machine import Rates, rates
from trainer.phases import Phases
from trainer.run import read_events
from trainer.state import TrainState
from trainer.validation import ValidationSet
from trainer.watchdog import COLLECTIVE_TIMEOUTS, Watchdog

log = logging.getLogger(__name__)


class Rank:
    """What one rank trains with, and how it agrees with the others.

    Args:
        config: the resolved configuration.
        run_dir: the run's folder, shared by all ranks.
        rank, world_size, local_rank: this process' place; the process group is initialised.

    Attributes:
        number: its place among the ``world_size`` ranks; the first decides and tells for all.
        phase: what it is doing, for whoever asks what it hangs in.
        phases: how long it does what.
        rates: operations a second of all ranks' devices together, once prepared.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, rank: int, world_size: int, local_rank: int
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.number, self.world_size = rank, world_size
        self.phase = "starting"
        self.watchdog = Watchdog(
            config.recovery.hang_timeout_s, self._doing, rank=rank, dump_to=_log_stream()
        )
        self.device = _device(local_rank)
        self.local_rank = local_rank
        self.phases = Phases(self.device)
        self.state = TrainState()

    @property
    def is_first(self) -> bool:
        """Rank 0."""
        return self.number == 0

    def prepare(self) -> None:
        """Load the corpus, make the model and the engine (a collective)."""
        config = self.config
        self.manifest = Manifest.load(config.data.folder(), config.data.shards_url)
        self.plan = open_plan(self.manifest, config.data, config.trainer.seed)
        self.validation = ValidationSet.of(self.manifest, max_length=config.data.max_length)
        startup.mark("data")
        torch.manual_seed(config.trainer.seed)
        model = build(config.model, self.manifest.vocabulary_size)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        model = model.to(self.device)
        self.how = prepare_device_step(config, model, self.device, self.sum)
        self.engine = Engine(
            model,
            config.trainer,
            world_size=self.world_size,
            device=self.device,
            collective_timeout_s=COLLECTIVE_TIMEOUTS * config.recovery.hang_timeout_s,
            phases=self.phases,
        )
        own = rates(config.trainer, self.device)
        peak, sustained = self.sum([own.peak, own.sustained])
        self.rates = Rates(peak, own.source, sustained)
        self.settings = _resume_settings(config, self.manifest, self.plan)
        self.checkpoints = Checkpoints.of(self.run_dir, config.recovery)
        self.token = f"{int(self._shared(secrets.randbits(32))):08x}"
        self._agree(lambda: self.checkpoints.begin_attempt(self.token))
        startup.mark("engine")

    def resume(self) -> dict[int, list[str]] | None:
        """Go on from the newest trusted checkpoint (a collective).

        Returns:
            The newer ones that were passed over, and why (rank 0); None if there is no checkpoint.

        Raises:
            UserError: the checkpoint belongs to another configuration.
            RunFailedError: there are checkpoints, but none can be trusted.
        """
        self.phase = "reading a checkpoint"
        step, passed_over = self.find_trusted()
        if step is None:
            self._agree(self._check_fresh)
            return None
        self.state = self.load(step)
        if self.config.trainer.best_by == "bleu":
            self.state.best_step = None  # the best by loss, of before that was changed
        return passed_over

    def find_trusted(self, before: int | None = None) -> tuple[int | None, dict[int, list[str]]]:
        """The newest checkpoint that verifies, up to ``before`` (a collective).

        Rank 0 looks; all ranks must take the same one, or meet the same error.

        Returns:
            Its step, None if there is none, and (rank 0) the newer ones that do not, with why.
        """
        found: int | None = None
        passed_over: dict[int, list[str]] = {}

        def look() -> None:
            nonlocal found, passed_over
            found, passed_over = self.checkpoints.find_trusted(before)

        with self.watchdog.paused():  # hashing and fetching take as long as they take
            self._agree(look)
            step = int(self._shared(-1 if found is None else found))
        return (None if step < 0 else step), passed_over

    def _check_fresh(self) -> None:
        """No checkpoint: then the run must not have had one, or it would begin anew unasked."""
        saved = [e["step"] for e in read_events(self.run_dir) if e["event"] == "checkpoint"]
        if saved:
            raise RunFailedError(
                f"the run's log tells of checkpoints, the last of step {saved[-1]}, but there is "
                f"none in {self.checkpoints.home}: mount or name the place where they are "
                "(recovery.storage), or begin anew with --overwrite"
            )

    def _agree(self, work: Callable[[], None]) -> None:
        """Rank 0 does something for all; if it fails, all do (a collective)."""
        error: RunFailedError | None = None
        if self.is_first:
            try:
                work()
            except RunFailedError as failure:
                error = failure
        if self._shared(error is not None):
            raise error or RunFailedError("rank 0 could not go on: see its log")

    def load(self, step: int) -> TrainState:
        """Weights and optimizer of a checkpoint into the engine (a collective); its state."""
        with self.watchdog.paused(), self.checkpoints.open(step) as reader:
            described = reader.state
            where = self.checkpoints.where(step)
            check_settings(where, described["settings"], self.settings)
            self.engine.restore(reader.read, described["optimizer"])
        _tell_of_other_sums(where, described.get("computed"), self.how.computed)
        return TrainState.from_json(described)

    def loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)`` of one padded micro-batch, wherever its tensors are."""
        moved = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        return self.engine(*moved, self.config.trainer.label_smoothing)

    def steps(self, stream: Stream) -> AbstractContextManager[Iterator[StepBatches | DeviceStep]]:
        """A stream's steps as ``passes`` takes them, to be closed before the stream."""
        if not self.how.ahead:
            return nullcontext(stream)
        return DeviceBatches(stream, self.how.packer, self.device)

    def passes(self, batches: StepBatches | DeviceStep) -> list[Pass]:
        """What this rank computes of a step, one after the other."""
        if isinstance(batches, DeviceStep):
            return batches.passes
        return self.how.packer.passes(batches.batches, lambda tensor: tensor)

    def pass_loss(self, one: Pass, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)`` of a pass; ``seeds`` are of its lanes' dropout."""
        # Dropout depends on the lane, not on who computes it: the same masks at any size.
        torch.manual_seed(seeds[0])
        if one.packing is None:
            return self.loss(*one.ids)
        packing = with_dropout(one.packing, self.config.model, one.lane_tokens, seeds)
        return self.engine(*one.ids, self.config.trainer.label_smoothing, packing)

    def sum(self, numbers: list[float]) -> list[float]:
        """The sum over all ranks of a few numbers."""
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def _shared(self, number: int) -> float:
        """Rank 0's number on all ranks; exact below 2**53."""
        [shared] = self.sum([float(number) if self.is_first else 0.0])
        return shared

    def _doing(self) -> str:
        return f"after step {self.state.step}, {self.phase}"


def _tell_of_other_sums(where: str | Path, before: str | None, now: str) -> None:
    """``before`` is None in checkpoints that do not tell."""
    if before not in (None, now):
        log.warning(
            "%s was trained with batches %s; now they are %s: sums are rounded otherwise, so that "
            "losses are no longer bitwise those of an undisturbed run",
            where,
            before,
            now,
        )


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # All of the group's GPUs of this machine are visible, or this rank's alone.
    number = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _log_stream() -> TextIO | None:
    """The file that this rank logs to, if it is one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            return handler.stream
    return None


def _resume_settings(config: RunConfig, manifest: Manifest, plan: Plan) -> dict[str, Any]:
    """What decides weights and data order: unchanged over a resume."""
    trainer, data = config.trainer, config.data
    return {
        **{f"model.{name}": value for name, value in config.model.model_dump().items()},
        "data": manifest.sha256,
        "data.lanes": data.lanes,
        "data.tokens_per_step": data.tokens_per_step,
        "data.window_pairs": data.window_pairs,
        "trainer.seed": trainer.seed,
        "plan": plan.digest,
        "precision": trainer.precision,
        "gradient_dtype": trainer.gradient_dtype or trainer.precision,
    }
