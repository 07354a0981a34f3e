"""What a model costs: parameters and floating-point operations, reckoned from its shape.

One multiply-add counts as two operations. Only matrix products are counted (norms, activations and
softmax are a few per cent), which is the convention behind model FLOPs utilisation (Chowdhery et
al. 2022, arXiv 2204.02311, appendix B). Padding is not counted: it is no use to the model.
"""

from __future__ import annotations

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
    for name, peaks in _PEAK_FLOPS.items():
        if name in device_name:
            return peaks.get(precision)
    return None


def forward_flops(
    config: ModelConfig,
    *,
    vocab_size: int,
    source_tokens: float,
    target_tokens: float,
    num_pairs: float,
) -> float:
    """Operations of one forward pass over ``num_pairs`` pairs.

    Args:
        source_tokens, target_tokens: real tokens on each side, the end signs included. Attention
            is reckoned at the mean length, and causal attention in full, as it is computed.
    """
    d = config.d_model
    source_length, target_length = source_tokens / num_pairs, target_tokens / num_pairs
    feed_forward = 2 * 2 * d * config.d_ff
    projections = 2 * 4 * d * d  # query, key, value, output

    def attention(keys: float) -> float:
        return 2 * 2 * keys * d  # scores, then the weighted sum

    encoder = projections + feed_forward + attention(source_length)
    # Cross-attention's keys and values are projected once a source token.
    cross_source = 2 * 2 * d * d
    decoder = (
        projections
        + attention(target_length)
        + 2 * 2 * d * d
        + attention(source_length)
        + feed_forward
    )
    return (
        source_tokens * (config.encoder_layers * encoder + config.decoder_layers * cross_source)
        + target_tokens * config.decoder_layers * decoder
        + target_tokens * 2 * d * vocab_size
    )


def training_flops(
    config: ModelConfig,
    *,
    vocab_size: int,
    source_tokens: float,
    target_tokens: float,
    num_pairs: float,
) -> float:
    """Operations of forward and backward: the backward pass is two products for each one."""
    return 3 * forward_flops(
        config,
        vocab_size=vocab_size,
        source_tokens=source_tokens,
        target_tokens=target_tokens,
        num_pairs=num_pairs,
    )
