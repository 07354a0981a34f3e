"""Self-attention restricted to a neighbourhood, at a cost of the length times the neighbourhood.

Shapes: B batch, H heads, L length, K and V widths of a head, W width of a block, C blocks, E keys
that a block's queries see: 2 W (causal) or 3 W.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.masks import Seen

# Blocks are at least so wide: shorter ones make many small products.
_LEAST_WIDTH = 16


class Blocks:
    """Self-attention cut into blocks: each block's queries see it and its neighbours.

    A block is as wide as the radius or wider, so that nothing near lies beyond its neighbours.
    """

    def __init__(self, length: int, radius: int, *, causal: bool) -> None:
        self.length, self.radius, self.causal = length, radius, causal
        self.width = max(radius, _LEAST_WIDTH)
        self.num_blocks = -(-length // self.width)

    def queries(self, query_BHLK: Tensor) -> Tensor:
        """[B, H, L, K] to [B * C, H, W, K]."""
        blocks_BHCWK = self._padded(query_BHLK, before=0, after=0)
        return blocks_BHCWK.transpose(1, 2).flatten(0, 1)

    def keys(self, key_BHLK: Tensor) -> Tensor:
        """Keys or values, [B, H, L, K] to [B * C, H, E, K]."""
        return self._windows(key_BHLK).transpose(1, 2).flatten(0, 1)

    def mask(self, mask: Tensor | None, num_batch: int, device: torch.device) -> Tensor:
        """Additive mask [B * C, 1, W, E] of padding, [B, 1, 1, L] or none, and of distance.

        A position always sees itself.
        """
        if mask is None:
            mask = torch.zeros((1, 1, 1, self.length), device=device)
        windows_B1CE1 = self._windows(mask.transpose(2, 3), fill=-math.inf)
        both = windows_B1CE1.transpose(3, 4) + _near(self.width, self.radius, self.causal, device)
        both.diagonal(self.width, dim1=-2, dim2=-1).zero_()
        return both.transpose(1, 2).expand(num_batch, -1, -1, -1, -1).flatten(0, 1)

    def joined(self, output_XHWV: Tensor) -> Tensor:
        """[B * C, H, W, V] to [B, H, L, V]."""
        rows, num_heads, width, columns = output_XHWV.shape
        shape = (rows // self.num_blocks, self.num_blocks, num_heads, width, columns)
        return output_XHWV.view(shape).transpose(1, 2).flatten(2, 3)[:, :, : self.length]

    def _padded(self, part: Tensor, before: int, after: int, fill: float = 0.0) -> Tensor:
        """[B, H, L, K] to blocks [B, H, before + C + after, W, K]."""
        short = self.num_blocks * self.width - self.length
        pad = (0, 0, before * self.width, short + after * self.width)
        padded = functional.pad(part, pad, value=fill)
        num_blocks = before + self.num_blocks + after
        return padded.view(*part.shape[:2], num_blocks, self.width, part.size(3))

    def _windows(self, part: Tensor, fill: float = 0.0) -> Tensor:
        """[B, H, L, K] to [B, H, C, E, K]: of each block the one before, itself, the one after."""
        after = 0 if self.causal else 1
        blocks = self._padded(part, 1, after, fill)
        shifted = [blocks[:, :, i : i + self.num_blocks] for i in range(2 + after)]
        return torch.cat(shifted, dim=3)


@lru_cache(maxsize=16)
def _near(width: int, radius: int, causal: bool, device: torch.device) -> Tensor:
    """Additive mask [W, E] of what is far from a block's positions."""
    with torch.inference_mode(False):
        query = torch.arange(width, device=device)[:, None] + width
        key = torch.arange((2 if causal else 3) * width, device=device)[None, :]
        far = (query - key).abs() > radius
        if causal:
            far |= key > query
        return torch.zeros(far.shape, device=device).masked_fill_(far, -math.inf)


def flex_attention(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLV: Tensor,
    seen: Seen,
    *,
    scale: float,
) -> Tensor:
    """Self-attention by PyTorch's FlexAttention, which skips blocks that nobody sees.

    It is compiled on a GPU, on the first use of each shape. On a CPU it has no gradients and is
    computed unfused, which shows that it is right and not how fast it is.

    Args:
        seen: its mask is of padding, [B, 1, 1, L], or None.

    Raises:
        ValueError: gradients are asked of a CPU.
    """
    from torch.nn.attention import flex_attention as flex

    device = query_BHLK.device
    if device.type == "cpu" and torch.is_grad_enabled() and query_BHLK.requires_grad:
        raise ValueError("FlexAttention has no gradients on a CPU: choose another implementation")
    block_mask = None
    if seen.causal or seen.radius is not None:
        block_mask = _block_mask(query_BHLK.size(2), seen.causal, seen.radius, device)
    score_mod = None
    if seen.mask is not None:
        hidden_BL = seen.mask[:, 0, 0]

        def score_mod(
            score: Tensor, batch: Tensor, _head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            # A position always sees itself, where the rest is far.
            itself = (query == key) & (block_mask is not None)
            return torch.where(itself, score, score + hidden_BL[batch, key])

    compute = flex.flex_attention if device.type == "cpu" else _compiled()
    output: Tensor = compute(
        query_BHLK,
        key_BHLK,
        value_BHLV,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
    )
    return output


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as compute

    return torch.compile(compute)


@lru_cache(maxsize=16)
def _block_mask(length: int, causal: bool, radius: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query - key).abs() <= (length if radius is None else radius)
        return near & (query >= key) if causal else near

    with torch.inference_mode(False):
        return create_block_mask(seen, None, None, length, length, device=device)
