"""Recurrent encoder-decoders with attention: plain (Elman) units, LSTM or GRU.

The encoder's layers read the source in both directions; the decoder's first layer reads the target,
its states ask the attention once, and what the attention answers goes into the layers above and
into the output (Wu et al. 2016, section 3.1; Chen et al. 2018). So attention runs for all targets
at once. Layers are residual, with the norm before and dropout behind each.

What attention answered at the position before does not go into the first layer, as it does in
Bahdanau et al. 2015, for that asks for a loop over positions in which attention runs. Measured on
an LSTM ("tiny", Multi30k, bfloat16, one thread, the same settings): with the loop validation nll
5.74 after 38 updates in 24.7 CPU-seconds, without it 5.71 after 40 updates in 16.4.

Shapes: B batch, S source length, T target length, L either, D d_model, E = 2 D, N hypotheses,
J hypotheses of a sentence. Sequences are time-major inside: recurrent kernels read them so.

Sources: Bahdanau et al. 2015 (arXiv 1409.0473); Hochreiter and Schmidhuber 1997; Cho et al. 2014
(arXiv 1406.1078).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.attention import make_score, padding_mask
from model.config import ModelConfig
from model.decoding import RowState
from model.dropout import dropout, dropout_add
from model.encoder_decoder import EncoderDecoder
from model.loss import PAD_ID

_UNITS: dict[str, Callable[[int, int], nn.RNNBase]] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


class _Rows(torch.autograd.Function):
    """Rows of a matrix, none of them twice: the gradient is copied back, not added up."""

    @staticmethod
    def forward(ctx: Any, inputs_ND: Tensor, rows_M: Tensor) -> Tensor:
        ctx.save_for_backward(rows_M)
        ctx.num_rows = inputs_ND.size(0)
        return inputs_ND.index_select(0, rows_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        (rows_M,) = ctx.saved_tensors
        grad_ND = grad_MD.new_zeros((ctx.num_rows, grad_MD.size(1)))
        return grad_ND.index_copy_(0, rows_M, grad_MD), None


def _rows(inputs_LBD: Tensor, rows_M: Tensor) -> Tensor:
    """Rows of [L * B, D], none twice."""
    return _Rows.apply(inputs_LBD.flatten(0, 1), rows_M)  # type: ignore[no-any-return, no-untyped-call]


def _reversal(lengths_B: Tensor, length: int) -> Tensor:
    """Which row of [S * B, D] comes where when every sentence is read backwards, [S * B].

    Padding stays where it is, behind the sentence, so that it never comes before a word in either
    direction.
    """
    num_sentences = lengths_B.size(0)
    position_S1 = torch.arange(length, device=lengths_B.device)[:, None]
    source_SB = torch.where(position_S1 < lengths_B, lengths_B - 1 - position_S1, position_S1)
    sentence_B = torch.arange(num_sentences, device=lengths_B.device)
    return (source_SB * num_sentences + sentence_B).flatten()


class Recurrence(nn.Module):
    """One layer in one direction, by PyTorch's kernels.

    Measured (one thread of an AVX-512 and AMX CPU, 146 sentences of 14 words, forward and backward,
    milliseconds of processor time at width 128 / 256 in bfloat16): ``nn.LSTM``, which is oneDNN's,
    9.5 / 30 against 12.6 / 30 of a loop over joined gate products with a backward written by hand;
    ``nn.GRU`` 10.8 / 23 against 9.3 / 20. In float32 they take about 1.6 to 2 times as long.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.unit = _UNITS[config.kind](config.d_model, config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for the input, orthogonal for the state, gate by gate; zero biases.

        An LSTM's forget gates begin open, at a bias of 1 (Jozefowicz et al. 2015).
        """
        width = self.unit.hidden_size
        for name, parameter in self.unit.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                continue
            for gate in parameter.detach().chunk(parameter.size(0) // width):
                if name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(gate)
                else:
                    nn.init.orthogonal_(gate)
        if isinstance(self.unit, nn.LSTM):
            bias = self.unit.get_parameter("bias_ih_l0")
            nn.init.ones_(bias.detach()[width : 2 * width])

    def forward(
        self, inputs_LBD: Tensor, start: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """States of every position, and what the next one would go on from.

        Args:
            start: hidden state [B, D], an LSTM's cells behind it; None for zeros.
        """
        states = None if start is None else [part[None] for part in start]
        if isinstance(self.unit, nn.LSTM):
            outputs_LBD, end = self.unit(inputs_LBD, None if states is None else tuple(states))
        else:
            outputs_LBD, hidden = self.unit(inputs_LBD, None if states is None else states[0])
            end = (hidden,)
        return outputs_LBD, [part[0] for part in end]


class EncoderLayer(nn.Module):
    """Both directions over the source, joined and projected, around them the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.d_model)
        self.forwards = Recurrence(config)
        self.backwards = Recurrence(config)
        self.output = _linear(2 * config.d_model, config.d_model)

    def forward(self, states_SBD: Tensor, reversal: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's sum [S, B, D], and the states of both directions [S, B, E]."""
        inputs_SBD = self.norm(states_SBD)
        there_SBD, _ = self.forwards(inputs_SBD)
        back_SBD, _ = self.backwards(_rows(inputs_SBD, reversal).view_as(inputs_SBD))
        back_SBD = _rows(back_SBD, reversal).view_as(inputs_SBD)
        joined_SBE = torch.cat([there_SBD, back_SBD], dim=-1)
        outputs_SBD = self.output(joined_SBE)
        return (
            dropout_add(outputs_SBD, states_SBD, self.dropout, training=self.training),
            joined_SBE,
        )


class DecoderLayer(nn.Module):
    """One direction over the target, around it the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.d_model)
        self.recurrence = Recurrence(config)

    def forward(self, states_LBD: Tensor, start: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The layer's sum [L, B, D], and what the next position would go on from."""
        outputs_LBD, end = self.recurrence(self.norm(states_LBD), start)
        return dropout_add(outputs_LBD, states_LBD, self.dropout, training=self.training), end


class CrossAttention(nn.Module):
    """Decoder states ask the encoder's, by any score of ``model.attention``; one head.

    Source: Bahdanau et al. 2015, section 3.1; Luong et al. 2015, section 3.1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(width)
        # The general score is itself a map of one onto the other.
        is_mapped = config.attention != "general"
        self.query = _linear(width, width) if is_mapped else nn.Identity()
        self.key = _linear(width, width) if is_mapped else nn.Identity()
        self.score = make_score(config.attention, 1, width)
        self.output = _linear(width, width)

    def forward(
        self,
        states_BTD: Tensor,
        key_BSD: Tensor,
        memory_BSD: Tensor,
        mask: Tensor | None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """States and what they found; ``key_BSD`` is ``self.key(memory_BSD)``."""
        query_BTD = self.query(self.norm(states_BTD))
        context_B1TD = self.score(
            query_BTD[:, None], key_BSD[:, None], memory_BSD[:, None], mask, record=record
        )
        outputs_BTD = self.output(context_B1TD[:, 0])
        return dropout_add(outputs_BTD, states_BTD, self.dropout, training=self.training)


class RecurrentModel(EncoderDecoder):
    """Encoder and decoder of recurrent layers, joined by attention."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        width = config.d_model
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.bridge = _linear(2 * width, config.decoder_layers * width)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.cross = CrossAttention(config)
        self.decoder_norm = nn.LayerNorm(width)

    def states(self, source_BS: Tensor, target_in_BT: Tensor) -> Tensor:
        """Final decoder states [B, T, D]."""
        return self._states(source_BS, target_in_BT)

    def attention_maps(self, source_BS: Tensor, target_in_BT: Tensor) -> dict[str, Tensor]:
        """Every attention weight of one pass, float32: "cross" [1, B, 1, T, S]."""
        record: list[Tensor] = []
        with torch.no_grad():
            self._states(source_BS, target_in_BT, record)
        return {"cross": torch.stack(record)}

    def start(self, source_BS: Tensor, width: int) -> RowState:
        """Encode, and begin ``width`` hypotheses a sentence; no gradients."""
        memory_BSD, mask, starts = self._encode(source_BS)
        # The state's own, for it moves sentences about in them; keys may be the memory itself.
        memory = [self.cross.key(memory_BSD).clone(), memory_BSD.contiguous()]
        rows = [part.repeat_interleave(width, dim=0) for start in starts for part in start]
        return RowState(memory, mask, rows, width)

    def step(self, ids_N: Tensor, state: RowState, record: list[Tensor] | None = None) -> Tensor:
        """Final states [N, D], to project, of ``ids_N``, the newest piece of every hypothesis.

        ``state`` takes the position in. Rows are sentences' hypotheses, one sentence after the
        other; no gradients. ``record`` takes the attention, [B, 1, J, S].
        """
        key_BSD, memory_BSD = state.memory
        parts = len(state.rows) // len(self.decoder)
        states_1ND, rows = self._embed("target", ids_N[None]), []
        for index, layer in enumerate(self.decoder):
            start = state.rows[index * parts : (index + 1) * parts]
            states_1ND, end = layer(states_1ND, start)
            rows += end
            if index == 0:
                # The hypotheses of a sentence are as many queries.
                states_BJD = states_1ND.view(key_BSD.size(0), state.width, -1)
                found_BJD = self.cross(states_BJD, key_BSD, memory_BSD, state.memory_mask, record)
                states_1ND = found_BJD.view_as(states_1ND)
        state.rows = rows
        state.length += 1
        return self.decoder_norm(states_1ND[0])  # type: ignore[no-any-return]

    def _states(
        self, source_BS: Tensor, target_in_BT: Tensor, record: list[Tensor] | None = None
    ) -> Tensor:
        memory_BSD, mask, starts = self._encode(source_BS)
        states_TBD = self._embed("target", target_in_BT.t())
        for index, (layer, start) in enumerate(zip(self.decoder, starts, strict=True)):
            states_TBD, _ = layer(states_TBD, start)
            if index == 0:
                states_BTD = states_TBD.transpose(0, 1).contiguous()
                key_BSD = self.cross.key(memory_BSD)
                found_BTD = self.cross(states_BTD, key_BSD, memory_BSD, mask, record)
                states_TBD = found_BTD.transpose(0, 1).contiguous()
        return self.decoder_norm(states_TBD).transpose(0, 1)  # type: ignore[no-any-return]

    def _encode(self, source_BS: Tensor) -> tuple[Tensor, Tensor | None, list[list[Tensor]]]:
        """Memory [B, S, D], its mask, and of each decoder layer what it starts from."""
        keep_BS = source_BS != PAD_ID
        # Asking a GPU whether anything is padded would make the host wait for it.
        padded = source_BS.device.type != "cpu" or not bool(keep_BS.all())
        mask = padding_mask(keep_BS) if padded else None
        num_sentences, length = source_BS.shape
        lengths_B = keep_BS.sum(1).clamp_(min=1)
        reversal = _reversal(lengths_B, length)
        states_SBD = self._embed("source", source_BS.t())
        joined_SBE = states_SBD
        for layer in self.encoder:
            states_SBD, joined_SBE = layer(states_SBD, reversal)
        # Each direction's last: at the last word, and at the first.
        last_B = (lengths_B - 1) * num_sentences + torch.arange(
            num_sentences, device=source_BS.device
        )
        there_BD = _rows(joined_SBE, last_B)[:, : self.config.d_model]
        back_BD = joined_SBE[0, :, self.config.d_model :]
        carried_BX = self.bridge(torch.cat([there_BD, back_BD], dim=-1))
        starts = [self._start(part_BD) for part_BD in carried_BX.chunk(len(self.decoder), dim=-1)]
        memory_BSD = self.encoder_norm(states_SBD).transpose(0, 1).contiguous()
        return memory_BSD, mask, starts

    def _start(self, carried_BD: Tensor) -> list[Tensor]:
        # A layer's part of the bridge is a strided view, which cuDNN refuses as a state.
        carried_BD = carried_BD.contiguous()
        # An LSTM's cells are not bounded; its hidden state is as if all gates were open.
        hidden_BD = carried_BD.tanh()
        return [hidden_BD, carried_BD] if self.config.kind == "lstm" else [hidden_BD]

    def _embed(self, role: str, ids_LB: Tensor) -> Tensor:
        # Small as they are, not scaled as the Transformer's are: the residual sum would be mostly
        # the piece that was read, which the shared matrix turns into a prediction of that piece.
        embedded_LBD = self.matrix(role, ids_LB, "embed")
        return dropout(embedded_LBD, self.config.dropout, training=self.training)


def _linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    linear = nn.Linear(num_inputs, num_outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
