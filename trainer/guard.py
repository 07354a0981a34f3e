"""Numbers gone wrong: which steps are not trained on, and when skipping is not enough.

A step whose loss or gradient is not finite, or whose loss leaps far above what the run has seen
lately, would damage the weights more than it could teach them. It is skipped before the update: its
batch counts as consumed, its pairs are logged, the run goes on with the next one. Many such steps
in a row mean that the weights are the trouble and not the data: then the run goes back to the
weights of its last good checkpoint (``rewind``), still going forward in the data, or stops.

Everything is decided from numbers that all ranks hold after the step's reduction, and from
``GuardState``, which is in each checkpoint: all ranks decide alike, and a resumed run decides as an
undisturbed one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainer.config import RecoveryConfig

Reason = Literal["loss_not_finite", "loss_spike", "gradient_not_finite", "fp16_overflow"]
Action = Literal["go_on", "rewind", "stop"]

# Of the running mean: the weight of what was seen before, so that about 100 steps count.
_DECAY = 0.99
# In its first steps a run has no habit yet that a loss could depart from.
_MIN_UPDATES = 100


@dataclass
class GuardState:
    """What the guard remembers; part of each checkpoint.

    Attributes:
        mean: running mean of the trained steps' losses (nats a target token); None before the
            first.
        updates: trained steps behind ``mean``.
        streak: steps in a row, up to the last one, that were not trained on.
        streak_start: the first of them; None when ``streak`` is 0.
        skipped: steps not trained on since the run began, overflows of fp16 included.
        rewinds: times that the run went back to a checkpoint's weights.
        rewound_to: the checkpoint of the last rewind, while nothing was trained since.
    """

    mean: float | None = None
    updates: int = 0
    streak: int = 0
    streak_start: int | None = None
    skipped: int = 0
    rewinds: int = 0
    rewound_to: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON exactly (Python writes the shortest exact form)."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GuardState:
        """The inverse of ``to_json``."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


class Guard:
    """Judges each step of a run, in the order: loss, update, then ``trained`` or ``skipped``.

    Args:
        config: the policy.
        state: where the run stands; changed in place, so that the owner can save it at any time.
    """

    def __init__(self, config: RecoveryConfig, state: GuardState) -> None:
        self.config, self.state = config, state

    def judge_loss(self, loss: float) -> Reason | None:
        """Why the step must not be trained on, known before the update; None if it may.

        Args:
            loss: the step's mean over all its target tokens, nats.
        """
        if not math.isfinite(loss):
            return "loss_not_finite"
        limit, state = self.config.spike_nats, self.state
        if limit is None or state.mean is None or state.updates < _MIN_UPDATES:
            return None
        # A distance and not a ratio: near zero loss, harmless noise is many times the mean.
        return "loss_spike" if loss > state.mean + limit else None

    def judge_update(self, *, finite_norm: bool, overflow: bool) -> Reason | None:
        """Why the engine made no update of a step whose loss was fine; None if it made one.

        Args:
            finite_norm: the gradient's norm is a finite number.
            overflow: fp16's loss scale was too high, and has been lowered.
        """
        if overflow:
            return "fp16_overflow"
        return None if finite_norm else "gradient_not_finite"

    def trained(self, loss: float) -> None:
        """The update was made: ``loss`` joins the running mean, and a streak is over.

        The mean is exponential, corrected for its empty beginning: the k-th loss joins with weight
        ``(1 - decay) / (1 - decay**k)``. Source: Kingma & Ba 2015, section 3, solved for the
        corrected mean, so that one number is the whole state.
        """
        assert math.isfinite(loss), loss
        state = self.state
        state.updates += 1
        weight = (1.0 - _DECAY) / (1.0 - _DECAY**state.updates)
        before = loss if state.mean is None else state.mean
        state.mean = before + weight * (loss - before)
        state.streak, state.streak_start = 0, None
        state.rewound_to = None

    def skipped(self, step: int, reason: Reason) -> Action:
        """The step was not trained on: count it, and say what follows.

        An overflow of fp16 is how the loss scale finds its height, no sign of trouble: it neither
        lengthens a streak nor ends one.

        Args:
            step: the step's number, counted from 1.
        """
        config, state = self.config, self.state
        state.skipped += 1
        if reason == "fp16_overflow":
            return "go_on"
        if state.streak == 0:
            state.streak_start = step
        state.streak += 1
        if state.streak < config.max_skipped:
            return "go_on"
        if config.then == "rewind" and state.rewinds < config.max_rewinds:
            return "rewind"
        return "stop"

    def newest_to_try(self) -> int:
        """The last step whose checkpoint a rewind may go back to.

        From before the trouble; and if the last rewind has not helped, from before that one, too.
        """
        state = self.state
        assert state.streak_start is not None
        steps = [state.streak_start, *([state.rewound_to] if state.rewound_to is not None else [])]
        return min(steps) - 1

    def rewound(self, saved: GuardState, to_step: int) -> None:
        """The weights are a checkpoint's again: so is the habit that new losses are judged by.

        The counts go on: they belong to the run, whose data goes forward through a rewind.

        Args:
            saved: the guard's state in that checkpoint; ``GuardState()`` for the run's beginning.
            to_step: that checkpoint's step.
        """
        state = self.state
        state.mean, state.updates = saved.mean, saved.updates
        state.streak, state.streak_start = 0, None
        state.rewinds += 1
        state.rewound_to = to_step
