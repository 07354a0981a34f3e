"""The training loop of one rank."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed
from torch import Tensor

from data_shards.errors import RunFailedError
from data_shards.manifest import Manifest
from data_shards.plan import Plan, lanes_of_rank
from data_shards.stream import StepBatches, Stream
from model.transformer import build
from trainer.checkpoint import Checkpoints, check_settings
from trainer.config import STOP_FILE, RunConfig
from trainer.control import HELD_FILE, HOLD_FILE, Handover
from trainer.engine import Engine
from trainer.events import EventLog
from trainer.guard import Guard, Reason
from trainer.metrics import Metrics
from trainer.reporter import Reporter, Update
from trainer.saver import Saver
from trainer.saving import NUM_FLAGS, Saving
from trainer.schedule import learning_rate, progress
from trainer.state import TrainState
from trainer.storage import write_atomically
from trainer.validation import ValidationSet, empty_batch
from trainer.watchdog import Watchdog

log = logging.getLogger(__name__)

_MASK64 = (1 << 64) - 1

# The watchdog can say more than torch about a rank that waits: torch's time-outs come after it.
_COLLECTIVE_TIMEOUTS = 2.0


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know alike after a step's backward passes: sums over all of them."""

    loss_sum: float
    nll_sum: float
    data_hash: int
    elapsed_s: float  # rank 0's clock
    stop_requested: bool
    hold_requested: bool
    saving: list[float]
    bad_lanes: list[int]  # whose own loss is not finite


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
        self.phase = "starting"  # for whoever asks what a rank hangs in
        self.watchdog = Watchdog(
            config.recovery.hang_timeout_s, self._doing, rank=rank, dump_to=_log_stream()
        )
        self.device = _device(local_rank)
        self.state = TrainState()

    def prepare(self) -> None:
        """Load the corpus, make the model and the engine (a collective)."""
        config = self.config
        self.manifest = Manifest.load(config.data.folder())
        self.plan = Plan.of(self.manifest, config.data, config.trainer.seed)
        self.validation = ValidationSet.of(self.manifest, max_length=config.data.max_length)
        torch.manual_seed(config.trainer.seed)
        model = build(config.model, self.manifest.vocabulary_size)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = Engine(
            model.to(self.device),
            config.trainer,
            world_size=self.world_size,
            device=self.device,
            collective_timeout_s=_COLLECTIVE_TIMEOUTS * config.recovery.hang_timeout_s,
        )
        self.settings = _resume_settings(config, self.manifest, self.plan)
        self.checkpoints = Checkpoints.of(self.run_dir, config.recovery)
        self.token = f"{int(self._shared(secrets.randbits(32))):08x}"
        if self.rank == 0:
            self.checkpoints.begin_attempt(self.token)

    def resume(self) -> dict[int, list[str]] | None:
        """Go on from the newest trusted checkpoint (a collective).

        Returns:
            The newer ones that were passed over, and why (rank 0); None if there is no checkpoint.

        Raises:
            UserError: the checkpoint belongs to another configuration.
            RunFailedError: there are checkpoints, but none can be trusted.
        """
        self.phase = "reading a checkpoint"
        step, passed_over = self._find_trusted()
        if step is None:
            return None
        self.state = self._load(step)
        return passed_over

    def _find_trusted(self, before: int | None = None) -> tuple[int | None, dict[int, list[str]]]:
        """Rank 0 looks; all ranks must take the same one, or meet the same error."""
        step, error = -1, None
        passed_over: dict[int, list[str]] = {}
        if self.rank == 0:
            try:
                found, passed_over = self.checkpoints.find_trusted(before)
                step = -1 if found is None else found
            except RunFailedError as failure:
                step, error = -2, failure
        step = int(self._shared(step))
        if step == -2:
            raise error or RunFailedError("no checkpoint of this run can be trusted (see rank 0)")
        return (None if step < 0 else step), passed_over

    def _load(self, step: int) -> TrainState:
        """Weights and optimizer of a checkpoint into the engine (a collective); its state."""
        with self.checkpoints.open(step) as reader:
            described = reader.state
            where = self.checkpoints.where(step)
            check_settings(where, described["settings"], self.settings)
            self.engine.restore(reader.read, described["optimizer"])
        return TrainState.from_json(described)

    def run(self, events: EventLog | None, metrics: Metrics | None) -> str:
        """Train until there is a reason to stop; returns it.

        ``events`` and ``metrics`` are rank 0's; None elsewhere.

        Raises:
            Handover: a checkpoint was asked for, to go on with another group of ranks.
        """
        self.guard = Guard(self.config.recovery, self.state.guard)
        self.reporter = Reporter(
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
            self.reporter.finished(reason)
            return reason
        recovery = self.config.recovery
        saver = Saver(
            self.checkpoints,
            self.engine,
            rank=self.rank,
            world_size=self.world_size,
            token=self.token,
            keep=self.config.trainer.keep_checkpoints,
            staging=recovery.staging,
        )
        self.saving = Saving(
            saver,
            recovery,
            is_first=self.rank == 0,
            sum_over_ranks=self._sum,
            saved=self.reporter.saved,
            failed=self.reporter.save_failed,
        )
        try:
            reason = self._train()
        finally:
            self.saving.close()
        self.reporter.finished(reason)
        return reason

    def _train(self) -> str:
        config, state = self.config.trainer, self.state
        lanes = lanes_of_rank(self.rank, self.world_size, self.config.data.lanes)
        stream = Stream(
            self.manifest,
            self.plan,
            lanes,
            state.step,
            prefetch_steps=self.config.data.prefetch_steps,
            cache_dir=self.config.data.cache_dir,
        )
        clock_offset_s = state.elapsed_s - time.monotonic()
        self.engine.train()
        reason = None
        with stream:
            while reason is None:
                self.watchdog.beat()
                self.phase = "waiting for data"
                began = time.monotonic()
                batches = next(stream)
                waited_s = time.monotonic() - began
                totals = self._accumulate(batches, clock_offset_s)
                self.saving.hear(*totals.saving)
                self._update(totals, batches.step, waited_s)
                reason = self._reason_to_stop(stop_requested=totals.stop_requested)
                improved = False
                if state.step % config.validate_every == 0 or reason not in (None, "stopped"):
                    improved = self._validate()
                    reason = reason or self._reason_to_stop(stop_requested=False)
                if improved or state.step % config.checkpoint_every == 0:
                    self.saving.wanted = True
                if reason or totals.hold_requested:
                    self.phase = "saving"
                    self.saving.save_now(self._described, state.step)
                else:
                    self.saving.begin_if_wanted(self._described, state.step)
                if totals.hold_requested and not reason:
                    self._hand_over()
        return reason

    def _accumulate(self, batches: StepBatches, clock_offset_s: float) -> StepTotals:
        """Forward and backward over this rank's lanes, then one reduction of what all must know."""
        config = self.config.trainer
        target_tokens = self.plan.target_tokens(batches.step)
        loss_sum = torch.zeros((), device=self.device)
        nll_sum = torch.zeros((), device=self.device)
        bad_lanes = torch.zeros(self.config.data.lanes, device=self.device)
        data_hash = 0
        self.phase = "computing"
        for batch in batches.batches:
            # Dropout depends on the lane, not on who computes it: the same masks at any size.
            torch.manual_seed(_dropout_seed(config.seed, batches.step, batch.lane))
            loss, nll = self._loss(batch.source_BS, batch.target_in_BT, batch.target_out_BT)
            self.engine.backward(loss, target_tokens=target_tokens)
            loss_sum += loss.detach()
            nll_sum += nll.detach()
            bad_lanes[batch.lane] = (~torch.isfinite(loss.detach())).float()
            data_hash += batch.data_hash
        for _ in range(self._idle_passes(batches)):
            loss, _ = self._loss(*empty_batch())
            self.engine.backward(loss * 0.0, target_tokens=target_tokens)
        # The hash goes in two halves: sums of 32-bit integers are exact in float64.
        halves = (data_hash & _MASK64) >> 32, data_hash & 0xFFFFFFFF
        clock_s = time.monotonic() + clock_offset_s if self.rank == 0 else 0.0
        requests = [float(self.rank == 0 and (self.run_dir / name).exists()) for name in _REQUESTS]
        numbers = torch.tensor(
            [0.0, 0.0, *halves, clock_s, *requests, *self.saving.flags()],
            dtype=torch.float64,
            device=self.device,
        )
        numbers[0], numbers[1] = loss_sum, nll_sum
        numbers = torch.cat([numbers, bad_lanes.double()])
        self.phase = "waiting for the other ranks in the step's reduction"
        if self.world_size > 1:
            torch.distributed.all_reduce(numbers)
        loss_total, nll_total, high, low, elapsed_s, stop, hold, *others = numbers.tolist()
        return StepTotals(
            loss_sum=loss_total,
            nll_sum=nll_total,
            data_hash=((int(high) << 32) + int(low)) & _MASK64,
            elapsed_s=elapsed_s,
            stop_requested=stop > 0,
            hold_requested=hold > 0,
            saving=others[:NUM_FLAGS],
            bad_lanes=[lane for lane, bad in enumerate(others[NUM_FLAGS:]) if bad],
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

    def _update(self, totals: StepTotals, step: int, waited_s: float) -> None:
        """Make the update, or skip it where the numbers went wrong; the position moves on."""
        config, state, guard = self.config.trainer, self.state, self.guard
        self.phase = "updating"
        loss = totals.loss_sum / self.plan.target_tokens(step)
        done = progress(config, steps_done=state.step, elapsed_s=totals.elapsed_s)
        rate = learning_rate(config, state.step + 1, d_model=self.config.model.d_model, done=done)
        reason = guard.judge_loss(loss)
        result = self.engine.step(rate, veto=reason is not None)
        reason = reason or guard.judge_update(
            finite_norm=math.isfinite(result.grad_norm), overflow=result.overflow
        )
        assert result.applied == (reason is None), (result, reason)
        self._advance(totals, step)
        if reason is None:
            guard.trained(loss)
            self.reporter.stepped(
                Update(totals.loss_sum, totals.nll_sum, rate, result.grad_norm, waited_s)
            )
        else:
            self._skip(reason, loss, result.grad_norm, totals.bad_lanes)

    def _skip(self, reason: Reason, loss: float, grad_norm: float, bad_lanes: list[int]) -> None:
        step = self.state.step
        action = self.guard.skipped(step, reason)
        pairs = {}
        if self.rank == 0:
            batches = self.plan.step(step - 1)
            pairs = {batch.lane: batch.pair_ids.tolist() for batch in batches}
        self.reporter.skipped(reason, loss, grad_norm, bad_lanes, pairs)
        if action == "rewind":
            self._rewind()
        elif action == "stop":
            raise self._diverged("and the policy is to stop")

    def _rewind(self) -> None:
        """Back to the weights of before the trouble; the data goes on, what is between is left."""
        start = self.guard.state.streak_start
        assert start is not None
        self.phase = "going back to a checkpoint"
        self.saving.settle()
        found, _ = self._find_trusted(before=start - 1)
        if found is None:
            raise self._diverged("and there is no checkpoint from before them to go back to")
        saved = self._load(found)
        self.guard.rewound(saved.guard)
        self.engine.train()
        # So that the decision lasts: a crash from here on must not meet the same trouble again.
        self.saving.wanted = True
        self.reporter.rewound(found)

    def _diverged(self, why: str) -> RunFailedError:
        guard = self.guard.state
        return RunFailedError(
            f"{guard.streak} steps in a row, from step {guard.streak_start} on, had a loss or a "
            f"gradient that was no number or far too high (after {guard.rewinds} rewinds), {why}. "
            "No update was made with them. Start anew with a lower trainer.peak_learning_rate, "
            "more trainer.warmup_steps or fp32, or look at the pairs of the events 'skipped' in "
            f"{self.run_dir / 'events.jsonl'}"
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

    def _hand_over(self) -> None:
        """The checkpoint is committed: tell who asked for it, and leave."""
        step = self.state.step
        if self.rank == 0:
            write_atomically(self.run_dir / HELD_FILE, json.dumps({"step": step}) + "\n")
            self.reporter.handed_over()
        raise Handover(f"saved at step {step} to go on with another group of workers")

    def _validate(self) -> bool:
        """Validation loss over all ranks; True if it is the best so far."""
        self.phase = "validating"
        began = time.monotonic()
        self.engine.train(False)
        nll_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = self.validation.batches
        passes = math.ceil(len(batches) / self.world_size)
        with torch.no_grad():
            for turn in range(passes):
                self.watchdog.beat()
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
        self.reporter.validated(nll_mean, improved, time.monotonic() - began)
        return improved

    def _described(self) -> dict[str, Any]:
        """What ``state.json`` of a checkpoint taken now holds."""
        return {**self.state.to_json(), "settings": self.settings}

    def _loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)`` of one micro-batch of CPU tensors."""
        moved = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        return self.engine(*moved, self.config.trainer.label_smoothing)

    def _sum(self, numbers: list[float]) -> list[float]:
        """The sum over all ranks of a few numbers; shows that all of them are alive."""
        self.watchdog.beat()
        if self.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def _shared(self, number: int) -> float:
        """Rank 0's number on all ranks; exact below 2**53."""
        [shared] = self._sum([float(number) if self.rank == 0 else 0.0])
        return shared

    def _doing(self) -> str:
        return f"after step {self.state.step}, {self.phase}"


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
        Handover: a checkpoint was asked for, to go on with another group of ranks.
        RunFailedError: the numbers stayed wrong, or no checkpoint could be read or written.
        UserError: the checkpoint belongs to another configuration.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    this = Rank(config, run_dir, rank=rank, world_size=world_size, local_rank=local_rank)
    with this.watchdog:
        this.prepare()
        passed_over = this.resume() if resume else None
        if rank != 0:
            return this.run(None, None)
        return _run_first(this, passed_over)


def _run_first(this: Rank, passed_over: dict[int, list[str]] | None) -> str:
    """Rank 0, which tells for all."""
    config, run_dir = this.config.trainer, this.run_dir
    _forget_requests(run_dir)
    events = EventLog(run_dir / "events.jsonl")
    metrics = Metrics(run_dir.name, host=config.metrics_host, port=config.metrics_port)
    try:
        events.write(
            "started" if passed_over is None else "resumed",
            step=this.state.step,
            **({"passed_over": passed_over} if passed_over else {}),
            attempt=this.token,
            world_size=this.world_size,
            parameters=this.num_parameters,
            steps_per_epoch=this.plan.steps_per_epoch,
            data_hash=f"{this.state.data_hash:016x}",
            device=str(this.device),
            torch=torch.__version__,
        )
        reason = this.run(events, metrics)
        _forget_requests(run_dir)
        return reason
    finally:
        metrics.close()
        events.close()


# Rank 0 looks for these files at each step: stop, hold.
_REQUESTS = (STOP_FILE, HOLD_FILE)


def _forget_requests(run_dir: Path) -> None:
    for name in (*_REQUESTS, HELD_FILE):
        with suppress(FileNotFoundError):
            (run_dir / name).unlink()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _log_stream() -> TextIO | None:
    """The file that this rank logs to, if it is one."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            return handler.stream
    return None


def _dropout_seed(seed: int, step: int, lane: int) -> int:
    """64 bits that differ for every (step, lane) of a run; 4096 lanes at most (data.lanes)."""
    return (seed * 0x9E3779B97F4A7C15 + (step << 12) + lane) & _MASK64


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
    }
