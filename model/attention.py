"""Scaled dot-product attention with several heads: a reference, a fused one and one for CPUs.

Shapes: B batch, H heads, T queries, S keys, K width of a head, D = H * K, N = B * H.

Source: Vaswani et al. 2017, section 3.2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.dropout import keep_mask


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
    size = max(64, 1 << (length - 1).bit_length())
    return _causal_square(size, device)[:, :, :length, :length]


@lru_cache(maxsize=16)
def _causal_square(size: int, device: torch.device) -> Tensor:
    # A tensor made under inference mode could not be used in training later.
    with torch.inference_mode(False):
        square = torch.full((size, size), -math.inf, dtype=torch.float32, device=device)
        return square.triu_(1)[None, None]


def reference_attention(
    query_BHTK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The formula as it is written: ``softmax(Q K^T / sqrt(K) + mask) V``.

    Args:
        mask: additive, broadcastable to [B, H, T, S], or None.

    Returns:
        ``(output_BHTK, weights_BHTS)``; the weights in float32.

    Source: Vaswani et al. 2017, equation 1.
    """
    scale = query_BHTK.size(-1) ** -0.5
    scores_BHTS = (query_BHTK @ key_BHSK.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(-1)
    return weights_BHTS.to(value_BHSK.dtype) @ value_BHSK, weights_BHTS


def fused_attention(
    query_BHTK: Tensor,
    key_BHSK: Tensor,
    value_BHSK: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """The same by PyTorch's fused kernels; ``causal`` adds the causal mask (with no ``mask``)."""
    if mask is not None:
        mask = mask.to(query_BHTK.dtype)
    return functional.scaled_dot_product_attention(
        query_BHTK, key_BHSK, value_BHSK, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )


def _weights(query_NTK: Tensor, key_NSK: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """Attention weights [N, T, S] in the queries' type; the softmax is in float32 at least.

    Written with element-wise steps: ``softmax`` over rows as short as a sentence (14 keys) takes
    1.9 ms where amax, sub, exp, sum and div together take 0.25 ms (584 heads, float32, AVX-512).
    """
    precise = torch.promote_types(query_NTK.dtype, torch.float32)
    scores_NTS = torch.bmm(query_NTK, key_NSK.transpose(1, 2)).to(precise)
    scores_NTS.mul_(query_NTK.size(-1) ** -0.5)
    if mask is not None:
        num_rows, num_queries, num_keys = scores_NTS.shape
        view = scores_NTS.view(num_rows // num_heads, num_heads, num_queries, num_keys)
        view.add_(mask)
    scores_NTS.sub_(scores_NTS.amax(-1, keepdim=True)).exp_()
    scores_NTS.div_(scores_NTS.sum(-1, keepdim=True))
    return scores_NTS.to(query_NTK.dtype)


def attend(query_BHTK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of heads that are split already, by what is fastest; for decoding, no gradients."""
    num_batch, num_heads, num_queries, width = query_BHTK.shape
    device, dtype, num_keys = query_BHTK.device, query_BHTK.dtype, key_BHSK.size(2)
    if not use_explicit(device, dtype, num_queries, num_keys, gradients=False):
        return fused_attention(query_BHTK, key_BHSK, value_BHSK, mask)
    key_NSK, value_NSK = key_BHSK.flatten(0, 1), value_BHSK.flatten(0, 1)
    weights_NTS = _weights(query_BHTK.flatten(0, 1), key_NSK, mask, num_heads)
    return torch.bmm(weights_NTS, value_NSK).view(num_batch, num_heads, num_queries, width)


def split_heads(packed_BLC: Tensor, num_heads: int, width: int) -> Tensor:
    """[B, L, P * D] to [P, B, H, L, K] (a view): P is 3 for q, k, v, 2 for k, v, 1 for one."""
    num_batch, length, columns = packed_BLC.shape
    num_parts = columns // (num_heads * width)
    return packed_BLC.view(num_batch, length, num_parts, num_heads, width).permute(2, 0, 3, 1, 4)


def join_heads(output_BHTK: Tensor) -> Tensor:
    """[B, H, T, K] to [B, T, D]."""
    return output_BHTK.transpose(1, 2).flatten(2)


class _ExplicitAttention(torch.autograd.Function):
    """Attention from joined projections, gradients by hand: one copy in, one copy out.

    PyTorch's own backward of the fused kernel takes half of a small model's step on a CPU, and the
    automatic one of the explicit steps copies and casts what need not be.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BTD: Tensor | None,
        packed_BSC: Tensor,
        mask: Tensor | None,
        num_heads: int,
        width: int,
        dropout: float,
    ) -> Tensor:
        with torch.autocast(packed_BSC.device.type, enabled=False):
            packed_PNSK = split_heads(packed_BSC, num_heads, width).contiguous().flatten(1, 2)
            if query_BTD is None:
                query_NTK, key_NSK, value_NSK = packed_PNSK.unbind(0)
            else:
                query_PNTK = split_heads(query_BTD, num_heads, width).contiguous().flatten(1, 2)
                query_NTK, (key_NSK, value_NSK) = query_PNTK[0], packed_PNSK.unbind(0)
            weights_NTS = _weights(query_NTK, key_NSK, mask, num_heads)
            used_NTS, drop = weights_NTS, None
            if dropout > 0:
                drop, scale = keep_mask(weights_NTS, dropout)
                drop.mul_(scale)
                used_NTS = weights_NTS * drop
            output_NTK = torch.bmm(used_NTS, value_NSK)
            ctx.save_for_backward(query_NTK, key_NSK, value_NSK, weights_NTS, drop, output_NTK)
            ctx.num_heads, ctx.is_self = num_heads, query_BTD is None
            return _join_parts(output_NTK[None], num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        query_NTK, key_NSK, value_NSK, weights_NTS, drop, output_NTK = ctx.saved_tensors
        num_heads, width = ctx.num_heads, query_NTK.size(-1)
        num_parts = 3 if ctx.is_self else 2
        with torch.autocast(grad_BTD.device.type, enabled=False):
            grad_NTK = split_heads(grad_BTD, num_heads, width)[0].contiguous().flatten(0, 1)
            packed_PNSK = key_NSK.new_empty((num_parts, *key_NSK.shape))
            grad_query = packed_PNSK[0] if ctx.is_self else torch.empty_like(query_NTK)
            grad_key, grad_value = packed_PNSK[-2], packed_PNSK[-1]

            used_NTS = weights_NTS if drop is None else weights_NTS * drop
            torch.bmm(used_NTS.transpose(1, 2), grad_NTK, out=grad_value)
            grad_NTS = torch.bmm(grad_NTK, value_NSK.transpose(1, 2))
            if drop is not None:
                grad_NTS.mul_(drop)
            # Softmax: dS = P * (dP - sum_s(P dP)), and that sum is the product of dO with O.
            inner_NT1 = (grad_NTK * output_NTK).sum(-1, keepdim=True)
            grad_NTS.sub_(inner_NT1).mul_(weights_NTS).mul_(width**-0.5)
            torch.bmm(grad_NTS, key_NSK, out=grad_query)
            torch.bmm(grad_NTS.transpose(1, 2), query_NTK, out=grad_key)

            grad_packed = _join_parts(packed_PNSK, num_heads)
            if ctx.is_self:
                return None, grad_packed, None, None, None, None
            return _join_parts(grad_query[None], num_heads), grad_packed, None, None, None, None


def _join_parts(parts_PNLK: Tensor, num_heads: int) -> Tensor:
    """[P, B * H, L, K] to [B, L, P * D]."""
    num_parts, rows, length, width = parts_PNLK.shape
    parts_PBHLK = parts_PNLK.view(num_parts, rows // num_heads, num_heads, length, width)
    return parts_PBHLK.permute(1, 3, 0, 2, 4).flatten(2)


class MultiHeadAttention(nn.Module):
    """Several attentions in parallel over projections of the input, joined and projected again.

    Self-attention joins its three input projections into one matrix product; attention over
    another sequence joins those of keys and values.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, d_model: int, num_heads: int, *, dropout: float, over_memory: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.width = d_model // num_heads
        self.dropout = dropout
        self.over_memory = over_memory
        if over_memory:
            self.query = nn.Linear(d_model, d_model)
            self.key_value = nn.Linear(d_model, 2 * d_model)
        else:
            self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for each matrix, joined ones as the several they are; zero biases."""
        for name, linear in self.named_children():
            assert isinstance(linear, nn.Linear)
            parts = {"query_key_value": 3, "key_value": 2}.get(name, 1)
            for part in linear.weight.chunk(parts):
                nn.init.xavier_uniform_(part)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        inputs_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from every position.

        Args:
            inputs_BTD: the queries' side.
            memory_BSD: the keys' side; None for self-attention.
            mask: additive float32 mask, broadcastable to [B, H, T, S], or None.
            causal: hide later positions (self-attention, with no ``mask``).
            record: a list to which the weights [B, H, T, S] are appended; slower.
        """
        if memory_BSD is None:
            query_BTD, packed_BSC = None, self.query_key_value(inputs_BTD)
        else:
            query_BTD, packed_BSC = self.query(inputs_BTD), self.key_value(memory_BSD)
        length = inputs_BTD.size(1)
        dropout = self.dropout if self.training else 0.0
        explicit = use_explicit(
            packed_BSC.device,
            packed_BSC.dtype,
            length,
            packed_BSC.size(1),
            gradients=torch.is_grad_enabled(),
        )
        if causal and (explicit or record is not None):
            mask = causal_mask(length, inputs_BTD.device)
        if explicit and record is None:
            joined_BTD = _ExplicitAttention.apply(  # type: ignore[no-untyped-call]
                query_BTD, packed_BSC, mask, self.num_heads, self.width, dropout
            )
            return self.output(joined_BTD)  # type: ignore[no-any-return]
        parts = split_heads(packed_BSC, self.num_heads, self.width)
        query = parts[0] if query_BTD is None else self.heads(query_BTD)
        key, value = parts[-2], parts[-1]
        if record is not None:
            result, weights = reference_attention(query, key, value, mask)
            record.append(weights)
        else:
            result = fused_attention(
                query, key, value, mask, causal=causal and mask is None, dropout=dropout
            )
        return self.output(join_heads(result))  # type: ignore[no-any-return]

    def heads(self, inputs_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, H, L, K] (a view)."""
        return split_heads(inputs_BLD, self.num_heads, self.width)[0]

    def step(
        self, inputs_ND: Tensor, cache: tuple[Tensor, Tensor], first: int, mask: Tensor | None
    ) -> Tensor:
        """Self-attention of one new position over the cache, without gradients.

        Args:
            inputs_ND: the new position of every hypothesis, J a sentence, one sentence after the
                other.
            cache: keys and values [B, H, C, K]; the new ones are written from place ``first`` on.
            mask: additive, [B, 1, J, first + J]: what each hypothesis may see; None for all.
        """
        num_batch, num_heads, _, width = cache[0].shape
        parts_BJC = self.query_key_value(inputs_ND).view(num_batch, -1, 3 * num_heads * width)
        query, *new = split_heads(parts_BJC, num_heads, width)
        end = first + query.size(2)
        for store, part in zip(cache, new, strict=True):
            store[:, :, first:end] = part
        key, value = (store[:, :, :end] for store in cache)
        return self.output(join_heads(attend(query, key, value, mask)).view_as(inputs_ND))  # type: ignore[no-any-return]

    def memory_heads(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, K] of the memory, made once for all steps."""
        parts = split_heads(self.key_value(memory_BSD), self.num_heads, self.width)
        return parts[0].contiguous(), parts[1].contiguous()

    def step_over(
        self,
        inputs_ND: Tensor,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Attention of one new position of every hypothesis over its sentence's memory.

        The J hypotheses of a sentence are as many queries, so that keys and values exist once a
        sentence. ``record`` takes the weights [B, H, J, S].
        """
        key, value = memory
        query = self.heads(self.query(inputs_ND).view(key.size(0), -1, inputs_ND.size(-1)))
        if record is None:
            result = attend(query, key, value, mask)
        else:
            result, weights = reference_attention(query, key, value, mask)
            record.append(weights)
        return self.output(join_heads(result).view_as(inputs_ND))  # type: ignore[no-any-return]
