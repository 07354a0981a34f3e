"""What a rank tells while it trains: events for ``events.jsonl`` and Prometheus metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from data_shards.plan import Plan
from trainer.config import RunConfig
from trainer.events import EventLog
from trainer.guard import Reason
from trainer.interruption import Interruption
from trainer.machine import Rates
from trainer.measures import Measured
from trainer.metrics import RankMetrics, RunMetrics
from trainer.phases import BUSY, PHASES, Seconds
from trainer.saver import Saved
from trainer.state import TrainState

_LOW_48_BITS = (1 << 48) - 1


@dataclass(frozen=True)
class Update:
    """One optimizer update, in numbers that all ranks share; only ``phases`` are this rank's own.

    ``phases`` are of an earlier step, the newest that is known; None before there is one.
    """

    loss_sum: float
    nll_sum: float
    learning_rate: float
    grad_norm: float
    loss_scale: float
    measured: Measured
    phases: Seconds | None


@dataclass
class _Sums:
    """Since the last logged step: of the loss over updates, of the rest over all steps."""

    loss: float = 0.0
    nll: float = 0.0
    trained_tokens: int = 0  # the targets of ``loss`` and ``nll``
    tokens: int = 0  # consumed, source and target
    measured: Measured = field(default_factory=Measured)
    phases: Seconds = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    num_phases: int = 0

    def add_phases(self, phases: Seconds) -> None:
        for phase, seconds in phases.items():
            self.phases[phase] += seconds
        self.num_phases += 1

    def mean_phases(self) -> Seconds | None:
        """Seconds a step."""
        if not self.num_phases:
            return None
        return {phase: seconds / self.num_phases for phase, seconds in self.phases.items()}


@dataclass(frozen=True)
class Voices:
    """Through what a rank tells: all ranks have ``rank``, only the first has the others.

    None where there is nobody to tell.
    """

    events: EventLog | None = None
    run: RunMetrics | None = None
    rank: RankMetrics | None = None


class Reporter:
    """Turns what happens into events and metrics.

    Args:
        world_size, device, rates: who trains, on what, and how fast that could be.
        state: where the run stands; read at every call.
        voices: through what this rank tells.
        interruption: what this attempt comes after, if that was a failure.
        valid_bleu: the newest score of a checkpoint, NaN if there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        state: TrainState,
        *,
        world_size: int,
        device: torch.device,
        rates: Rates,
        voices: Voices,
        interruption: Interruption | None = None,
        valid_bleu: Callable[[], float] = lambda: math.nan,
    ) -> None:
        self._config, self._plan, self._state = config, plan, state
        self._world_size, self._device, self._rates = world_size, device, rates
        self._events, self._metrics, self._rank_metrics = voices.events, voices.run, voices.rank
        self._interruption, self._valid_bleu = interruption, valid_bleu
        self._logged_at_s = state.elapsed_s
        self._since = _Sums()
        if self._metrics is not None:
            self._begun(self._metrics)

    def _begun(self, metrics: RunMetrics) -> None:
        """What is known before the first step."""
        state = self._state
        metrics.peak_flops.set(self._rates.peak)
        metrics.world_size.set(self._world_size)
        metrics.steps_per_epoch.set(self._plan.steps_per_epoch)
        metrics.checkpoint_interval.set(self._config.trainer.checkpoint_every)
        metrics.last_checkpoint_step.set(state.step)
        metrics.position.set(state.step)
        metrics.validating.set(0)
        metrics.stale_validations.set(state.stale_validations)
        if state.best_nll is not None:
            metrics.best_valid_nll.set(state.best_nll)
        if state.last_nll is not None:
            metrics.valid_nll.set(state.last_nll)
        for cause in self._interruption.causes if self._interruption else ():
            metrics.restarts[cause].inc()

    def stepped(self, update: Update) -> None:
        """After an update; logs the first and every ``log_every``-th."""
        state, since = self._state, self._since
        target_tokens = self._plan.target_tokens(state.step - 1)
        if self._metrics is not None:
            self._metrics.steps.inc()
        self._consumed(update.measured, update.phases)
        since.loss += update.loss_sum
        since.nll += update.nll_sum
        since.trained_tokens += target_tokens
        if state.step % self._config.trainer.log_every == 0 or state.step == 1:
            self._log(update, target_tokens)

    def _consumed(self, measured: Measured, phases: Seconds | None) -> None:
        """After any step, trained on or not: the work was done."""
        step, metrics, since = self._state.step - 1, self._metrics, self._since
        source_tokens = self._plan.source_tokens(step)
        target_tokens = self._plan.target_tokens(step)
        since.tokens += source_tokens + target_tokens
        since.measured += measured
        if phases is not None:
            since.add_phases(phases)
            self._observe(phases)
        if metrics is not None:
            metrics.target_tokens.inc(target_tokens)
            metrics.source_tokens.inc(source_tokens)
            metrics.samples.inc(self._plan.num_pairs(step))
            metrics.flops.inc(measured.flops)
            for source, joules in measured.joules.items():
                metrics.add_energy(source, joules)
            metrics.position.set(self._state.step)
            metrics.last_step_time.set_to_current_time()
        if self._interruption is not None:
            self._recovered(self._interruption)
            self._interruption = None

    def _observe(self, phases: Seconds) -> None:
        if self._metrics is not None:
            self._metrics.step_seconds.observe(sum(phases.values()) - phases["validation"])
        if self._rank_metrics is not None:
            for phase, seconds in phases.items():
                self._rank_metrics.phases[phase].observe(seconds)

    def _recovered(self, interruption: Interruption) -> None:
        seconds = interruption.seconds()
        if self._events is not None:
            self._events.write(
                "recovered",
                step=self._state.step,
                cause=interruption.cause,
                seconds=round(seconds, 3),
                message=interruption.message,
                failures_seen=interruption.seen,
            )
        if self._metrics is not None:
            self._metrics.recovery_seconds[interruption.cause].observe(seconds)

    def _log(self, update: Update, target_tokens: int) -> None:
        """Tell of the steps since the last logged one; ``target_tokens`` are the last one's."""
        state, since = self._state, self._since
        interval_s = max(1e-9, state.elapsed_s - self._logged_at_s)
        values = _Interval(
            mean_loss=since.loss / since.trained_tokens,
            mean_nll=since.nll / since.trained_tokens,
            tokens_per_second=since.tokens / interval_s,
            mfu=since.measured.flops / interval_s / self._rates.peak,
            padding_efficiency=since.tokens / since.measured.computed_tokens,
            skew=since.measured.skew(),
            epoch=self._plan.locate(state.step - 1)[0],
        )
        phases = since.mean_phases()
        self._logged_at_s, self._since = state.elapsed_s, _Sums()
        memory = _memory(self._device)
        if self._events is not None:
            self._log_event(self._events, update, values, phases, memory, target_tokens)
        if self._metrics is not None:
            self._set_gauges(self._metrics, update, values)
        if self._rank_metrics is not None:
            if phases is not None:
                self._rank_metrics.busy.set(sum(phases[phase] for phase in BUSY))
            if memory is not None:
                allocated, reserved, peak = memory
                self._rank_metrics.set_memory(allocated=allocated, reserved=reserved, peak=peak)

    def _log_event(
        self,
        events: EventLog,
        update: Update,
        values: _Interval,
        phases: Seconds | None,
        memory: tuple[int, int, int] | None,
        target_tokens: int,
    ) -> None:
        state = self._state
        slowest, skew = values.skew or (None, None)
        events.write(
            "step",
            step=state.step,
            epoch=values.epoch,
            # Of this update alone: what a resume, or another number of workers, must repeat.
            loss=update.loss_sum / target_tokens,
            nll=update.nll_sum / target_tokens,
            # Over the steps since the last logged one: what a person wants to see.
            mean_loss=values.mean_loss,
            mean_nll=values.mean_nll,
            learning_rate=update.learning_rate,
            grad_norm=update.grad_norm,
            loss_scale=update.loss_scale,
            target_tokens=state.target_tokens,
            source_tokens=state.source_tokens,
            tokens_per_second=round(values.tokens_per_second, 1),
            flops=state.flops,
            mfu=round(values.mfu, 6),
            padding_efficiency=round(values.padding_efficiency, 5),
            phases={name: round(value, 6) for name, value in phases.items()} if phases else None,
            slowest_rank=slowest,
            skew=None if skew is None else round(skew, 4),
            gpu_memory_bytes=memory[2] if memory else None,
            energy_joules=state.joules,
            world_size=self._world_size,
            data_hash=f"{state.data_hash:016x}",
            elapsed_s=round(state.elapsed_s, 3),
        )

    def _set_gauges(self, metrics: RunMetrics, update: Update, values: _Interval) -> None:
        metrics.loss.set(values.mean_loss)
        metrics.nll.set(values.mean_nll)
        metrics.learning_rate.set(update.learning_rate)
        metrics.grad_norm.set(update.grad_norm)
        metrics.loss_scale.set(update.loss_scale)
        metrics.tokens_per_second.set(values.tokens_per_second)
        metrics.mfu.set(values.mfu)
        metrics.padding_efficiency.set(values.padding_efficiency)
        metrics.epoch.set(values.epoch)
        metrics.data_hash.set(self._state.data_hash & _LOW_48_BITS)
        if values.skew is not None:
            slowest, skew = values.skew
            metrics.slowest_rank.set(slowest)
            metrics.rank_skew.set(skew)
        bleu = self._valid_bleu()
        if not math.isnan(bleu):
            metrics.valid_bleu.set(bleu)

    def _sums(self) -> dict[str, Any]:
        """Since the run began, whatever was logged last."""
        state = self._state
        return {
            "source_tokens": state.source_tokens,
            "target_tokens": state.target_tokens,
            "flops": state.flops,
            "energy_joules": state.joules,
            "data_hash": f"{state.data_hash:016x}",
            "elapsed_s": round(state.elapsed_s, 3),
        }

    def validating(self) -> None:
        """Before a validation."""
        if self._metrics is not None:
            self._metrics.validating.set(1)

    def validated(self, nll: float, improved: bool, seconds: float) -> None:
        """After a validation."""
        if self._events is not None:
            self._events.write(
                "validated",
                step=self._state.step,
                valid_nll=nll,
                perplexity=math.exp(min(nll, 100.0)),
                best=improved,
                seconds=round(seconds, 3),
                elapsed_s=round(self._state.elapsed_s, 3),
            )
        if self._metrics is not None:
            self._metrics.validating.set(0)
            self._metrics.last_step_time.set_to_current_time()  # the next one begins now
            self._metrics.valid_nll.set(nll)
            self._metrics.stale_validations.set(self._state.stale_validations)
            self._metrics.validation_seconds.observe(seconds)
            if self._state.best_nll is not None:
                self._metrics.best_valid_nll.set(self._state.best_nll)

    def skipped(
        self,
        reason: Reason,
        loss: float,
        grad_norm: float,
        *,
        lanes: list[int],
        pairs: dict[int, list[int]],
        measured: Measured,
        phases: Seconds | None,
    ) -> None:
        """After a step that was not trained on.

        Args:
            loss, grad_norm: what went wrong, in the units of the events of steps.
            lanes: those whose own loss is not finite, or that of the lanes it was computed with.
            pairs: the ids of all the step's pairs by lane.
            measured, phases: as of an ``Update``.
        """
        state = self._state
        epoch, _ = self._plan.locate(state.step - 1)
        if self._events is not None:
            self._events.write(
                "skipped",
                step=state.step,
                epoch=epoch,
                reason=reason,
                loss=loss,
                grad_norm=grad_norm,
                lanes=lanes,
                pairs=pairs,
                skipped=state.guard.skipped,
                data_hash=f"{state.data_hash:016x}",
            )
        if self._metrics is not None:
            self._metrics.skipped_steps[reason].inc()
        self._consumed(measured, phases)

    def rewound(self, to_step: int) -> None:
        """After the weights were taken back to those of an earlier checkpoint."""
        if self._events is not None:
            self._events.write(
                "rewound",
                step=self._state.step,
                to_step=to_step,
                rewinds=self._state.guard.rewinds,
            )
        if self._metrics is not None:
            self._metrics.rewinds.inc()

    def handed_over(self) -> None:
        """After the checkpoint with which this group of ranks leaves."""
        if self._events is not None:
            self._events.write("handed_over", step=self._state.step, **self._sums())

    def saved(self, saved: Saved, stall_s: float) -> None:
        """After a checkpoint was committed; training stood still ``stall_s`` seconds for it."""
        if self._events is not None:
            self._events.write(
                "checkpoint",
                step=saved.step,
                bytes=saved.bytes,
                seconds=round(saved.seconds, 3),
                stall_seconds=round(stall_s, 4),
                best=self._state.best_step == saved.step,
            )
        if self._metrics is not None:
            self._metrics.last_checkpoint_time.set_to_current_time()
            self._metrics.last_checkpoint_step.set(saved.step)
            self._metrics.last_checkpoint_size.set(saved.bytes)
            self._metrics.checkpoint_seconds.observe(saved.seconds)
            self._metrics.checkpoint_stall_seconds.inc(stall_s)

    def save_failed(self, step: int, why: str, wait_s: float | None) -> None:
        """After a checkpoint could not be written; it is tried again in ``wait_s`` seconds.

        None where it has not ended at all.
        """
        if self._events is not None:
            self._events.write("save_failed", step=step, error=why, retry_seconds=wait_s)
        if self._metrics is not None:
            self._metrics.checkpoint_failures.inc()

    def finished(self, reason: str) -> None:
        """At the end of this attempt."""
        if self._events is not None:
            self._events.write(
                "finished",
                step=self._state.step,
                reason=reason,
                **self._sums(),
            )


@dataclass(frozen=True)
class _Interval:
    """What the steps since the last logged one come to."""

    mean_loss: float
    mean_nll: float
    tokens_per_second: float
    mfu: float
    padding_efficiency: float
    skew: tuple[int, float] | None
    epoch: int


def _memory(device: torch.device) -> tuple[int, int, int] | None:
    """Bytes of GPU memory: allocated, reserved, and the most allocated so far."""
    if device.type != "cuda":
        return None
    return (
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
    )
