"""The learning rate as a pure function of the step and of how much of the run is done.

Source: Vaswani et al. 2017, section 5.3, equation 3, written with its peak made explicit; the
optional linear decay to zero at the end ("cooldown") follows Hägele et al. 2024 (arXiv 2405.18392).
"""

from __future__ import annotations

from trainer.config import TrainerConfig


def progress(config: TrainerConfig, *, steps_done: int, elapsed_s: float) -> float:
    """The part of the run that is done, in [0, 1], by the bound that will end it first.

    Args:
        steps_done: updates made.
        elapsed_s: training time so far, as every rank agreed on it.
    """
    parts = [0.0]
    if config.max_steps is not None:
        parts.append(steps_done / config.max_steps)
    if config.max_minutes is not None:
        parts.append(elapsed_s / (config.max_minutes * 60))
    return min(1.0, max(parts))


def learning_rate(config: TrainerConfig, step: int, *, d_model: int, done: float) -> float:
    """The rate of update number ``step`` (the first is 1).

    Linear warmup to the peak, then the inverse square root of the step; in the run's last
    ``decay_fraction`` also a factor that falls linearly to zero.

    Args:
        done: ``progress`` before the update. Only the decay reads it: without one, or in a run
            bounded by steps alone, the rate follows from the step.
    """
    peak = config.peak_learning_rate
    if peak is None:
        peak = (d_model * config.warmup_steps) ** -0.5
    rate: float = peak * min(step / config.warmup_steps, (config.warmup_steps / step) ** 0.5)
    if done > 1 - config.decay_fraction:
        rate *= (1 - done) / config.decay_fraction
    return rate
