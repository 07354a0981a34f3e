"""The learning rate as a pure function of the step.

Source: Vaswani et al. 2017, section 5.3, equation 3, written with its peak made explicit; the
optional linear decay to zero at the end ("cooldown") follows Hägele et al. 2024 (arXiv 2405.18392).
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import TrainerConfig


@dataclass(frozen=True)
class Decay:
    """The steps between which the rate also falls linearly to zero.

    A run bounded by steps knows it from the start. A run bounded by minutes fixes it once, when the
    decay is due, from the speed so far; it is then part of the run's state and of each checkpoint,
    so that every step after it is again a pure function of the step.
    """

    start: int
    end: int


def planned_decay(config: TrainerConfig) -> Decay | None:
    """The decay of a run whose length in steps is known in advance, if it has one."""
    if config.decay_fraction == 0 or config.max_steps is None or config.max_minutes is not None:
        return None
    return Decay(round(config.max_steps * (1 - config.decay_fraction)), config.max_steps)


def timed_decay(
    config: TrainerConfig, *, step: int, elapsed_s: float, seconds_per_step: float
) -> Decay | None:
    """The decay of a run bounded by minutes, once its time has come (None before).

    Args:
        step: updates made so far.
        elapsed_s: training time so far, as every rank agreed on it.
        seconds_per_step: recent speed.
    """
    if config.decay_fraction == 0 or config.max_minutes is None:
        return None
    budget_s = config.max_minutes * 60
    by_time = elapsed_s >= budget_s * (1 - config.decay_fraction)
    by_steps = config.max_steps is not None and step >= config.max_steps * (
        1 - config.decay_fraction
    )
    if not (by_time or by_steps):
        return None
    end = step + max(1, int((budget_s - elapsed_s) / seconds_per_step))
    return Decay(step, min(end, config.max_steps) if config.max_steps is not None else end)


def learning_rate(config: TrainerConfig, step: int, *, d_model: int, decay: Decay | None) -> float:
    """The rate of update number ``step`` (the first is 1).

    Linear warmup to the peak, then the inverse square root of the step; inside ``decay`` also a
    factor that falls linearly to zero.
    """
    peak = config.peak_learning_rate
    if peak is None:
        peak = (d_model * config.warmup_steps) ** -0.5
    rate: float = peak * min(step / config.warmup_steps, (config.warmup_steps / step) ** 0.5)
    if decay is not None and step > decay.start:
        # The last update still moves: it is number `end` and gets one share of the way.
        rate *= max(0.0, (decay.end + 1 - step) / (decay.end + 1 - decay.start))
    return rate
