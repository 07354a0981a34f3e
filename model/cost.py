"""What a model costs: parameters and floating-point operations, reckoned from its shape.

One multiply-add counts as two operations. Only matrix products are counted (norms, activations and
softmax are a few per cent), which is the convention behind model FLOPs utilisation (Chowdhery et
al. 2022, arXiv 2204.02311, appendix B). Padding is not counted: it is no use to the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from model.config import ModelConfig

# Dense peak, in operations a second, from the vendors' data sheets (SXM variants).
_PEAK_FLOPS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "L4": {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's dense peak for a precision, None where it is not known (every CPU)."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    if words & {"PCIe", "PCIE", "NVL"}:
        return None  # slower than the SXM variants
    for name, peaks in _PEAK_FLOPS.items():
        if name in words:
            return peaks.get(precision)
    return None


@dataclass(frozen=True)
class Work:
    """What a model is given of some pairs with s source and t target tokens each.

    Sums over the pairs, end signs included: most layers cost by the token, attention by the pair of
    tokens.
    """

    source: float
    target: float
    source_source: float
    source_target: float
    target_target: float

    @classmethod
    def of(cls, source_lengths: Sequence[int], target_lengths: Sequence[int]) -> Work:
        """Of the pairs' lengths."""
        pairs = list(zip(source_lengths, target_lengths, strict=True))
        return cls(
            source=sum(s for s, _ in pairs),
            target=sum(t for _, t in pairs),
            source_source=sum(s * s for s, _ in pairs),
            source_target=sum(s * t for s, t in pairs),
            target_target=sum(t * t for _, t in pairs),
        )


def forward_flops(config: ModelConfig, work: Work, *, vocab_size: int) -> float:
    """Operations of one forward pass; causal attention counts in full, as it is computed."""
    layers = {
        "transformer": _transformer,
        "rnn": _recurrent,
        "lstm": _recurrent,
        "gru": _recurrent,
        "convolutional": _convolutional,
    }[config.kind](config, work)
    return layers + work.target * 2 * config.d_model * vocab_size


def _transformer(config: ModelConfig, work: Work) -> float:
    """Every attention as it is computed on short sentences, as PyTorch's counter sees it.

    Additive scores have no product of queries and keys: the multiply-adds of a pair's hidden layer
    with w count (as many as a dot product's), its sums and hyperbolic tangents do not. A
    neighbourhood counts as the whole square, which it is below ``Score.blocks_from`` positions.
    """
    d, heads = config.d_model, config.num_heads
    keys, values = heads * config.key_width, heads * config.value_width
    feed_forward = 2 * 2 * d * config.d_ff
    # Of a query: itself, and the output; of a key: itself and its value.
    queries, memory = 2 * d * (keys + values), 2 * d * (keys + values)
    # For each query and key: the score, then the weighted sum.
    pair = 2 * (keys + values)
    if config.attention == "general":
        queries += 2 * keys * config.key_width
    encoder = work.source * (queries + memory + feed_forward) + work.source_source * pair
    decoder = (
        work.target * (queries + memory + queries + feed_forward)
        # The keys and values of cross-attention are projected once a source token.
        + work.source * memory
        + (work.target_target + work.source_target) * pair
    )
    return config.encoder_layers * encoder + config.decoder_layers * decoder


def _recurrent(config: ModelConfig, work: Work) -> float:
    d = config.d_model
    linear = 2 * d * d
    # The gates, a plain unit's one: of the input and of the state.
    unit = {"rnn": 1, "gru": 3, "lstm": 4}[config.kind] * 2 * linear
    encoder = config.encoder_layers * work.source * (2 * unit + 2 * linear)
    decoder = config.decoder_layers * work.target * unit
    # A query and its output, or the general score's map and the output; a key unless that is it.
    is_mapped = config.attention != "general"
    attention = work.target * 2 * linear + (work.source * linear if is_mapped else 0)
    # What carries the encoder's last states over, once a pair, is left out: under one per cent.
    return encoder + decoder + attention + work.source_target * 2 * 2 * d


def _convolutional(config: ModelConfig, work: Work) -> float:
    d = config.d_model
    convolution = 2 * config.kernel_size * d * 2 * d
    # Of a target token: the query and the output; a map of the query more for "general".
    linears = (3 if config.attention == "general" else 2) * 2 * d * d
    encoder = config.encoder_layers * work.source * convolution
    decoder = work.target * (convolution + linears) + work.source_target * 2 * 2 * d
    return encoder + config.decoder_layers * decoder


def training_flops(config: ModelConfig, work: Work, *, vocab_size: int) -> float:
    """Operations of forward and backward: the backward pass is two products for each one."""
    return 3 * forward_flops(config, work, vocab_size=vocab_size)


def batch_flops(
    config: ModelConfig,
    vocab_size: int,
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
) -> float:
    """Operations of one forward pass over pairs of these lengths, end signs included."""
    return forward_flops(config, Work.of(source_lengths, target_lengths), vocab_size=vocab_size)
