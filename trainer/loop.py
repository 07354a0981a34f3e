"""The training loop of one rank."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed

from data_shards.errors import RunFailedError
from data_shards.plan import lanes_of_rank
from data_shards.stream import StepBatches, Stream
from trainer.config import STOP_FILE
from trainer.control import EARLY_STOP_FILE, HELD_FILE, HOLD_FILE, Handover, Requests
from trainer.device_batches import DeviceStep
from trainer.energy import EnergyMeter
from trainer.guard import Guard, Reason
from trainer.interruption import Interruption
from trainer.measures import Measured, Measures
from trainer.phases import Seconds
from trainer.profile import PROFILE_FILE, StepProfiler
from trainer.rank import Rank
from trainer.reporter import Reporter, Update, Voices
from trainer.saver import Saver
from trainer.saving import NUM_FLAGS, Saving
from trainer.schedule import learning_rate, progress
from trainer.storage import write_atomically
from trainer.validation import empty_batch
from trainer.validation_bleu import latest_bleu

_MASK64 = (1 << 64) - 1

# Rank 0 looks for these files.
_REQUESTS = (STOP_FILE, HOLD_FILE, EARLY_STOP_FILE, PROFILE_FILE)


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know alike after a step's backward passes: sums over all of them."""

    loss_sum: float
    nll_sum: float
    data_hash: int
    elapsed_s: float  # rank 0's clock
    requests: frozenset[str]  # of _REQUESTS
    saving: list[float]
    bad_lanes: list[int]  # whose loss is not finite, or that of the lanes joined with it
    measured: Measured


class Loop:
    """The training of one rank, from where its state stands to a reason to stop.

    Args:
        rank: prepared, and resumed if there was something to resume from.
        voices: through what it tells.
        interruption: what this attempt comes after, if that was a failure.
    """

    def __init__(
        self, rank: Rank, voices: Voices, interruption: Interruption | None = None
    ) -> None:
        self.rank, self.config, self.state = rank, rank.config, rank.state
        self.plan, self.engine = rank.plan, rank.engine
        self.guard = Guard(rank.config.recovery, rank.state.guard)
        self.reporter = Reporter(
            rank.config,
            rank.plan,
            rank.state,
            world_size=rank.world_size,
            device=rank.device,
            rates=rank.rates,
            voices=voices,
            interruption=interruption,
            valid_bleu=partial(latest_bleu, rank.run_dir),
        )
        self.requests = Requests(rank.run_dir, _REQUESTS)
        self.phases = rank.phases
        self.measures = Measures(
            rank.config.model,
            vocab_size=rank.manifest.vocabulary_size,
            rank=rank.number,
            world_size=rank.world_size,
            energy=EnergyMeter(rank.device, local_rank=rank.local_rank),
            energy_every=rank.config.trainer.log_every,
            stragglers=rank.config.trainer.stragglers,
        )

    def run(self) -> str:
        """Train until there is a reason to stop; returns it.

        Raises:
            Handover: a checkpoint was asked for, to go on with another group of ranks.
        """
        # A resume with a smaller bound, or of a finished run, has nothing to do.
        reason = self._reason_to_stop()
        if reason:
            self.reporter.finished(reason)
            return reason
        recovery = self.config.recovery
        saver = Saver(
            self.rank.checkpoints,
            self.engine,
            rank=self.rank.number,
            world_size=self.rank.world_size,
            token=self.rank.token,
            keep=self.config.trainer.keep_checkpoints,
            staging=recovery.staging,
        )
        self.saving = Saving(
            saver,
            recovery,
            rank=self.rank.number,
            hang_s=recovery.hang_timeout_s,
            beat=self.rank.watchdog.beat,
            sum_over_ranks=self.rank.sum,
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
        lanes = lanes_of_rank(self.rank.number, self.rank.world_size, self.config.data.lanes)
        stream = Stream(
            self.rank.manifest,
            self.plan,
            lanes,
            state.step,
            prefetch_steps=self.config.data.prefetch_steps,
            cache_dir=self.config.data.cache_dir,
        )
        clock_offset_s = state.elapsed_s - time.monotonic()
        self.engine.train()
        reason = lap = None
        requests: frozenset[str] = frozenset()
        self.phases.restart()
        with stream, self.rank.steps(stream) as steps, closing(self._profiler()) as profiler:
            while reason is None:
                self.rank.watchdog.beat()
                profiler.step_begins(state.step, PROFILE_FILE in requests, self.phases)
                self.rank.phase = "waiting for data"
                with self.phases("data_wait"):
                    batches = next(steps)
                totals = self._accumulate(batches, clock_offset_s, lap)
                self.saving.hear(*totals.saving)
                self._update(totals, batches.step, lap)
                requests = totals.requests
                reason = self._reason_to_stop(requests)
                hold = HOLD_FILE in requests
                improved = False
                if state.step % config.validate_every == 0 or reason not in (None, "stopped"):
                    with self.phases("validation"):
                        improved = self._validate()
                    reason = reason or self._reason_to_stop()
                if improved or state.step % config.checkpoint_every == 0:
                    self.saving.wanted = True
                with self.phases("checkpoint"):
                    if improved:
                        self.saving.make_way()  # so that it is these very weights that are saved
                    if reason or hold:
                        self.rank.phase = "saving"
                        self.saving.save_now(self._described, state.step)
                    else:
                        self.saving.begin_if_wanted(self._described, state.step)
                if hold and not reason:
                    self._hand_over()
                lap = self.phases.lap()
        return reason

    def _profiler(self) -> StepProfiler:
        return StepProfiler(
            self.rank.run_dir,
            rank=self.rank.number,
            world_size=self.rank.world_size,
            device=self.rank.device,
            is_first=self.rank.is_first,
            plan=self.plan,
        )

    def _accumulate(
        self, batches: StepBatches | DeviceStep, clock_offset_s: float, lap: Seconds | None
    ) -> StepTotals:
        """Forward and backward over this rank's lanes, then one reduction of what all must know.

        ``lap`` is where the time of an earlier step went, if that is known.
        """
        phases = self.phases
        config = self.config.trainer
        target_tokens = self.plan.target_tokens(batches.step)
        loss_sum = torch.zeros((), device=self.rank.device)
        nll_sum = torch.zeros((), device=self.rank.device)
        bad_lanes = torch.zeros(self.config.data.lanes, device=self.rank.device)
        passes = self.rank.passes(batches)
        idle_passes = self._idle_passes(batches)
        passes_left = len(passes) + idle_passes
        self.rank.phase = "computing"
        for one in passes:
            passes_left -= 1
            seeds = [_dropout_seed(config.seed, batches.step, lane) for lane in one.lanes]
            with phases("forward"):
                loss, nll = self.rank.pass_loss(one, seeds)
            with phases("backward"):
                self.engine.backward(loss, target_tokens=target_tokens, last=not passes_left)
            loss_sum += loss.detach()
            nll_sum += nll.detach()
            is_bad = (~torch.isfinite(loss.detach())).float()
            for lane in one.lanes:  # of several, nobody knows which one it was
                bad_lanes[lane] = is_bad
        data_hash = sum(batch.data_hash for batch in batches.batches)
        for _ in range(idle_passes):
            passes_left -= 1
            with phases("forward"):
                loss, _ = self.rank.loss(*empty_batch())
            with phases("backward"):
                self.engine.backward(loss * 0.0, target_tokens=target_tokens, last=not passes_left)
        # The hash goes in two halves: sums of 32-bit integers are exact in float64.
        halves = (data_hash & _MASK64) >> 32, data_hash & 0xFFFFFFFF
        clock_s = time.monotonic() + clock_offset_s if self.rank.is_first else 0.0
        requests = self.requests.look() if self.rank.is_first else [False] * len(_REQUESTS)
        numbers = torch.tensor(
            [
                *(0.0, 0.0, *halves, clock_s, *map(float, requests), *self.saving.flags()),
                *self.measures.pack(
                    batches.step,
                    batches.batches,
                    lap,
                    computed_tokens=sum(one.computed_tokens for one in passes),
                ),
            ],
            dtype=torch.float64,
            device=self.rank.device,
        )
        numbers[0], numbers[1] = loss_sum, nll_sum
        numbers = torch.cat([numbers, bad_lanes.double()])
        self.rank.phase = "waiting for the other ranks in the step's reduction"
        with phases("communication"):
            if self.rank.world_size > 1:
                torch.distributed.all_reduce(numbers)
        loss_total, nll_total, high, low, elapsed_s, *others = numbers.tolist()
        asked, others = others[: len(_REQUESTS)], others[len(_REQUESTS) :]
        saving, others = others[:NUM_FLAGS], others[NUM_FLAGS:]
        measured, bad = others[: self.measures.size], others[self.measures.size :]
        return StepTotals(
            loss_sum=loss_total,
            nll_sum=nll_total,
            data_hash=((int(high) << 32) + int(low)) & _MASK64,
            elapsed_s=elapsed_s,
            requests=frozenset(name for name, asks in zip(_REQUESTS, asked, strict=True) if asks),
            saving=saving,
            bad_lanes=[lane for lane, is_bad in enumerate(bad) if is_bad],
            measured=self.measures.unpack(measured),
        )

    def _idle_passes(self, batches: StepBatches | DeviceStep) -> int:
        """Passes over nothing that keep the ranks' collectives in step.

        ZeRO 2 and 3 communicate in every backward pass, so all ranks must make equally many. Below
        that it is enough that each rank makes one, so that it has gradients to reduce.
        """
        num_passes = self.rank.how.packer.num_passes
        mine = num_passes(len(batches.batches))
        if self.config.trainer.zero_stage < 2:
            return 0 if mine else 1
        most = max(
            num_passes(sum(self.plan.has_batch(batches.step, lane) for lane in lanes))
            for lanes in (
                lanes_of_rank(rank, self.rank.world_size, self.config.data.lanes)
                for rank in range(self.rank.world_size)
            )
        )
        return most - mine

    def _update(self, totals: StepTotals, step: int, lap: Seconds | None) -> None:
        """Make the update, or skip it where the numbers went wrong; the position moves on."""
        config, state, guard = self.config.trainer, self.state, self.guard
        self.rank.phase = "updating"
        loss = totals.loss_sum / self.plan.target_tokens(step)
        done = progress(config, steps_done=state.step, elapsed_s=totals.elapsed_s)
        rate = learning_rate(config, state.step + 1, d_model=self.config.model.d_model, done=done)
        reason = guard.judge_loss(loss)
        with self.phases("optimizer"):
            result = self.engine.step(rate, veto=reason is not None)
        reason = reason or guard.judge_update(
            finite_norm=math.isfinite(result.grad_norm), overflow=result.overflow
        )
        assert result.applied == (reason is None), (result, reason)
        self._advance(totals, step)
        if reason is None:
            guard.trained(loss)
            self.reporter.stepped(
                Update(
                    loss_sum=totals.loss_sum,
                    nll_sum=totals.nll_sum,
                    learning_rate=rate,
                    grad_norm=result.grad_norm,
                    loss_scale=self.engine.loss_scale,
                    measured=totals.measured,
                    phases=lap,
                )
            )
        else:
            self._skip(reason, loss, result.grad_norm, totals, lap)

    def _skip(
        self,
        reason: Reason,
        loss: float,
        grad_norm: float,
        totals: StepTotals,
        lap: Seconds | None,
    ) -> None:
        step = self.state.step
        action = self.guard.skipped(step, reason)
        pairs = {}
        if self.rank.is_first:
            batches = self.plan.step(step - 1)
            pairs = {batch.lane: batch.pair_ids.tolist() for batch in batches}
        self.reporter.skipped(
            reason,
            loss,
            grad_norm,
            lanes=totals.bad_lanes,
            pairs=pairs,
            measured=totals.measured,
            phases=lap,
        )
        if action == "rewind":
            with self.phases("checkpoint"):
                self._rewind()
        elif action == "stop":
            raise self._diverged("and the policy is to stop")

    def _rewind(self) -> None:
        """Back to the weights of before the trouble; the data goes on, what is between is left."""
        self.rank.phase = "going back to a checkpoint"
        self.saving.settle()
        found, _ = self.rank.find_trusted(before=self.guard.newest_to_try())
        if found is None:
            raise self._diverged("and there is no checkpoint from before them to go back to")
        saved = self.rank.load(found)
        self.guard.rewound(saved.guard, found)
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
            f"{self.rank.run_dir / 'events.jsonl'}"
        )

    def _advance(self, totals: StepTotals, step: int) -> None:
        state = self.state
        state.step = step + 1
        state.elapsed_s = totals.elapsed_s
        state.data_hash = (state.data_hash + totals.data_hash) & _MASK64
        state.target_tokens += self.plan.target_tokens(step)
        state.source_tokens += self.plan.source_tokens(step)
        if state.flops is not None:
            state.flops += totals.measured.flops
        if totals.measured.joules:
            state.joules = (state.joules or 0.0) + sum(totals.measured.joules.values())

    def _reason_to_stop(self, requests: frozenset[str] = frozenset()) -> str | None:
        """Decided from what all ranks know alike."""
        config, state = self.config.trainer, self.state
        if config.max_steps is not None and state.step >= config.max_steps:
            return "max_steps"
        if config.max_minutes is not None and state.elapsed_s >= config.max_minutes * 60:
            return "max_minutes"
        stale = config.patience is not None and state.stale_validations >= config.patience
        # By BLEU, who scores the checkpoints also counts them, and asks.
        if EARLY_STOP_FILE in requests or (stale and config.best_by == "loss"):
            return "early_stopping"
        return "stopped" if STOP_FILE in requests else None

    def _hand_over(self) -> None:
        """The checkpoint is committed: tell who asked for it, and leave."""
        step = self.state.step
        if self.rank.is_first:
            write_atomically(self.rank.run_dir / HELD_FILE, json.dumps({"step": step}) + "\n")
            self.reporter.handed_over()
        raise Handover(f"saved at step {step} to go on with another group of workers")

    def _validate(self) -> bool:
        """Validation loss over all ranks; True if it makes this the best checkpoint so far."""
        self.rank.phase = "validating"
        self.reporter.validating()
        began = time.monotonic()
        self.engine.train(False)
        nll_sum = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        batches = self.rank.validation.batches
        passes = math.ceil(len(batches) / self.rank.world_size)
        with torch.no_grad():
            for turn in range(passes):
                self.rank.watchdog.beat()
                index = turn * self.rank.world_size + self.rank.number
                batch = batches[index] if index < len(batches) else empty_batch()
                _, nll = self.rank.loss(*batch)
                if index < len(batches):
                    nll_sum += nll
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(nll_sum)
        self.engine.train()
        nll_mean = nll_sum.item() / self.rank.validation.target_tokens
        state = self.state
        state.last_nll = nll_mean
        improved = math.isfinite(nll_mean) and (state.best_nll is None or nll_mean < state.best_nll)
        by_loss = self.config.trainer.best_by == "loss"
        if improved:
            state.best_nll, state.stale_validations = nll_mean, 0
            state.best_step = state.step if by_loss else None
        else:
            state.stale_validations += 1
        self.reporter.validated(nll_mean, improved, time.monotonic() - began)
        return improved and by_loss

    def _described(self) -> dict[str, Any]:
        """What ``state.json`` of a checkpoint taken now holds."""
        return {
            **self.state.to_json(),
            "settings": self.rank.settings,
            "computed": self.rank.how.computed,
        }


def _dropout_seed(seed: int, step: int, lane: int) -> int:
    """64 bits that differ for every (step, lane) of a run; 4096 lanes at most (data.lanes)."""
    return (seed * 0x9E3779B97F4A7C15 + (step << 12) + lane) & _MASK64
