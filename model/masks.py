"""What attention may not see, as additive masks: padding, later positions, far ones.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def padding_mask(keep_BS: Tensor) -> Tensor:
    """Additive float32 mask [B, 1, 1, S]: 0 where ``keep_BS`` is true, else minus infinity.

    A row without any key to keep keeps its first, so that no softmax is ever over nothing: such a
    row (an empty sentence) has a finite result that nobody reads, instead of NaN.
    """
    keep_BS = keep_BS.clone()
    keep_BS[:, 0] = True
    mask_BS = torch.zeros(keep_BS.shape, dtype=torch.float32, device=keep_BS.device)
    return mask_BS.masked_fill_(~keep_BS, -math.inf)[:, None, None, :]


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Additive float32 mask [1, 1, T, T] that hides later positions; cached, not to be changed."""
    return _square(_rounded(length), device, True, None)[:, :, :length, :length]


def local_mask(length: int, radius: int, device: torch.device, *, causal: bool) -> Tensor:
    """Additive float32 mask [1, 1, T, T] open where ``|i - j| <= radius``; as ``causal_mask``.

    Source: Vaswani et al. 2017, section 4 (self-attention restricted to a neighbourhood r).
    """
    return _square(_rounded(length), device, causal, radius)[:, :, :length, :length]


def self_mask(
    mask: Tensor | None, length: int, device: torch.device, *, causal: bool, radius: int | None
) -> Tensor | None:
    """What self-attention may see: ``mask`` (of padding), restricted further.

    A position always sees itself, so that one of padding far from any word has a finite result,
    too.

    Returns:
        An additive mask, broadcastable to [B, H, T, T], or None where everything may be seen.
    """
    if not causal and radius is None:
        return mask
    square = _square(_rounded(length), device, causal, radius)[:, :, :length, :length]
    if mask is None:
        return square
    both = square + mask
    both.diagonal(dim1=-2, dim2=-1).zero_()
    return both


class Seen(NamedTuple):
    """What attention may see: a mask, and of self-attention what ``self_mask`` restricts."""

    mask: Tensor | None
    causal: bool = False
    radius: int | None = None

    def as_mask(self, length: int, device: torch.device) -> Tensor | None:
        """One additive mask for all of it; ``length`` is that of the queries."""
        return self_mask(self.mask, length, device, causal=self.causal, radius=self.radius)


def _rounded(length: int) -> int:
    """A whole power of two, so that few masks are made."""
    return max(64, 1 << (length - 1).bit_length())


@lru_cache(maxsize=16)
def _square(size: int, device: torch.device, causal: bool, radius: int | None) -> Tensor:
    # A tensor made under inference mode could not be used in training later.
    with torch.inference_mode(False):
        square = torch.zeros((size, size), dtype=torch.float32, device=device)
        hidden = torch.full((size, size), -math.inf, dtype=torch.float32, device=device)
        if causal:
            square += hidden.triu(1)
        if radius is not None:
            square += hidden.tril(-radius - 1)
            square += hidden.triu(radius + 1)
        return square[None, None]
