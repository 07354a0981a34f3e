"""Convolutional sequence to sequence: the model that the paper names beside recurrent ones.

Blocks of a convolution, a gated linear unit and a residual connection; the decoder's look to the
left only, and each attends to the encoder's output. ``ConvolutionalModel`` tells where it departs
from the source.

Shapes: B batch, L length, S source length, T target length, D d_model, W kernel size, J hypotheses
of a sentence, N = B * J.

Source: Gehring et al. 2017 (arXiv 1705.03122), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.attention import make_score, padding_mask
from model.config import ModelConfig
from model.decoding import RowState
from model.dropout import dropout_add
from model.encoder_decoder import EncoderDecoder
from model.layers import Positions
from model.loss import PAD_ID

# Keeps the variance of a sum of two.
_SQRT_HALF = 0.5**0.5


class _Windows(torch.autograd.Function):
    """Every position's neighbourhood, side by side: [B, L, D] to [B, L, W * D].

    So that a convolution is one matrix product. With gradients, of 2,100 positions, D 128 (512)
    and W 3 on one core with AMX, in ms of CPU time: bfloat16 2.6 (33), where conv1d takes 5.1 (88),
    conv2d over channels-last 4.0 (87), a product for each place of the window 3.1 (35), and windows
    by PyTorch's own padding and joining 3.0 (36); float32 10 (134), where conv1d takes 12 (166).
    """

    @staticmethod
    def forward(ctx: Any, inputs_BLD: Tensor, size: int, before: int) -> Tensor:
        num_batch, length, width = inputs_BLD.shape
        ctx.size, ctx.before = size, before
        windows = inputs_BLD.new_empty((num_batch, length, size, width))
        for place in range(size):
            inside, seen = _overlap(place - before, length)
            windows[:, inside, place] = inputs_BLD[:, seen]
            windows[:, : inside.start, place] = 0
            windows[:, inside.stop :, place] = 0
        return windows.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        num_batch, length, columns = grad.shape
        grad_BLWD = grad.reshape(num_batch, length, ctx.size, columns // ctx.size)
        grad_BLD = grad_BLWD[:, :, ctx.before].clone()
        for place in range(ctx.size):
            if place != ctx.before:
                inside, seen = _overlap(place - ctx.before, length)
                grad_BLD[:, seen] += grad_BLWD[:, inside, place]
        return grad_BLD, None, None


def _overlap(shift: int, length: int) -> tuple[slice, slice]:
    """Positions whose neighbour ``shift`` to the right exists, and those neighbours."""
    first = min(max(0, -shift), length)
    last = max(min(length, length - shift), first)
    return slice(first, last), slice(first + shift, last + shift)


class GatedConvolution(nn.Module):
    """A convolution to twice the width, one half of which gates the other; padded to keep length.

    Source: Gehring et al. 2017, section 3.2; initial weights of section 3.5.
    """

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.size = config.kernel_size
        self.before = self.size - 1 if causal else self.size // 2
        self.linear = nn.Linear(self.size * config.d_model, 2 * config.d_model)
        # A gate lets about half through, a quarter of the variance.
        nn.init.normal_(self.linear.weight, std=(4.0 / self.linear.in_features) ** 0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs_BLD: Tensor) -> Tensor:
        """All positions, [B, L, D]; beyond the ends are zeros."""
        windows = _Windows.apply(inputs_BLD, self.size, self.before)  # type: ignore[no-untyped-call]
        return functional.glu(self.linear(windows), -1)

    def step(self, inputs_ND: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """One new position, given the inputs [N, W - 1, D] before it: its output, the new past."""
        window = torch.cat([past, inputs_ND[:, None]], 1)
        return functional.glu(self.linear(window.flatten(1)), -1), window[:, 1:]


class EncoderBlock(nn.Module):
    """Gated convolution and residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.d_model)
        self.convolution = GatedConvolution(config, causal=False)

    def forward(self, states_BSD: Tensor, keep_BS1: Tensor | None) -> Tensor:
        """One block over the source; what ``keep_BS1`` is 0 at, padding, is not seen."""
        inputs_BSD = self.norm(states_BSD)
        if keep_BS1 is not None:
            inputs_BSD = inputs_BSD * keep_BS1
        outputs_BSD = self.convolution(inputs_BSD)
        return dropout_add(outputs_BSD, states_BSD, self.dropout, training=self.training)


class DecoderBlock(nn.Module):
    """Causal gated convolution, then attention to the source, each with a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(width)
        self.convolution = GatedConvolution(config, causal=True)
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.score = make_score(config.attention, 1, width)
        self.output = nn.Linear(width, width)
        for linear in (self.query, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        states_BTD: Tensor,
        embedded_BTD: Tensor,
        memory: list[Tensor],
        memory_mask: Tensor | None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """One block over the target and, through the ``memory``, the source.

        Args:
            states_BTD: of the block before.
            embedded_BTD: the decoder's input, part of every query.
            memory: the source's keys and values, [B, 1, S, D] each.
            memory_mask: additive mask of its padding, or None.
            record: a list to which the weights [B, 1, T, S] are appended.
        """
        convolved_BTD = self.convolution(self.norm(states_BTD))
        states_BTD = self._residual(convolved_BTD, states_BTD)
        query_BTD = self._query(states_BTD, embedded_BTD)
        return self._residual(self._attend(query_BTD, memory, memory_mask, record), states_BTD)

    def step(
        self,
        states_ND: Tensor,
        embedded_ND: Tensor,
        past: Tensor,
        memory: list[Tensor],
        memory_mask: Tensor | None,
        record: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One new position of every hypothesis, without gradients.

        Returns:
            Its states, and the inputs [N, W - 1, D] that the next position's convolution sees.
        """
        convolved_ND, past = self.convolution.step(self.norm(states_ND), past)
        states_ND = self._residual(convolved_ND, states_ND)
        query_ND = self._query(states_ND, embedded_ND)
        # A sentence's hypotheses are as many queries.
        query_BJD = query_ND.view(memory[0].size(0), -1, query_ND.size(1))
        attended_BJD = self._attend(query_BJD, memory, memory_mask, record)
        return self._residual(attended_BJD.view_as(states_ND), states_ND), past

    def _residual(self, outputs: Tensor, states: Tensor) -> Tensor:
        return dropout_add(outputs, states, self.dropout, training=self.training)

    def _query(self, states: Tensor, embedded: Tensor) -> Tensor:
        return self.query(self.attention_norm(states)) + embedded  # type: ignore[no-any-return]

    def _attend(
        self,
        query_BTD: Tensor,
        memory: list[Tensor],
        mask: Tensor | None,
        record: list[Tensor] | None,
    ) -> Tensor:
        attended_B1TD = self.score(query_BTD[:, None], *memory, mask, dropout=0.0, record=record)
        return self.output(attended_B1TD[:, 0])  # type: ignore[no-any-return]


class ConvolutionalModel(EncoderDecoder):
    """Encoder and decoder of gated convolutions; every decoder block attends to the source.

    As in the source: queries are a map of the block's state plus the target's embedding, keys are
    the encoder's output, values its output plus the source's embedding; one head; both embeddings
    know their positions. So a sentence has one set of keys and values for all blocks.

    Otherwise than there: layer norm before each convolution and each attention, and dropout on what
    a residual connection takes in, as in a pre-norm Transformer, instead of weight normalisation
    and residual sums scaled by sqrt(1/2); scores scaled by 1 / sqrt(D) by default; and attention's
    output not scaled by the square root of the source's length, for no variance needs keeping here.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.source_positions = Positions(config)
        self.target_positions = Positions(config)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.encoder_norm = nn.LayerNorm(config.d_model)
        self.decoder_norm = nn.LayerNorm(config.d_model)

    def states(self, source_BS: Tensor, target_in_BT: Tensor) -> Tensor:
        """Final decoder states [B, T, D]."""
        return self._decode(target_in_BT, *self._encode(source_BS))

    def attention_maps(self, source_BS: Tensor, target_in_BT: Tensor) -> dict[str, Tensor]:
        """Every attention weight of one pass, float32: "cross" [layers, B, 1, T, S]."""
        record: list[Tensor] = []
        with torch.no_grad():
            self._decode(target_in_BT, *self._encode(source_BS), record)
        return {"cross": torch.stack(record)}

    def start(self, source_BS: Tensor, width: int) -> RowState:
        """Encode; before a hypothesis begins, its convolutions see zeros. No gradients."""
        memory, mask = self._encode(source_BS)
        num_rows, past = source_BS.size(0) * width, self.config.kernel_size - 1
        rows = [memory[0].new_zeros((num_rows, past, self.config.d_model)) for _ in self.decoder]
        return RowState(memory, mask, rows, width)

    def step(self, ids_N: Tensor, state: RowState, record: list[Tensor] | None = None) -> Tensor:
        """Final states [N, D], to project, of ``ids_N``, the newest piece of every hypothesis.

        ``state`` takes the position in; see ``EncoderDecoder.step``.
        """
        embedded_N1D = self.matrix("target", ids_N[:, None], "embed")
        embedded_ND = self.target_positions(embedded_N1D, state.length)[:, 0]
        state.length += 1
        states_ND, last = embedded_ND, len(self.decoder) - 1
        for index, block in enumerate(self.decoder):
            assert isinstance(block, DecoderBlock)
            states_ND, state.rows[index] = block.step(
                states_ND,
                embedded_ND,
                state.rows[index],
                state.memory,
                state.memory_mask,
                record if index == last else None,
            )
        return self.decoder_norm(states_ND)  # type: ignore[no-any-return]

    def _encode(self, source_BS: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Keys and values of the source, [B, 1, S, D] each, and the mask of its padding."""
        keep_BS = source_BS != PAD_ID
        # Asking a GPU whether anything is padded would make the host wait for it.
        padded = source_BS.device.type != "cpu" or not bool(keep_BS.all())
        mask = padding_mask(keep_BS) if padded else None
        embedded_BSD = self.source_positions(self.matrix("source", source_BS, "embed"))
        keep_BS1 = keep_BS[:, :, None].to(embedded_BSD.dtype) if padded else None
        states_BSD = embedded_BSD
        for block in self.encoder:
            states_BSD = block(states_BSD, keep_BS1)
        keys_BSD = self.encoder_norm(states_BSD)
        values_BSD = (keys_BSD + embedded_BSD) * _SQRT_HALF
        return [keys_BSD[:, None], values_BSD[:, None]], mask

    def _decode(
        self,
        target_in_BT: Tensor,
        memory: list[Tensor],
        memory_mask: Tensor | None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        # Targets are padded on the right, where no convolution of the decoder looks.
        embedded_BTD = self.target_positions(self.matrix("target", target_in_BT, "embed"))
        states_BTD = embedded_BTD
        for block in self.decoder:
            states_BTD = block(states_BTD, embedded_BTD, memory, memory_mask, record)
        return self.decoder_norm(states_BTD)  # type: ignore[no-any-return]
