"""Drawing pieces from a model's distribution.

Shapes: N rows, V vocabulary.

Sources: top-k: Fan et al. 2018 (arXiv 1805.04833); top-p: Holtzman et al. 2020 (arXiv 1904.09751).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, key: int, sample: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64, that decide one sample of one sentence, whatever its batch."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, key, sample))))
    return torch.from_numpy(generator.random(count))


def truncated(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits, minus infinity where a piece may not be drawn.

    Args:
        top_k: pieces that stay, the most probable; 0 for all.
        top_p: of those the fewest stay whose probabilities sum up to at least this.
    """
    if 0 < top_k < logits_NV.size(1):
        smallest_N1 = logits_NV.topk(top_k, dim=1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < smallest_N1, -math.inf)
    if top_p < 1.0:
        sorted_NV, order_NV = logits_NV.sort(dim=1, descending=True)
        probs_NV = sorted_NV.double().softmax(1)
        before_NV = probs_NV.cumsum(1) - probs_NV
        sorted_NV = sorted_NV.masked_fill(before_NV >= top_p, -math.inf)
        logits_NV = torch.empty_like(logits_NV).scatter_(1, order_NV, sorted_NV)
    return logits_NV


def draw(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One id a row from the softmax of the logits: where its sums pass ``uniform_N``."""
    cumulative_NV = logits_NV.double().softmax(1).cumsum_(1)
    # Just below the sum, lest rounding lead beyond the last piece that may be drawn.
    last_N1 = torch.nextafter(cumulative_NV[:, -1:], cumulative_NV.new_zeros(()))
    wanted_N1 = (uniform_N[:, None] * cumulative_NV[:, -1:]).minimum(last_N1)
    return torch.searchsorted(cumulative_NV, wanted_N1, right=True)[:, 0].clamp_(
        max=logits_NV.size(1) - 1  # of a row of NaN
    )
