"""Ways to compute attention once queries, keys and values are there: fused, and by hand for CPUs.

Shapes: B batch, H heads, T queries, S keys, K width of a head's queries and keys, V of its values,
N = B * H, C columns of joined projections.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.dropout import keep_mask
from model.rows import Rows

# Of the hidden layer of additive attention at a time: on a CPU what its caches hold.
_ADDITIVE_ELEMENTS = {"cpu": 1 << 18}
_ADDITIVE_ELEMENTS_ELSEWHERE = 1 << 26


def use_explicit(
    device: torch.device, dtype: torch.dtype, num_queries: int, num_keys: int, *, gradients: bool
) -> bool:
    """Whether attention is computed step by step instead of by PyTorch's fused kernel.

    Measured on an AVX-512 and AMX CPU, one thread, heads of 32 and 64, how many times as long the
    fused kernel takes:

    - with gradients, bfloat16: 2 to 10 up to 128 keys (its backward is slow where lengths are no
      multiple of 16), 1.1 to 1.8 at 200 to 256, 0.5 to 1 from 300 on;
    - with gradients, float32: 1.1 to 1.3 up to 16 keys, then 0.8 to 1.3 and less from 128 on;
    - without, several queries: 1.1 to 2.7 up to 16 keys, 0.2 to 1 beyond;
    - without, one query (a decoder's step): 0.2 to 0.6 in bfloat16, about 1 in float32.
    """
    if device.type != "cpu":
        return False
    if gradients:
        return num_keys <= 16 if dtype == torch.float32 else num_queries * num_keys <= 256 * 256
    return num_queries > 1 and num_keys <= 16


def fused_attention(
    query_BHTK: Tensor,
    key_BHSK: Tensor,
    value_BHSV: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """PyTorch's fused kernels; ``causal`` adds the causal mask (with no ``mask``).

    ``scale`` is that of the dot products, by default ``1 / sqrt(K)``.
    """
    if mask is not None:
        mask = mask.to(query_BHTK.dtype)
    return functional.scaled_dot_product_attention(
        query_BHTK,
        key_BHSK,
        value_BHSV,
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
    )


def explicit_attention(
    query_BHTK: Tensor,
    key_BHSK: Tensor,
    value_BHSV: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Step by step, with gradients by hand; on a CPU."""
    if torch.is_grad_enabled() or dropout > 0:
        return _Explicit.apply(query_BHTK, key_BHSK, value_BHSV, mask, scale, dropout)  # type: ignore[no-any-return, no-untyped-call]
    key_NSK, value_NSV = key_BHSK.flatten(0, 1), value_BHSV.flatten(0, 1)
    weights_NTS = _weights(query_BHTK.flatten(0, 1), key_NSK, mask, query_BHTK.size(1), scale)
    output_NTV = torch.bmm(weights_NTS, value_NSV)
    return output_NTV.view(*query_BHTK.shape[:3], value_BHSV.size(3))


def explicit_packed(
    query_BTC: Tensor | None,
    packed_BSC: Tensor,
    mask: Tensor | None,
    num_heads: int,
    widths: tuple[int, int],
    *,
    scale: float,
    dropout: float,
    rows: tuple[Rows | None, Rows | None] = (None, None),
) -> Tensor:
    """Dot-product attention from joined projections, joined heads [B, T, H * V] out.

    Args:
        query_BTC: the queries, [B, T, H * K]; None where they stand in ``packed_BSC``.
        packed_BSC: queries (if not given), keys and values side by side.
        widths: K and V.
        rows: given if the queries' side (and so the output) or that of the keys are rows instead,
            [R, C].
    """
    settings = mask, num_heads, widths, scale, dropout, rows
    return _Packed.apply(query_BTC, packed_BSC, *settings)  # type: ignore[no-any-return, no-untyped-call]


def split_heads(packed_BLC: Tensor, num_heads: int, widths: Sequence[int]) -> Sequence[Tensor]:
    """Parts that stand side by side, of these widths a head: views [B, H, L, width]."""
    num_batch, length, _ = packed_BLC.shape
    if len(set(widths)) == 1:
        parts = packed_BLC.view(num_batch, length, len(widths), num_heads, widths[0])
        return parts.permute(2, 0, 3, 1, 4).unbind(0)
    columns = [num_heads * width for width in widths]
    return [
        part.view(num_batch, length, num_heads, width).transpose(1, 2)
        for part, width in zip(torch.split(packed_BLC, columns, dim=2), widths, strict=True)
    ]


def join_heads(output_BHTV: Tensor) -> Tensor:
    """[B, H, T, V] to [B, T, H * V]."""
    return output_BHTV.transpose(1, 2).flatten(2)


def softmax(scores_NTS: Tensor) -> Tensor:
    """In place, without gradients, for scores of any size."""
    scores_NTS.sub_(scores_NTS.amax(-1, keepdim=True)).exp_()
    return scores_NTS.div_(scores_NTS.sum(-1, keepdim=True))


# A float32 sum of exponentials between these lost nothing that counts by over- or underflow.
_SAFE_SUMS = 1e-20, 1e20


def _scores(query_NTK: Tensor, key_NSK: Tensor, scale: float) -> Tensor:
    """Scaled scores [N, T, S], float32 at least."""
    scores_NTS = torch.bmm(query_NTK, key_NSK.transpose(1, 2)).to(_precise(query_NTK))
    return scores_NTS if scale == 1 else scores_NTS.mul_(scale)


def _weights(
    query_NTK: Tensor, key_NSK: Tensor, mask: Tensor | None, num_heads: int, scale: float
) -> Tensor:
    """Attention weights [N, T, S] in the queries' type; the softmax is in float32 at least."""
    weights_NTS = _scores(query_NTK, key_NSK, scale)
    safe_NT1 = _quick_softmax_(weights_NTS, mask, num_heads)
    if safe_NT1 is not None:
        # Row by row, so that a sentence comes out the same whatever batch it is in.
        again_NTS = _scores(query_NTK, key_NSK, scale)
        if mask is not None:
            _by_head(again_NTS, num_heads).add_(mask)
        weights_NTS = torch.where(safe_NT1, weights_NTS, softmax(again_NTS))
    return weights_NTS.to(query_NTK.dtype)


def _quick_softmax_(scores_NTS: Tensor, mask: Tensor | None, num_heads: int) -> Tensor | None:
    """Masked softmax in place; None, or which rows [N, T, 1] went well if any did not.

    It does without the largest score of each row, which takes longer to find than all the rest
    (0.25 of 0.46 ms for 300 heads of 27 keys, float32, AVX-512), and without exponentials of minus
    infinity, each of which takes as long as ten others.
    """
    scores_NTS.exp_()
    if mask is not None:
        _by_head(scores_NTS, num_heads).mul_(mask.exp())
    sums_NT1 = scores_NTS.sum(-1, keepdim=True)
    scores_NTS.div_(sums_NT1)
    if scores_NTS.device.type == "cpu":  # elsewhere asking would make the host wait
        if scores_NTS.numel() == 0:
            return None
        least, most = torch.stack(sums_NT1.aminmax()).tolist()
        if _SAFE_SUMS[0] < least and most < _SAFE_SUMS[1]:
            return None
    return (sums_NT1 > _SAFE_SUMS[0]) & (sums_NT1 < _SAFE_SUMS[1])


def _by_head(rows_NTS: Tensor, num_heads: int) -> Tensor:
    """[N, T, S] as [B, H, T, S]."""
    num_rows, num_queries, num_keys = rows_NTS.shape
    return rows_NTS.view(num_rows // num_heads, num_heads, num_queries, num_keys)


def _precise(sample: Tensor) -> torch.dtype:
    return torch.promote_types(sample.dtype, torch.float32)


def _attended(
    ctx: Any,
    query_NTK: Tensor,
    key_NSK: Tensor,
    value_NSV: Tensor,
    mask: Tensor | None,
    num_heads: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention [N, T, V], and in ``ctx`` what ``_gradients`` needs."""
    weights_NTS = _weights(query_NTK, key_NSK, mask, num_heads, scale)
    used_NTS, drop = weights_NTS, None
    if dropout > 0:
        drop, kept_scale = keep_mask(weights_NTS, dropout)
        drop.mul_(kept_scale)
        used_NTS = weights_NTS * drop
    output_NTV = torch.bmm(used_NTS, value_NSV)
    ctx.save_for_backward(query_NTK, key_NSK, value_NSV, weights_NTS, drop)
    ctx.num_heads, ctx.scale = num_heads, scale
    return output_NTV


def _gradients(ctx: Any, grad_NTV: Tensor, into: Sequence[Tensor]) -> None:
    """The gradients of queries, keys and values, written into those three."""
    query_NTK, key_NSK, value_NSV, weights_NTS, drop = ctx.saved_tensors
    grad_query, grad_key, grad_value = into
    used_NTS = weights_NTS if drop is None else weights_NTS * drop
    torch.bmm(used_NTS.transpose(1, 2), grad_NTV, out=grad_value)
    grad_NTS = torch.bmm(grad_NTV, value_NSV.transpose(1, 2))
    if drop is not None:
        grad_NTS.mul_(drop)
    # Softmax: dS = P * dP - P * sum_s(P dP). In float32: in bfloat16 each of these takes longer
    # than a cast, and what comes of rows as short as a sentence ten times as long.
    # (Scaled here and not by a factor of the products: oneDNN compiles one with a factor anew.)
    precise = _precise(grad_NTS)
    weights_NTS = weights_NTS.to(precise)
    grad_NTS = grad_NTS.to(precise).mul_(weights_NTS)
    grad_NTS.addcmul_(weights_NTS, grad_NTS.sum(-1, keepdim=True), value=-1)
    if ctx.scale != 1:
        grad_NTS.mul_(ctx.scale)
    grad_NTS = grad_NTS.to(query_NTK.dtype)
    torch.bmm(grad_NTS, key_NSK, out=grad_query)
    torch.bmm(grad_NTS.transpose(1, 2), query_NTK, out=grad_key)


def _as_given(sample: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which the device "meta" does not have."""
    kind = sample.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()  # a tenth of the time of switching off what is off
    return torch.autocast(kind, enabled=False)


class _Explicit(torch.autograd.Function):
    """Attention of heads that are split already, gradients by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTK: Tensor,
        key_BHSK: Tensor,
        value_BHSV: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        num_heads = query_BHTK.size(1)
        with _as_given(query_BHTK):
            query_NTK, key_NSK = query_BHTK.flatten(0, 1), key_BHSK.flatten(0, 1)
            value_NSV = value_BHSV.flatten(0, 1)
            output_NTV = _attended(
                ctx, query_NTK, key_NSK, value_NSV, mask, num_heads, scale, dropout
            )
            return output_NTV.view(*query_BHTK.shape[:3], value_BHSV.size(3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTV: Tensor) -> tuple[Tensor | None, ...]:
        num_batch, num_heads = grad_BHTV.shape[:2]
        with _as_given(grad_BHTV):
            into = [torch.empty_like(part) for part in ctx.saved_tensors[:3]]
            _gradients(ctx, grad_BHTV.flatten(0, 1), into)
        grads = (part.view(num_batch, num_heads, *part.shape[1:]) for part in into)
        return *grads, None, None, None


class _Packed(torch.autograd.Function):
    """Attention from joined projections, gradients by hand: one copy in, one copy out.

    PyTorch's own backward of the fused kernel takes half of a small model's step on a CPU, and the
    automatic one of the explicit steps copies and casts what need not be.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BTC: Tensor | None,
        packed_BSC: Tensor,
        mask: Tensor | None,
        num_heads: int,
        widths: tuple[int, int],
        scale: float,
        dropout: float,
        rows: tuple[Rows | None, Rows | None],
    ) -> Tensor:
        ctx.is_self, ctx.rows = query_BTC is None, rows
        with _as_given(packed_BSC):
            packed_BSC = _sequences(packed_BSC, rows[1])
            if query_BTC is None:
                parts = _unpacked(packed_BSC, num_heads, (widths[0], *widths))
            else:
                query_BTC = _sequences(query_BTC, rows[0])
                parts = [
                    *_unpacked(query_BTC, num_heads, widths[:1]),
                    *_unpacked(packed_BSC, num_heads, widths),
                ]
            query_NTK, key_NSK, value_NSV = parts
            output_NTV = _attended(
                ctx, query_NTK, key_NSK, value_NSV, mask, num_heads, scale, dropout
            )
            return _Parts([output_NTV], num_heads, output_NTV[None]).packed(rows[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        query_NTK, key_NSK, value_NSV, *_ = ctx.saved_tensors
        num_heads, (rows, key_rows) = ctx.num_heads, ctx.rows
        with _as_given(grad_BTC):
            grad_BTC = _sequences(grad_BTC, rows)
            (grad_NTV,) = _unpacked(grad_BTC, num_heads, (value_NSV.size(-1),))
            if ctx.is_self:
                joined = _Parts.like([query_NTK, key_NSK, value_NSV], num_heads)
                _gradients(ctx, grad_NTV, joined.each)
                return None, joined.packed(rows), None, None, None, None, None, None
            query = _Parts.like([query_NTK], num_heads)
            joined = _Parts.like([key_NSK, value_NSV], num_heads)
            _gradients(ctx, grad_NTV, [*query.each, *joined.each])
            grads = query.packed(rows), joined.packed(key_rows)
            return *grads, None, None, None, None, None, None


def _sequences(states: Tensor, rows: Rows | None) -> Tensor:
    return states if rows is None else rows.split(states)


def _unpacked(packed_BLC: Tensor, num_heads: int, widths: Sequence[int]) -> Sequence[Tensor]:
    """Parts side by side, to a copy [N, L, width] of each: one copy where they are as wide."""
    if len(set(widths)) == 1:
        num_batch, length, _ = packed_BLC.shape
        parts = packed_BLC.view(num_batch, length, len(widths), num_heads, widths[0])
        return parts.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2).unbind(0)
    return [part.flatten(0, 1) for part in split_heads(packed_BLC, num_heads, widths)]


class _Parts(NamedTuple):
    """Tensors [N, L, width] that will stand side by side; of one storage where they are as wide."""

    each: Sequence[Tensor]
    num_heads: int
    whole_PNLK: Tensor | None = None  # noqa: N815 - shape suffix

    @classmethod
    def like(cls, parts: Sequence[Tensor], num_heads: int) -> _Parts:
        """Empty ones of these shapes."""
        if any(part.shape != parts[0].shape for part in parts):
            return cls([torch.empty_like(part) for part in parts], num_heads)
        whole_PNLK = parts[0].new_empty((len(parts), *parts[0].shape))
        return cls(whole_PNLK.unbind(0), num_heads, whole_PNLK)

    def packed(self, rows: Rows | None) -> Tensor:
        """A copy [B, L, H * widths] or of rows; one step where they are of one storage."""
        num_rows, length, _ = self.each[0].shape
        num_batch = num_rows // self.num_heads
        columns = [self.num_heads * part.size(2) for part in self.each]
        if rows is None:
            packed = place_BLC = self.each[0].new_empty((num_batch, length, sum(columns)))
        else:
            packed, place_BLC = rows.room(self.each[0], sum(columns))
        if self.whole_PNLK is not None:
            num_parts, width = len(columns), self.whole_PNLK.size(3)
            shape = num_parts, num_batch, self.num_heads, length, width
            place_BLPHK = place_BLC.view(num_batch, length, num_parts, self.num_heads, width)
            place_BLPHK.copy_(self.whole_PNLK.view(shape).permute(1, 3, 0, 2, 4))
            return packed
        for part, place in zip(self.each, torch.split(place_BLC, columns, dim=2), strict=True):
            place.view(num_batch, length, self.num_heads, -1).copy_(
                _by_head(part, self.num_heads).transpose(1, 2)
            )
        return packed


def additive_scores(query_BHTK: Tensor, key_BHSK: Tensor, weight_HK: Tensor) -> Tensor:
    """Scores [B, H, T, S] of additive attention, float32 at least.

    The hidden layer, K numbers for each query and key, is made a piece at a time and once more for
    the gradients: it would take K times the memory of the scores.
    """
    return _Additive.apply(query_BHTK, key_BHSK, weight_HK)  # type: ignore[no-any-return, no-untyped-call]


class _Additive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_BHTK: Tensor, key_BHSK: Tensor, weight_HK: Tensor) -> Tensor:
        ctx.save_for_backward(query_BHTK, key_BHSK, weight_HK)
        num_batch, num_heads, num_queries, _ = query_BHTK.shape
        num_keys = key_BHSK.size(2)
        with _as_given(query_BHTK):
            query_NTK, key_NSK, weight_NK1 = _additive_rows(query_BHTK, key_BHSK, weight_HK)
            scores_NTS = query_NTK.new_empty((num_batch * num_heads, num_queries, num_keys))
            for rows, places in _additive_pieces(query_NTK, num_keys):
                hidden = _additive_hidden(query_NTK[rows, places], key_NSK[rows])
                scores = torch.bmm(hidden.flatten(1, 2), weight_NK1[rows])
                scores_NTS[rows, places] = scores.view(hidden.shape[:3])
            return scores_NTS.view(num_batch, num_heads, num_queries, num_keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTS: Tensor) -> tuple[Tensor, ...]:
        query_BHTK, key_BHSK, weight_HK = ctx.saved_tensors
        with _as_given(grad_BHTS):
            query_NTK, key_NSK, weight_NK1 = _additive_rows(query_BHTK, key_BHSK, weight_HK)
            grad_NTS = grad_BHTS.flatten(0, 1)
            grad_query, grad_key = torch.empty_like(query_NTK), torch.zeros_like(key_NSK)
            grad_weight = torch.zeros_like(weight_NK1)
            for rows, places in _additive_pieces(query_NTK, key_NSK.size(1)):
                hidden = _additive_hidden(query_NTK[rows, places], key_NSK[rows])
                grad = grad_NTS[rows, places]
                grad_weight[rows] += torch.bmm(
                    hidden.flatten(1, 2).transpose(1, 2), grad.flatten(1, 2)[..., None]
                )
                # tanh' = 1 - tanh^2
                hidden.square_().neg_().add_(1).mul_(weight_NK1[rows].transpose(1, 2)[:, None])
                hidden.mul_(grad[..., None])
                grad_query[rows, places] = hidden.sum(2)
                grad_key[rows] += hidden.sum(1)
        return (
            grad_query.view(query_BHTK.shape).to(query_BHTK.dtype),
            grad_key.view(key_BHSK.shape).to(key_BHSK.dtype),
            grad_weight.view(-1, *weight_HK.shape).sum(0).to(weight_HK.dtype),
        )


def _additive_rows(
    query_BHTK: Tensor, key_BHSK: Tensor, weight_HK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 at least, a row for each head: [N, T, K], [N, S, K], [N, K, 1]."""
    precise = torch.promote_types(query_BHTK.dtype, torch.float32)
    weight_NK = weight_HK.to(precise).repeat(query_BHTK.size(0), 1)
    query_NTK, key_NSK = query_BHTK.flatten(0, 1).to(precise), key_BHSK.flatten(0, 1).to(precise)
    return query_NTK, key_NSK, weight_NK[..., None]


def _additive_hidden(query_ntK: Tensor, key_nSK: Tensor) -> Tensor:
    return (query_ntK[:, :, None] + key_nSK[:, None]).tanh_()


def _additive_pieces(query_NTK: Tensor, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Rows and queries of each piece."""
    num_rows, num_queries, width = query_NTK.shape
    most = _ADDITIVE_ELEMENTS.get(query_NTK.device.type, _ADDITIVE_ELEMENTS_ELSEWHERE)
    of_a_query = max(1, num_keys * width)
    queries = max(1, min(num_queries, most // of_a_query))
    rows = max(1, most // (of_a_query * queries))
    starts = itertools.product(range(0, num_rows, rows), range(0, num_queries, queries))
    for row, query in starts:
        yield slice(row, row + rows), slice(query, query + queries)
