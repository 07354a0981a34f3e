"""How many parameters a configured model has, reckoned without torch."""

from __future__ import annotations

from model.config import ModelConfig


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model that ``model.build.build`` makes."""
    own = {"transformer": _transformer}[model.kind](model)
    return (1 if model.tie_embeddings else 3) * vocab_size * model.d_model + own


def _transformer(model: ModelConfig) -> int:
    d, norm = model.d_model, 2 * model.d_model
    heads_k, heads_v = model.num_heads * model.key_width, model.num_heads * model.value_width
    attention = 2 * (d * heads_k + heads_k) + d * heads_v + heads_v + heads_v * d + d
    attention += {"general": heads_k * model.key_width, "additive": heads_k}.get(model.attention, 0)
    feed_forward = 2 * d * model.d_ff + model.d_ff + d
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    total = model.encoder_layers * encoder + model.decoder_layers * decoder
    if model.norm == "pre":
        total += 2 * norm
    return total + positions(model)


def positions(model: ModelConfig) -> int:
    """Parameters of learned positions, of either side."""
    return 2 * model.max_positions * model.d_model if model.positions == "learned" else 0
