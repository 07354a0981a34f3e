"""What a rank tells while it trains: events for ``events.jsonl`` and Prometheus metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from model.cost import peak_flops, training_flops
from trainer.events import EventLog
from trainer.metrics import Metrics

if TYPE_CHECKING:
    from trainer.loop import Rank, StepTotals


class Reporter:
    """Turns what happens into events and metrics; on ranks without them it only keeps time."""

    def __init__(self, rank: Rank, events: EventLog | None, metrics: Metrics | None) -> None:
        self.rank, self.events, self.metrics = rank, events, metrics
        self._since = (rank.state.step, rank.state.elapsed_s, 0)
        self._last_elapsed_s = rank.state.elapsed_s
        data = rank.manifest.data
        self._flops_per_token = training_flops(
            rank.config.model,
            vocab_size=rank.manifest.vocabulary_size,
            source_tokens=data.source_tokens,
            target_tokens=data.target_tokens,
            num_pairs=data.num_pairs,
        ) / (data.source_tokens + data.target_tokens)
        self._peak = (
            peak_flops(torch.cuda.get_device_name(rank.device), rank.config.trainer.precision)
            if rank.device.type == "cuda"
            else None
        )

    def stepped(
        self, totals: StepTotals, target_tokens: int, rate: float, norm: float, waited_s: float
    ) -> None:
        """After an update; logs every ``log_every``-th."""
        rank, state = self.rank, self.rank.state
        source_tokens = rank.plan.source_tokens(state.step - 1)
        if self.metrics is not None:
            self.metrics.steps.inc()
            self.metrics.target_tokens.inc(target_tokens)
            self.metrics.source_tokens.inc(source_tokens)
            self.metrics.data_wait_seconds.observe(waited_s)
            self.metrics.step_seconds.observe(max(0.0, state.elapsed_s - self._last_elapsed_s))
            self.metrics.last_step_time.set_to_current_time()
        self._last_elapsed_s = state.elapsed_s
        step0, elapsed0_s, tokens = self._since
        tokens += target_tokens + source_tokens
        self._since = step0, elapsed0_s, tokens
        if state.step % rank.config.trainer.log_every and state.step != 1:
            return
        interval_s = max(1e-9, state.elapsed_s - elapsed0_s)
        self._since = state.step, state.elapsed_s, 0
        if self.events is None:
            return
        speed = tokens / interval_s
        loss, nll = totals.loss_sum / target_tokens, totals.nll_sum / target_tokens
        self.events.write(
            "step",
            step=state.step,
            epoch=rank.plan.locate(state.step - 1)[0],
            loss=loss,
            nll=nll,
            learning_rate=rate,
            grad_norm=norm,
            target_tokens=state.target_tokens,
            source_tokens=state.source_tokens,
            tokens_per_second=round(speed, 1),
            mfu=self._utilisation(speed),
            world_size=rank.world_size,
            data_hash=f"{state.data_hash:016x}",
            elapsed_s=round(state.elapsed_s, 3),
        )
        if self.metrics is not None:
            self.metrics.loss.set(loss)
            self.metrics.nll.set(nll)
            self.metrics.learning_rate.set(rate)
            self.metrics.grad_norm.set(norm)
            self.metrics.tokens_per_second.set(speed)
            self.metrics.epoch.set(rank.plan.locate(state.step - 1)[0])
            self.metrics.world_size.set(rank.world_size)

    def validated(self, nll: float, improved: bool, seconds: float) -> None:
        """After a validation."""
        if self.events is not None:
            self.events.write(
                "validated",
                step=self.rank.state.step,
                valid_nll=nll,
                perplexity=math.exp(min(nll, 100.0)),
                best=improved,
                seconds=round(seconds, 3),
                elapsed_s=round(self.rank.state.elapsed_s, 3),
            )
        if self.metrics is not None:
            self.metrics.valid_nll.set(nll)

    def saved(self, size_bytes: int, seconds: float) -> None:
        """After a checkpoint was committed."""
        state = self.rank.state
        if self.events is not None:
            self.events.write(
                "checkpoint",
                step=state.step,
                bytes=size_bytes,
                seconds=round(seconds, 3),
                best=state.best_step == state.step,
            )
        if self.metrics is not None:
            self.metrics.last_checkpoint_time.set_to_current_time()

    def finished(self, reason: str) -> None:
        """At the end of this attempt."""
        if self.events is not None:
            self.events.write(
                "finished",
                step=self.rank.state.step,
                reason=reason,
                elapsed_s=round(self.rank.state.elapsed_s, 3),
            )

    def _utilisation(self, tokens_per_second: float) -> float | None:
        if self._peak is None:
            return None
        return self._flops_per_token * tokens_per_second / (self._peak * self.rank.world_size)
