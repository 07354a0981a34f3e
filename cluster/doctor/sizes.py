"""How large a configured model is, without importing torch."""

from __future__ import annotations

from model.config import ModelConfig
from trainer.config import RunConfig

# A checkpoint holds master weights and both of Adam's moments in float32.
_CHECKPOINT_BYTES = 12
_AVERAGE_BYTES = 4


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the Transformer, as ``model.transformer.Transformer`` has them."""
    d, norm = model.d_model, 2 * model.d_model
    attention = 4 * (d * d + d)
    feed_forward = 2 * d * model.d_ff + model.d_ff + d
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    total = (1 if model.tie_embeddings else 3) * vocab_size * d
    total += model.encoder_layers * encoder + model.decoder_layers * decoder
    if model.norm == "pre":
        total += 2 * norm
    if model.positions == "learned":
        total += 2 * model.max_positions * d
    return total


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
