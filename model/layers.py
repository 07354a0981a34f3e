"""The Transformer's layers: positions, feed-forward, residual layers.

Shapes: B batch, L length, S source length, T target length, D d_model.

Every parameter is used only inside the forward of the module that owns it: DeepSpeed's ZeRO stage
3 gathers a parameter when its module is called, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoding import Places
from model.dropout import dropout, dropout_add
from model.linear import Linear
from model.multi_head import MultiHeadAttention
from model.packed import (
    PackedLayer,
    Side,
    packed_decoder_layer,
    packed_encoder_layer,
    packed_positions,
)
from model.rows import Rows


@lru_cache(maxsize=16)
def sinusoids(length: int, d_model: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position vectors [L, D]: sines in the even dimensions, cosines in the odd; cached.

    Source: Vaswani et al. 2017, section 3.5.
    """
    # A tensor made under inference mode could not be used in training later.
    with torch.inference_mode(False):
        position_L1 = torch.arange(length, dtype=torch.float64)[:, None]
        even = torch.arange(0, d_model, 2, dtype=torch.float64)
        angle = position_L1 * torch.exp(even * (-math.log(10000.0) / d_model))
        table_LD = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return table_LD.to(device=device, dtype=dtype)


class Positions(nn.Module):
    """Adds the scaled embeddings to the vectors of their positions, and drops out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.max_positions = config.max_positions
        self.dropout = config.dropout
        self.weight: nn.Parameter | None
        if config.positions == "learned":
            self.weight = nn.Parameter(torch.empty(config.max_positions, config.d_model))
            nn.init.normal_(self.weight, std=config.d_model**-0.5)
        else:
            self.weight = None

    def forward(self, embedded_BLD: Tensor, first: int = 0, side: Side | None = None) -> Tensor:
        """``embedded * sqrt(D) + position``, the first one being position ``first``.

        Given a ``side``, of packed sequences ([N, D]), whose tokens' positions it has.

        Raises:
            ValueError: beyond the learned positions.
        """
        end = first + embedded_BLD.size(1) if side is None else side.longest
        if self.weight is None:
            # Whole powers of two, so that few tables are made.
            size = max(256, 1 << (end - 1).bit_length())
            table = sinusoids(size, self.d_model, embedded_BLD.device, embedded_BLD.dtype)
        elif end > self.max_positions:
            raise ValueError(
                f"a sequence of {end} pieces is longer than the model's {self.max_positions} "
                "learned positions: shorten it, or train with a larger model.max_positions"
            )
        else:
            table = self.weight
        scale = self.d_model**0.5
        if side is not None:
            dropout_now = self.dropout if self.training else 0.0
            return packed_positions(embedded_BLD, table, side, dropout_now, scale=scale)
        summed_BLD = torch.add(table[first:end], embedded_BLD, alpha=scale)
        return dropout(summed_BLD, self.dropout, training=self.training)


class FeedForward(nn.Module):
    """Two linear maps with a rectifier between. Source: Vaswani et al. 2017, section 3.3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner = Linear(config.d_model, config.d_ff)
        self.outer = Linear(config.d_ff, config.d_model)
        self.dropout = config.activation_dropout
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, inputs_BLD: Tensor) -> Tensor:
        """Each position by itself."""
        hidden = self.inner(inputs_BLD, relu=True)
        return self.outer(dropout(hidden, self.dropout, training=self.training))  # type: ignore[no-any-return]


def _attention(config: ModelConfig, *, over_memory: bool) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        dropout=config.attention_dropout,
        over_memory=over_memory,
        key_width=config.key_width,
        value_width=config.value_width,
        score=config.attention,
        radius=None if over_memory else config.local_radius,
    )


class _Layer(nn.Module):
    """What encoder and decoder layers share: the residual around each sub-layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.dropout = config.dropout
        self.attention = _attention(config, over_memory=False)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def residual(
        self, inputs_BLD: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``norm(x + sublayer(x))`` (the paper's), or ``x + sublayer(norm(x))``."""
        if self.pre_norm:
            outputs_BLD = sublayer(norm(inputs_BLD))
            return dropout_add(outputs_BLD, inputs_BLD, self.dropout, training=self.training)
        outputs_BLD = sublayer(inputs_BLD)
        summed_BLD = dropout_add(outputs_BLD, inputs_BLD, self.dropout, training=self.training)
        return norm(summed_BLD)  # type: ignore[no-any-return]


class EncoderLayer(_Layer):
    """Self-attention, then feed-forward. Source: Vaswani et al. 2017, section 3.1."""

    def forward(
        self,
        states_BSD: Tensor,
        mask: Tensor | PackedLayer | None,
        record: list[Tensor] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """One layer over the source; ``mask`` hides padding, ``record`` takes the weights.

        ``rows`` are given if states are rows, [R, D].
        """
        if isinstance(mask, PackedLayer):
            return packed_encoder_layer(self, states_BSD, mask)
        states_BSD = self.residual(
            states_BSD,
            self.attention_norm,
            lambda x: self.attention(x, None, mask, record=record, rows=rows),
        )
        return self.residual(states_BSD, self.feed_forward_norm, self.feed_forward)


class DecoderLayer(_Layer):
    """Causal self-attention, attention over the source, feed-forward (section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.cross = _attention(config, over_memory=True)
        self.cross_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        states_BTD: Tensor,
        memory_BSD: Tensor,
        memory_mask: Tensor | PackedLayer | None,
        record: list[Tensor] | None = None,
        cross_record: list[Tensor] | None = None,
        rows: Rows | None = None,
        memory_rows: Rows | None = None,
    ) -> Tensor:
        """One layer over the target and, through ``memory_BSD``, the source."""
        if isinstance(memory_mask, PackedLayer):
            return packed_decoder_layer(self, states_BTD, memory_BSD, memory_mask)
        states_BTD = self.residual(
            states_BTD,
            self.attention_norm,
            lambda x: self.attention(x, causal=True, record=record, rows=rows),
        )
        states_BTD = self.residual(
            states_BTD,
            self.cross_norm,
            lambda x: self.cross(
                x, memory_BSD, memory_mask, record=cross_record, rows=rows, memory_rows=memory_rows
            ),
        )
        return self.residual(states_BTD, self.feed_forward_norm, self.feed_forward)

    def step(
        self,
        states_ND: Tensor,
        cache: tuple[Tensor, Tensor],
        places: Places,
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        cross_record: list[Tensor] | None = None,
    ) -> Tensor:
        """One new position of every hypothesis, without gradients; see ``MultiHeadAttention``."""
        states_ND = self.residual(
            states_ND,
            self.attention_norm,
            lambda x: self.attention.step(x, cache, places),
        )
        states_ND = self.residual(
            states_ND,
            self.cross_norm,
            lambda x: self.cross.step_over(x, memory, memory_mask, cross_record),
        )
        return self.residual(states_ND, self.feed_forward_norm, self.feed_forward)
