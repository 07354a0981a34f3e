"""Attention: one interface for every way to compare a query with a key, and to compute the rest.

``make_score`` gives a module that is called with queries, keys and values of one head or several:

- ``scaled_dot``: ``q . k / sqrt(K)`` (Vaswani et al. 2017, section 3.2.1);
- ``dot``: ``q . k``, without the scale;
- ``general``: ``q^T W k``, a matrix W for each head (Luong et al. 2015, section 3.1);
- ``additive``: ``w^T tanh(q + k)``, a vector w for each head (Bahdanau et al. 2015, appendix A.1.2;
  their matrices are the projections that make q and k).

Each has a reference, which is the formula as it is written, and faster implementations equal to it.

Shapes: B batch, H heads, T queries, S keys, K width of a head's queries and keys, V of its values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from model.attention_kernels import (
    additive_scores,
    explicit_attention,
    fused_attention,
    use_explicit,
)
from model.attention_local import Blocks, flex_attention
from model.config import ScoreName
from model.dropout import dropout as drop_out
from model.masks import Seen, causal_mask, local_mask, padding_mask, self_mask

__all__ = [
    "AdditiveScore",
    "DotScore",
    "GeneralScore",
    "How",
    "Score",
    "ScoreName",
    "causal_mask",
    "local_mask",
    "make_score",
    "padding_mask",
    "self_mask",
    "use_explicit",
    "weighted_sum",
]

# The formula; step by step with gradients by hand (a CPU); PyTorch's fused kernels; a neighbourhood
# in blocks; PyTorch's FlexAttention; whichever but the last is fastest.
How = Literal["fastest", "reference", "explicit", "fused", "blocks", "flex"]


def weighted_sum(
    scores_BHTS: Tensor, value_BHSV: Tensor, mask: Tensor | None, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``softmax(scores + mask) V``: what every attention does with its scores.

    Args:
        mask: additive, broadcastable to [B, H, T, S], or None.

    Returns:
        ``(output_BHTV, weights_BHTS)``: the weights before dropout, float32 at least.

    Source: Vaswani et al. 2017, equation 1.
    """
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(-1)
    used_BHTS = drop_out(weights_BHTS.to(value_BHSV.dtype), dropout, training=True)
    return used_BHTS @ value_BHSV, weights_BHTS


class Score(nn.Module, ABC):
    """An attention: its score is what differs from one to another.

    Its parameters are used in its ``forward`` alone (ZeRO stage 3).
    """

    implementations: tuple[How, ...]
    # From which length on a neighbourhood is computed in blocks instead of as a whole square with a
    # mask. Measured with radii of 4 to 32 as ``use_explicit`` was: at 128 the square takes 0.4 to 1
    # times as long, at 512 1.1 to 2.6 times.
    blocks_from = 384

    def in_blocks(self, length: int, radius: int | None) -> bool:
        """Whether self-attention over this length is fastest in blocks."""
        return radius is not None and length >= max(self.blocks_from, 8 * radius)

    def forward(
        self,
        query_BHTK: Tensor,
        key_BHSK: Tensor,
        value_BHSV: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        radius: int | None = None,
        dropout: float = 0.0,
        record: list[Tensor] | None = None,
        how: How = "fastest",
    ) -> Tensor:
        """Attend from every query; [B, H, T, V].

        Args:
            query_BHTK: of another type than the keys, they are cast to the keys'; values, too.
            mask: additive, broadcastable to [B, H, T, S], or None.
            causal: hide later positions; of self-attention, as ``radius``.
            radius: hide positions further away than this. See ``masks.self_mask``.
            dropout: probability to drop a weight; 0 outside training.
            record: a list to which the weights [B, H, T, S], float32, are appended; slower.
            how: which implementation.

        Raises:
            ValueError: this attention has no such implementation, or not for these arguments.
        """
        if how not in self.implementations:
            known = ", ".join(self.implementations)
            raise ValueError(f"{type(self).__name__} has no implementation {how!r}: {known}")
        query_BHTK, value_BHSV = query_BHTK.to(key_BHSK.dtype), value_BHSV.to(key_BHSK.dtype)
        query_BHTK = self.transformed(query_BHTK)
        if record is not None:
            how = "reference"
        seen = Seen(mask, causal, radius)
        length, device = query_BHTK.size(2), query_BHTK.device
        if how == "fastest" and self.in_blocks(length, radius):
            how = "blocks"
        if how == "blocks":
            if radius is None:
                raise ValueError("blocks are of a neighbourhood: give a radius")
            blocks = Blocks(length, radius, causal=causal)
            parts = blocks.queries(query_BHTK), blocks.keys(key_BHSK), blocks.keys(value_BHSV)
            seen = Seen(blocks.mask(mask, query_BHTK.size(0), device))
            return blocks.joined(self.computed(*parts, seen, dropout, "fastest"))
        if how != "reference":
            return self.computed(query_BHTK, key_BHSK, value_BHSV, seen, dropout, how)
        scores_BHTS, whole = self.scores(query_BHTK, key_BHSK), seen.as_mask(length, device)
        output_BHTV, weights_BHTS = weighted_sum(scores_BHTS, value_BHSV, whole, dropout=dropout)
        if record is not None:
            record.append(weights_BHTS.float())
        return output_BHTV

    def plain_scale(self, width: int) -> float | None:
        """The factor of dot products of queries and keys as they are; None for other scores."""
        return None

    def transformed(self, query_BHTK: Tensor) -> Tensor:
        """What the scores are made of instead of the query."""
        return query_BHTK

    @abstractmethod
    def scores(self, query_BHTK: Tensor, key_BHSK: Tensor) -> Tensor:
        """The reference: scores [B, H, T, S] of transformed queries, float32 at least."""

    @abstractmethod
    def computed(
        self,
        query_BHTK: Tensor,
        key_BHSK: Tensor,
        value_BHSV: Tensor,
        seen: Seen,
        dropout: float,
        how: How,
    ) -> Tensor:
        """Attention of transformed queries by an implementation that is no reference."""


class DotScore(Score):
    """``q . k``, scaled by ``1 / sqrt(K)`` or not."""

    implementations = ("fastest", "reference", "explicit", "fused", "blocks", "flex")

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled

    def plain_scale(self, width: int) -> float | None:
        """See ``Score``."""
        return self._scale(width)

    def _scale(self, width: int) -> float:
        return width**-0.5 if self.scaled else 1.0

    def scores(self, query_BHTK: Tensor, key_BHSK: Tensor) -> Tensor:
        """See ``Score``."""
        products_BHTS = query_BHTK @ key_BHSK.transpose(-1, -2)
        precise = torch.promote_types(products_BHTS.dtype, torch.float32)
        return products_BHTS.to(precise) * self._scale(query_BHTK.size(-1))

    def computed(
        self,
        query_BHTK: Tensor,
        key_BHSK: Tensor,
        value_BHSV: Tensor,
        seen: Seen,
        dropout: float,
        how: How,
    ) -> Tensor:
        """See ``Score``."""
        heads, length = (query_BHTK, key_BHSK, value_BHSV), query_BHTK.size(2)
        scale, device = self._scale(query_BHTK.size(-1)), query_BHTK.device
        if how == "flex":
            if dropout > 0:
                raise ValueError("FlexAttention drops no weights: choose another implementation")
            return flex_attention(*heads, seen, scale=scale)
        if how == "fastest":
            sizes = length, key_BHSK.size(2)
            gradients = torch.is_grad_enabled()
            explicit = use_explicit(device, query_BHTK.dtype, *sizes, gradients=gradients)
            how = "explicit" if explicit else "fused"
        if how == "fused" and seen == Seen(None, causal=True):
            return fused_attention(*heads, None, scale=scale, causal=True, dropout=dropout)
        compute = explicit_attention if how == "explicit" else fused_attention
        return compute(*heads, seen.as_mask(length, device), scale=scale, dropout=dropout)


class GeneralScore(DotScore):
    """``q^T W k``: a dot product with the query seen through a matrix, one for each head."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__(scaled=False)
        self.weight = nn.Parameter(torch.empty(num_heads, width, width))
        for matrix in self.weight.unbind(0):
            nn.init.xavier_uniform_(matrix)

    def plain_scale(self, width: int) -> float | None:
        """See ``Score``."""
        return None

    def transformed(self, query_BHTK: Tensor) -> Tensor:
        """``W^T q``."""
        num_batch, num_heads, length, width = query_BHTK.shape
        query_HMK = query_BHTK.transpose(0, 1).reshape(num_heads, num_batch * length, width)
        product_HMK = torch.bmm(query_HMK, self.weight.to(query_HMK.dtype))
        return product_HMK.view(num_heads, num_batch, length, width).transpose(0, 1)


class AdditiveScore(Score):
    """``w^T tanh(q + k)``: a hidden layer for each query and key."""

    implementations = ("fastest", "reference", "explicit", "blocks")
    blocks_from = 96  # each pair costs more: 1.3 to 1.6 times at 96, 3 to 4 at 256

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width))
        bound = math.sqrt(3 / width)  # a variance of 1 / K
        nn.init.uniform_(self.weight, -bound, bound)

    def scores(self, query_BHTK: Tensor, key_BHSK: Tensor) -> Tensor:
        """See ``Score``."""
        precise = torch.promote_types(query_BHTK.dtype, torch.float32)
        query_BHTK, key_BHSK = query_BHTK.to(precise), key_BHSK.to(precise)
        hidden_BHTSK = (query_BHTK[:, :, :, None] + key_BHSK[:, :, None]).tanh()
        return (hidden_BHTSK * self.weight.to(precise)[:, None, None]).sum(-1)

    def computed(
        self,
        query_BHTK: Tensor,
        key_BHSK: Tensor,
        value_BHSV: Tensor,
        seen: Seen,
        dropout: float,
        how: How,
    ) -> Tensor:
        """See ``Score``."""
        mask = seen.as_mask(query_BHTK.size(2), query_BHTK.device)
        scores_BHTS = additive_scores(query_BHTK, key_BHSK, self.weight)
        return weighted_sum(scores_BHTS, value_BHSV, mask, dropout=dropout)[0]


def make_score(name: ScoreName, num_heads: int, width: int) -> Score:
    """An attention by its name, freshly initialised, of heads with queries and keys so wide."""
    match name:
        case "general":
            return GeneralScore(num_heads, width)
        case "additive":
            return AdditiveScore(num_heads, width)
        case _:
            return DotScore(scaled=name == "scaled_dot")
