"""What a rank tells while it trains: events for ``events.jsonl`` and Prometheus metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from data_shards.manifest import Manifest
from data_shards.plan import Plan
from model.cost import peak_flops, training_flops
from trainer.config import RunConfig
from trainer.events import EventLog
from trainer.guard import Reason
from trainer.metrics import Metrics
from trainer.saver import Saved
from trainer.state import TrainState


@dataclass(frozen=True)
class Update:
    """One optimizer update, in numbers that all ranks share; the waiting is this rank's own."""

    loss_sum: float
    nll_sum: float
    learning_rate: float
    grad_norm: float
    waited_s: float


@dataclass
class _Sums:
    """Over the updates since the last logged one."""

    loss: float = 0.0
    nll: float = 0.0
    target_tokens: int = 0
    source_tokens: int = 0


class Reporter:
    """Turns what happens into events and metrics.

    Args:
        world_size, device: who trains, and on what.
        state: where the run stands; read at every call.
        events, metrics: rank 0's; None on the other ranks, which tell nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        plan: Plan,
        state: TrainState,
        *,
        world_size: int,
        device: torch.device,
        events: EventLog | None,
        metrics: Metrics | None,
    ) -> None:
        self._config, self._plan, self._state = config, plan, state
        self._world_size = world_size
        self._events, self._metrics = events, metrics
        self._last_elapsed_s = state.elapsed_s
        self._logged_at_s = state.elapsed_s
        self._since = _Sums()
        data = manifest.data
        self._flops_per_token = training_flops(
            config.model,
            vocab_size=manifest.vocabulary_size,
            source_tokens=data.source_tokens,
            target_tokens=data.target_tokens,
            num_pairs=data.num_pairs,
        ) / (data.source_tokens + data.target_tokens)
        self._peak = (
            peak_flops(torch.cuda.get_device_name(device), config.trainer.precision)
            if device.type == "cuda"
            else None
        )

    def stepped(self, update: Update) -> None:
        """After an update; logs the first and every ``log_every``-th."""
        state, metrics = self._state, self._metrics
        source_tokens = self._plan.source_tokens(state.step - 1)
        target_tokens = self._plan.target_tokens(state.step - 1)
        if metrics is not None:
            metrics.steps.inc()
            metrics.target_tokens.inc(target_tokens)
            metrics.source_tokens.inc(source_tokens)
            metrics.data_wait_seconds.observe(update.waited_s)
            metrics.step_seconds.observe(max(0.0, state.elapsed_s - self._last_elapsed_s))
            metrics.last_step_time.set_to_current_time()
        self._last_elapsed_s = state.elapsed_s
        since = self._since
        since.loss += update.loss_sum
        since.nll += update.nll_sum
        since.target_tokens += target_tokens
        since.source_tokens += source_tokens
        if state.step % self._config.trainer.log_every and state.step != 1:
            return
        interval_s = max(1e-9, state.elapsed_s - self._logged_at_s)
        speed = (since.target_tokens + since.source_tokens) / interval_s
        mean_loss, mean_nll = since.loss / since.target_tokens, since.nll / since.target_tokens
        self._logged_at_s, self._since = state.elapsed_s, _Sums()
        epoch, _ = self._plan.locate(state.step - 1)
        if self._events is not None:
            self._events.write(
                "step",
                step=state.step,
                epoch=epoch,
                # Of this update alone: what a resume, or another number of workers, must repeat.
                loss=update.loss_sum / target_tokens,
                nll=update.nll_sum / target_tokens,
                # Over the updates since the last logged one: what a person wants to see.
                mean_loss=mean_loss,
                mean_nll=mean_nll,
                learning_rate=update.learning_rate,
                grad_norm=update.grad_norm,
                target_tokens=state.target_tokens,
                source_tokens=state.source_tokens,
                tokens_per_second=round(speed, 1),
                mfu=self._utilisation(speed),
                world_size=self._world_size,
                data_hash=f"{state.data_hash:016x}",
                elapsed_s=round(state.elapsed_s, 3),
            )
        if metrics is not None:
            metrics.loss.set(mean_loss)
            metrics.nll.set(mean_nll)
            metrics.learning_rate.set(update.learning_rate)
            metrics.grad_norm.set(update.grad_norm)
            metrics.tokens_per_second.set(speed)
            metrics.epoch.set(epoch)
            metrics.world_size.set(self._world_size)

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
            self._metrics.valid_nll.set(nll)

    def skipped(
        self,
        reason: Reason,
        loss: float,
        grad_norm: float,
        lanes: list[int],
        pairs: dict[int, list[int]],
    ) -> None:
        """After a step that was not trained on.

        Args:
            loss, grad_norm: what went wrong, in the units of the events of steps.
            lanes: those whose own loss is not finite.
            pairs: the ids of all the step's pairs by lane.
        """
        state = self._state
        epoch, _ = self._plan.locate(state.step - 1)
        self._last_elapsed_s = state.elapsed_s
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
            self._metrics.last_step_time.set_to_current_time()

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
            self._events.write("handed_over", step=self._state.step)

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
                elapsed_s=round(self._state.elapsed_s, 3),
            )

    def _utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation, None where the device's peak is not known."""
        if self._peak is None:
            return None
        return self._flops_per_token * tokens_per_second / (self._peak * self._world_size)
