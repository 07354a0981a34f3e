"""The training loop of one rank."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from data_shards.errors import RunFailedError
from data_shards.manifest import Manifest
from data_shards.plan import Plan, lanes_of_rank
from data_shards.stream import StepBatches, Stream
from model.transformer import build
from trainer import checkpoint
from trainer.checkpoint import TrainState
from trainer.config import STOP_FILE, RunConfig
from trainer.engine import Engine
from trainer.events import EventLog
from trainer.metrics import Metrics
from trainer.reporter import Reporter, Update
from trainer.schedule import learning_rate, progress
from trainer.validation import ValidationSet, empty_batch

log = logging.getLogger(__name__)

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know alike after a step's backward passes: sums over all of them."""

    loss_sum: float
    nll_sum: float
    data_hash: int
    elapsed_s: float  # rank 0's clock
    stop_requested: bool


class Rank:
    """One rank of a run, from the loaded corpus to the last checkpoint.

    Args:
        config: the resolved configuration.
        run_dir: the run's folder, shared by all ranks.
        rank, world_size, local_rank: this process' place; the process group is initialised.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, rank: int, world_size: int, local_rank: int
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.rank, self.world_size = rank, world_size
        self.device = _device(local_rank)
        self.manifest = Manifest.load(config.data.folder())
        self.plan = Plan.of(self.manifest, config.data, config.trainer.seed)
        torch.manual_seed(config.trainer.seed)
        model = build(config.model, self.manifest.vocabulary_size)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(
            model.to(self.device),
            config.trainer,
            world_size=world_size,
            device=self.device,
        )
        self.validation = ValidationSet.of(self.manifest, max_length=config.data.max_length)
        self.state = TrainState()
        self.settings = _resume_settings(config, self.manifest, self.plan)

    def resume(self) -> bool:
        """Go on from the newest trusted checkpoint; False if there is none."""
        step = torch.tensor([-1], device=self.device)
        if self.rank == 0:
            folder = checkpoint.find_trusted(self.run_dir)
            if folder is not None:
                step[0] = int(folder.name.removeprefix("step-"))
        torch.distributed.broadcast(step, src=0)
        if step.item() < 0:
            return False
        self.state = checkpoint.load(
            self.engine,
            checkpoint.checkpoint_folder(self.run_dir, int(step.item())),
            world_size=self.world_size,
            settings=self.settings,
        )
        return True

    def run(self, events: EventLog | None, metrics: Metrics | None) -> str:
        """Train until there is a reason to stop; returns it.

        ``events`` and ``metrics`` are rank 0's; None elsewhere.
        """
        config = self.config.trainer
        reporter = Reporter(
            self.config,
            self.manifest,
            self.plan,
            self.state,
            world_size=self.world_size,
            device=self.device,
            events=events,
            metrics=metrics,
        )
        # A resume with a smaller bound, or of a finished run, has nothing to do.
        reason = self._reason_to_stop(stop_requested=False)
        if reason:
            reporter.finished(reason)
            return reason
        lanes = lanes_of_rank(self.rank, self.world_size, self.config.data.lanes)
        stream = Stream(
            self.manifest,
            self.plan,
            lanes,
            self.state.step,
            prefetch_steps=self.config.data.prefetch_steps,
            cache_dir=self.config.data.cache_dir,
        )
        started, before_s = time.monotonic(), self.state.elapsed_s
        self.engine.train()
        with stream:
            while reason is None:
                began = time.monotonic()
                batches = next(stream)
                waited_s = time.monotonic() - began
                target_tokens = self.plan.target_tokens(batches.step)
                totals = self._accumulate(batches, target_tokens, before_s - started)
                self._assert_finite(totals, batches.step)
                state = self.state
                done = progress(config, steps_done=state.step, elapsed_s=totals.elapsed_s)
                rate = learning_rate(
                    config, state.step + 1, d_model=self.config.model.d_model, done=done
                )
                grad_norm = self.engine.step(rate).grad_norm
                self._advance(totals, batches.step)
                reporter.stepped(Update(totals.loss_sum, totals.nll_sum, rate, grad_norm, waited_s))

                reason = self._reason_to_stop(stop_requested=totals.stop_requested)
                improved = False
                if state.step % config.validate_every == 0 or reason not in (None, "stopped"):
                    improved = self._validate(reporter)
                    reason = reason or self._reason_to_stop(stop_requested=False)
                if improved or reason or state.step % config.checkpoint_every == 0:
                    self._save(reporter)
        reporter.finished(reason)
        return reason

    def _accumulate(
        self, batches: StepBatches, target_tokens: int, clock_offset_s: float
    ) -> StepTotals:
        """Forward and backward over this rank's lanes, then one reduction of what all must know."""
        config = self.config.trainer
        loss_sum = torch.zeros((), device=self.device)
        nll_sum = torch.zeros((), device=self.device)
        data_hash = 0
        for batch in batches.batches:
            # Dropout depends on the lane, not on who computes it: the same masks at any size.
            torch.manual_seed(_dropout_seed(config.seed, batches.step, batch.lane))
            loss, nll = self._loss(batch.source_BS, batch.target_in_BT, batch.target_out_BT)
            self.engine.backward(loss, target_tokens=target_tokens)
            loss_sum += loss.detach()
            nll_sum += nll.detach()
            data_hash += batch.data_hash
        for _ in range(self._idle_passes(batches)):
            loss, _ = self._loss(*empty_batch())
            self.engine.backward(loss * 0.0, target_tokens=target_tokens)
        # The hash goes in two halves: sums of 32-bit integers are exact in float64.
        halves = (data_hash & _MASK64) >> 32, data_hash & 0xFFFFFFFF
        clock_s = time.monotonic() + clock_offset_s if self.rank == 0 else 0.0
        stop = self.rank == 0 and (self.run_dir / STOP_FILE).exists()
        numbers = torch.tensor(
            [0.0, 0.0, *halves, clock_s, float(stop)], dtype=torch.float64, device=self.device
        )
        numbers[0], numbers[1] = loss_sum, nll_sum
        if self.world_size > 1:
            torch.distributed.all_reduce(numbers)
        loss_total, nll_total, high, low, elapsed_s, stopped = numbers.tolist()
        return StepTotals(
            loss_sum=loss_total,
            nll_sum=nll_total,
            data_hash=((int(high) << 32) + int(low)) & _MASK64,
            elapsed_s=elapsed_s,
            stop_requested=stopped > 0,
        )

    def _idle_passes(self, batches: StepBatches) -> int:
        """Passes over nothing that keep the ranks' collectives in step.

        ZeRO 2 and 3 communicate in every backward pass, so all ranks must make equally many. Below
        that it is enough that each rank makes one, so that it has gradients to reduce.
        """
        mine = len(batches.batches)
        if self.config.trainer.zero_stage < 2:
            return 0 if mine else 1
        most = max(
            sum(self.plan.has_batch(batches.step, lane) for lane in lanes)
            for lanes in (
                lanes_of_rank(rank, self.world_size, self.config.data.lanes)
                for rank in range(self.world_size)
            )
        )
        return most - mine

    def _assert_finite(self, totals: StepTotals, step: int) -> None:
        if math.isfinite(totals.loss_sum):
            return
        epoch, _ = self.plan.locate(step)
        raise RunFailedError(
            f"the loss of step {step + 1} (epoch {epoch}) is {totals.loss_sum}; no update was made "
            "with it. Resume from the last checkpoint with a lower trainer.peak_learning_rate or "
            f"more trainer.warmup_steps ({self.run_dir})"
        )

    def _advance(self, totals: StepTotals, step: int) -> None:
        state = self.state
        state.step = step + 1
        state.elapsed_s = totals.elapsed_s
        state.data_hash = (state.data_hash + totals.data_hash) & _MASK64
        state.target_tokens += self.plan.target_tokens(step)
        state.source_tokens += self.plan.source_tokens(step)

    def _reason_to_stop(self, *, stop_requested: bool) -> str | None:
        """Decided from what all ranks know alike."""
        config, state = self.config.trainer, self.state
        if config.max_steps is not None and state.step >= config.max_steps:
            return "max_steps"
        if config.max_minutes is not None and state.elapsed_s >= config.max_minutes * 60:
            return "max_minutes"
        if config.patience is not None and state.stale_validations >= config.patience:
            return "early_stopping"
        return "stopped" if stop_requested else None

    def _validate(self, reporter: Reporter) -> bool:
        """Validation loss over all ranks; True if it is the best so far."""
        began = time.monotonic()
        self.engine.train(False)
        nll_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = self.validation.batches
        passes = math.ceil(len(batches) / self.world_size)
        with torch.no_grad():
            for turn in range(passes):
                index = turn * self.world_size + self.rank
                batch = batches[index] if index < len(batches) else empty_batch()
                _, nll = self._loss(*batch)
                if index < len(batches):
                    nll_sum += nll
        if self.world_size > 1:
            torch.distributed.all_reduce(nll_sum)
        self.engine.train()
        nll_mean = nll_sum.item() / self.validation.target_tokens
        state = self.state
        improved = state.best_nll is None or nll_mean < state.best_nll
        if improved:
            state.best_nll, state.best_step, state.stale_validations = nll_mean, state.step, 0
        else:
            state.stale_validations += 1
        reporter.validated(nll_mean, improved, time.monotonic() - began)
        return improved

    def _save(self, reporter: Reporter) -> None:
        began = time.monotonic()
        size = checkpoint.save(
            self.engine,
            self.run_dir,
            self.state,
            rank=self.rank,
            world_size=self.world_size,
            keep=self.config.trainer.keep_checkpoints,
            settings=self.settings,
        )
        reporter.saved(size, time.monotonic() - began)

    def _loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)`` of one micro-batch of CPU tensors."""
        moved = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        return self.engine(*moved, self.config.trainer.label_smoothing)


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    rank: int,
    world_size: int,
    local_rank: int = 0,
    resume: bool,
) -> str:
    """Train as one rank of an initialised process group; all ranks call it alike.

    Args:
        resume: go on from the newest trusted checkpoint, if there is one.

    Returns:
        Why it ended: ``max_steps``, ``max_minutes``, ``early_stopping`` or ``stopped``.

    Raises:
        DataError: a shard is missing, cut short or altered.
        RunFailedError: the loss is not finite, or no checkpoint can be trusted.
        UserError: the checkpoint belongs to another configuration.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    this = Rank(config, run_dir, rank=rank, world_size=world_size, local_rank=local_rank)
    resumed = this.resume() if resume else False
    if rank != 0:
        return this.run(None, None)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    events = EventLog(run_dir / "events.jsonl")
    metrics = Metrics(
        run_dir.name, host=config.trainer.metrics_host, port=config.trainer.metrics_port
    )
    try:
        events.write(
            "resumed" if resumed else "started",
            step=this.state.step,
            world_size=world_size,
            parameters=this.num_parameters,
            steps_per_epoch=this.plan.steps_per_epoch,
            device=str(this.device),
            torch=torch.__version__,
        )
        reason = this.run(events, metrics)
        (run_dir / STOP_FILE).unlink(missing_ok=True)
        return reason
    finally:
        metrics.close()
        events.close()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _dropout_seed(seed: int, step: int, lane: int) -> int:
    """64 bits that differ for every (step, lane) of a run; 4096 lanes at most (data.lanes)."""
    return (seed * 0x9E3779B97F4A7C15 + (step << 12) + lane) & _MASK64


def _resume_settings(config: RunConfig, manifest: Manifest, plan: Plan) -> dict[str, Any]:
    """What decides weights, data order and the optimizer's layout: unchanged over a resume."""
    trainer, data = config.trainer, config.data
    return {
        **{f"model.{name}": value for name, value in config.model.model_dump().items()},
        "data": manifest.sha256,
        "data.lanes": data.lanes,
        "data.tokens_per_step": data.tokens_per_step,
        "data.window_pairs": data.window_pairs,
        "trainer.seed": trainer.seed,
        "plan": plan.digest,
        "zero_stage": trainer.zero_stage,
        "precision": trainer.precision,
    }
