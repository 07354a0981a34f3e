"""How large a configured model is, without importing torch."""

from __future__ import annotations

from model.size import num_parameters
from trainer.config import RunConfig

# A checkpoint holds master weights and both of Adam's moments in float32.
_CHECKPOINT_BYTES = 12
_AVERAGE_BYTES = 4


def parameters(config: RunConfig) -> int:
    """Of the run's model; the vocabulary is taken as large as it may become."""
    return num_parameters(config.model, config.data.vocabulary_size)


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one checkpoint takes."""
    average = _AVERAGE_BYTES if config.trainer.ema_decay is not None else 0
    return parameters(config) * (_CHECKPOINT_BYTES + average)


def gradient_bytes(config: RunConfig) -> int:
    """What the ranks add up at each step."""
    return parameters(config) * (4 if config.trainer.precision == "fp32" else 2)
