"""Several attentions in parallel, in training and step by step over a cache.

Shapes: B batch, H heads, T queries, S keys, K width of a head's queries and keys, V of its values,
D d_model, J hypotheses of a sentence, C columns of joined projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import ScoreName, make_score, use_explicit
from model.attention_kernels import explicit_packed, join_heads, split_heads
from model.decoding import Places
from model.linear import Linear
from model.masks import self_mask
from model.packed import Segments, packed_attention
from model.rows import Rows


class MultiHeadAttention(nn.Module):
    """Several attentions in parallel over projections of the input, joined and projected again.

    Self-attention joins its three input projections into one matrix product; attention over
    another sequence joins those of keys and values.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        dropout: float,
        over_memory: bool,
        key_width: int | None = None,
        value_width: int | None = None,
        score: ScoreName = "scaled_dot",
        radius: int | None = None,
    ) -> None:
        """Heads are ``d_model / num_heads`` wide unless told; ``radius`` is that of ``Score``."""
        super().__init__()
        self.num_heads = num_heads
        self.key_width = d_model // num_heads if key_width is None else key_width
        self.value_width = d_model // num_heads if value_width is None else value_width
        self.dropout = dropout
        self.over_memory = over_memory
        self.radius = radius
        keys, values = num_heads * self.key_width, num_heads * self.value_width
        if over_memory:
            self.query = Linear(d_model, keys)
            self.key_value = Linear(d_model, keys + values)
        else:
            self.query_key_value = Linear(d_model, 2 * keys + values)
        self.output = Linear(values, d_model)
        self.reset_parameters()
        self.score = make_score(score, num_heads, self.key_width)

    def reset_parameters(self) -> None:
        """Xavier uniform for each matrix, joined ones as the several they are; zero biases.

        Those of queries, keys and values are smaller by the root of two, as in fairseq's layers
        (and in PyTorch's, which take the three as one matrix): 0.1 nats less after 400 steps
        (``benchmarks/LOG.md``).
        """
        keys, values = self.num_heads * self.key_width, self.num_heads * self.value_width
        parts = {"query_key_value": [keys, keys, values], "key_value": [keys, values]}
        for name, linear in self.named_children():
            if isinstance(linear, nn.Linear):
                gain = 1.0 if name == "output" else 0.5**0.5
                for part in torch.split(linear.weight, parts.get(name, linear.out_features)):
                    nn.init.xavier_uniform_(part, gain)
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        inputs_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        mask: Tensor | Segments | None = None,
        *,
        causal: bool = False,
        record: list[Tensor] | None = None,
        rows: Rows | None = None,
        memory_rows: Rows | None = None,
    ) -> Tensor:
        """Attend from every position.

        Args:
            inputs_BTD: the queries' side.
            memory_BSD: the keys' side; None for self-attention.
            mask: additive float32 mask, broadcastable to [B, H, T, S], or None; or, of packed
                sequences ([N, D] instead of [B, T, D]), where they begin.
            causal: hide later positions (self-attention, with no ``mask``).
            record: a list to which the weights [B, H, T, S] are appended; slower.
            rows: given if inputs and output are rows, [R, D].
            memory_rows: likewise of the memory.
        """
        if isinstance(mask, Segments):
            return packed_attention(self, inputs_BTD, memory_BSD, mask, causal=causal)
        if memory_BSD is None:
            query_BTC, packed_BSC = None, self.query_key_value(inputs_BTD)
            memory_rows = rows
        else:
            query_BTC, packed_BSC = self.query(inputs_BTD), self.key_value(memory_BSD)
        length = inputs_BTD.size(1) if rows is None else rows.length
        num_keys = packed_BSC.size(1) if memory_rows is None else memory_rows.length
        dropout = self.dropout if self.training else 0.0
        widths = self.key_width, self.value_width
        scale = self.score.plain_scale(self.key_width)
        whole = record is None and not self.score.in_blocks(length, self.radius)
        if scale is not None and whole and _explicit(packed_BSC, length, num_keys):
            mask = self_mask(mask, length, inputs_BTD.device, causal=causal, radius=self.radius)
            joined_BTC = explicit_packed(
                query_BTC,
                packed_BSC,
                mask,
                self.num_heads,
                widths,
                scale=scale,
                dropout=dropout,
                rows=(rows, memory_rows),
            )
            return self.output(joined_BTC)  # type: ignore[no-any-return]
        if memory_rows is not None:
            packed_BSC = memory_rows.split(packed_BSC)
        if query_BTC is None:
            query, key, value = split_heads(packed_BSC, self.num_heads, (widths[0], *widths))
        else:
            query = self._query_heads(query_BTC if rows is None else rows.split(query_BTC))
            key, value = split_heads(packed_BSC, self.num_heads, widths)
        # As a module only where it has parameters. Else it would be called or not by the length of
        # a batch, and ZeRO 3, which gathers in the order in which modules are called, would have
        # ranks with different batches wait for each other for ever.
        attend = self.score if scale is None else self.score.forward
        result_BHTV = attend(
            query,
            key,
            value,
            mask,
            causal=causal,
            radius=self.radius,
            dropout=dropout,
            record=record,
        )
        joined_BTC = join_heads(result_BHTV)
        return self.output(joined_BTC if rows is None else rows.join(joined_BTC))  # type: ignore[no-any-return]

    def _query_heads(self, query_BTC: Tensor) -> Tensor:
        """[B, T, H * K] to [B, H, T, K] (a view)."""
        return split_heads(query_BTC, self.num_heads, (self.key_width,))[0]

    def step(
        self,
        inputs_ND: Tensor,
        cache: tuple[Tensor, Tensor],
        places: Places,
    ) -> Tensor:
        """Self-attention of one new position over the cache, without gradients.

        Args:
            inputs_ND: the new position of every hypothesis, J a sentence, one sentence after the
                other.
            cache: keys [B, H, C, K] and values [B, H, C, V], into which the new ones are written.
            places: where, and what is seen.
        """
        packed_BJC = _by_sentence(self.query_key_value(inputs_ND), cache[0])
        widths = self.key_width, self.key_width, self.value_width
        query, *new = split_heads(packed_BJC, self.num_heads, widths)
        for store, part in zip(cache, new, strict=True):
            store[:, :, places.new] = part
        key, value = (store[:, :, places.seen] for store in cache)
        result_BHJV = self.score(query, key, value, places.mask)
        return self.output(join_heads(result_BHJV).flatten(0, 1))  # type: ignore[no-any-return]

    def memory_heads(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, K] and values [B, H, S, V] of the memory, made once for all steps."""
        widths = self.key_width, self.value_width
        key, value = split_heads(self.key_value(memory_BSD), self.num_heads, widths)
        return key.contiguous(), value.contiguous()

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
        query_BJC = _by_sentence(self.query(inputs_ND), key)
        result_BHJV = self.score(self._query_heads(query_BJC), key, value, mask, record=record)
        return self.output(join_heads(result_BHJV).flatten(0, 1))  # type: ignore[no-any-return]


def _explicit(sample: Tensor, num_queries: int, num_keys: int) -> bool:
    device, gradients = sample.device, torch.is_grad_enabled()
    return use_explicit(device, sample.dtype, num_queries, num_keys, gradients=gradients)


def _by_sentence(projected_NC: Tensor, sample: Tensor) -> Tensor:
    """[B * J, C] to [B, J, C]; ``sample`` has the sentences in its first dimension."""
    return projected_NC.view(sample.size(0), -1, projected_NC.size(1))
