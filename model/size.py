"""How many parameters a configured model has, reckoned without torch."""

from __future__ import annotations

from model.config import ModelConfig


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model that ``model.build.build`` makes."""
    own = {
        "transformer": _transformer,
        "rnn": _recurrent,
        "lstm": _recurrent,
        "gru": _recurrent,
        "convolutional": _convolutional,
    }[model.kind](model)
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


def _recurrent(model: ModelConfig) -> int:
    d, norm = model.d_model, 2 * model.d_model
    linear = d * d + d
    # The gates, a plain unit's one: of the input and of the state, a bias of each.
    unit = {"rnn": 1, "gru": 3, "lstm": 4}[model.kind] * 2 * linear
    encoder = norm + 2 * unit + linear + d * d
    decoder = norm + unit
    mapped = 0 if model.attention == "general" else 2 * linear
    attention = norm + mapped + linear
    attention += {"general": d * d, "additive": d}.get(model.attention, 0)
    bridge = model.decoder_layers * (linear + d * d)
    layers = model.encoder_layers * encoder + model.decoder_layers * decoder
    return layers + attention + bridge + 2 * norm


def _convolutional(model: ModelConfig) -> int:
    d, norm = model.d_model, 2 * model.d_model
    convolution = model.kernel_size * d * 2 * d + 2 * d
    attention = 2 * (d * d + d)
    attention += {"general": d * d, "additive": d}.get(model.attention, 0)
    encoder = convolution + norm
    decoder = convolution + attention + 2 * norm
    layers = model.encoder_layers * encoder + model.decoder_layers * decoder
    return layers + 2 * norm + positions(model)


def positions(model: ModelConfig) -> int:
    """Parameters of learned positions, of either side."""
    return 2 * model.max_positions * model.d_model if model.positions == "learned" else 0
