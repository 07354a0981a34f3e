"""The encoder-decoder Transformer.

Shapes: B batch, S source length, T target length, D d_model, V vocabulary, N targets, H heads.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.attention import padding_mask
from model.config import ModelConfig
from model.decoding import DecoderState
from model.layers import DecoderLayer, EncoderLayer, Positions, VocabularyMatrix
from model.loss import PAD_ID


class Transformer(nn.Module):
    """Encoder and decoder with, unless untied, one matrix for both embeddings and the softmax."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        roles = ("shared",) if config.tie_embeddings else ("source", "target", "softmax")
        self.matrices = nn.ModuleDict(
            {role: VocabularyMatrix(vocab_size, config.d_model) for role in roles}
        )
        self.source_positions = Positions(config)
        self.target_positions = Positions(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        # Pre-norm layers leave their sum unnormalised; post-norm ones do not.
        is_pre = config.norm == "pre"
        self.encoder_norm = nn.LayerNorm(config.d_model) if is_pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if is_pre else nn.Identity()

    def _matrix(self, role: str, *arguments: Any) -> Any:
        return self.matrices[role if role in self.matrices else "shared"](*arguments)

    def forward(
        self,
        source_BS: Tensor,
        target_in_BT: Tensor,
        target_out_BT: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Final decoder states [B, T, D]; or, given the references, the loss.

        The loss is reached through ``forward`` so that what wraps the module (DeepSpeed's engine)
        can call it.

        Args:
            source_BS: source ids, padded on the right with PAD_ID.
            target_in_BT: decoder input: BOS and the target, padded on the right.
            target_out_BT: the references: the target and EOS, padded on the right.
            smoothing: label smoothing of the loss.

        Returns:
            ``hidden_BTD``, or ``(loss_sum, nll_sum)``: nats summed over the targets that are not
            padding, float32 scalars; only ``loss_sum`` has gradients.
        """
        memory_BSD, mask = self._encode(source_BS)
        hidden_BTD = self._decode(target_in_BT, memory_BSD, mask)
        if target_out_BT is None:
            return hidden_BTD
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), target_out_BT.flatten()
        if hidden_ND.device.type == "cpu":
            # On other devices counting the rows would make the host wait; the loss skips them.
            rows_N = targets_N.nonzero()[:, 0]
            if rows_N.numel() < targets_N.numel():
                hidden_ND, targets_N = hidden_ND.index_select(0, rows_N), targets_N[rows_N]
        return self._matrix("softmax", hidden_ND, "loss", targets_N, smoothing)  # type: ignore[no-any-return]

    def training_loss(
        self, source_BS: Tensor, target_in_BT: Tensor, target_out_BT: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)``; see ``forward``."""
        return self(source_BS, target_in_BT, target_out_BT, smoothing)  # type: ignore[no-any-return]

    def encode(self, source_BS: Tensor) -> Tensor:
        """The encoder's final states [B, S, D]."""
        return self._encode(source_BS)[0]

    def project(self, hidden: Tensor) -> Tensor:
        """States [..., D] to logits [..., V]."""
        return self._matrix("softmax", hidden, "project")  # type: ignore[no-any-return]

    def attention_maps(self, source_BS: Tensor, target_in_BT: Tensor) -> dict[str, Tensor]:
        """Every attention weight of one pass, float32.

        Returns:
            "encoder" [layers, B, H, S, S], "decoder" [layers, B, H, T, T], "cross"
            [layers, B, H, T, S].
        """
        maps: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}
        with torch.no_grad():
            memory_BSD, mask = self._encode(source_BS, maps["encoder"])
            self._decode(target_in_BT, memory_BSD, mask, maps["decoder"], maps["cross"])
        return {name: torch.stack(layers) for name, layers in maps.items()}

    def start(self, source_BS: Tensor, width: int) -> DecoderState:
        """Encode, and open the caches for ``width`` hypotheses a sentence; no gradients."""
        memory_BSD, mask = self._encode(source_BS)
        memory = [_decoder_layer(layer).cross.memory_heads(memory_BSD) for layer in self.decoder]
        return DecoderState(memory, mask, width)

    def step(
        self, ids_N: Tensor, state: DecoderState, record: list[Tensor] | None = None
    ) -> Tensor:
        """Final states [N, D], to project, of ``ids_N``, the newest piece of every hypothesis.

        ``state`` takes the position in. Rows are sentences' hypotheses, one sentence after the
        other; no gradients. ``record`` takes the last layer's cross-attention, [B, H, J, S].
        """
        embedded_N1D = self._matrix("target", ids_N[:, None], "embed")
        states_ND = self.target_positions(embedded_N1D, state.length)[:, 0]
        first = state.length * state.width
        mask = state.advance()
        last = len(self.decoder) - 1
        for index, layer in enumerate(self.decoder):
            states_ND = _decoder_layer(layer).step(
                states_ND,
                state.caches[index],
                first,
                mask,
                state.memory[index],
                state.memory_mask,
                record if index == last else None,
            )
        return self.decoder_norm(states_ND)  # type: ignore[no-any-return]

    def _encode(
        self, source_BS: Tensor, record: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        keep_BS = source_BS != PAD_ID
        # Asking a GPU whether anything is padded would make the host wait for it.
        padded = source_BS.device.type != "cpu" or not bool(keep_BS.all())
        mask = padding_mask(keep_BS) if padded else None
        states_BSD = self.source_positions(self._matrix("source", source_BS, "embed"))
        for layer in self.encoder:
            states_BSD = layer(states_BSD, mask, record)
        return self.encoder_norm(states_BSD), mask

    def _decode(
        self,
        target_in_BT: Tensor,
        memory_BSD: Tensor,
        memory_mask: Tensor | None,
        record: list[Tensor] | None = None,
        cross_record: list[Tensor] | None = None,
    ) -> Tensor:
        # Targets are padded on the right, so the causal mask alone hides padding from the rest.
        states_BTD = self.target_positions(self._matrix("target", target_in_BT, "embed"))
        for layer in self.decoder:
            states_BTD = layer(states_BTD, memory_BSD, memory_mask, record, cross_record)
        return self.decoder_norm(states_BTD)  # type: ignore[no-any-return]


def _decoder_layer(layer: nn.Module) -> DecoderLayer:
    assert isinstance(layer, DecoderLayer)
    return layer


def build(config: ModelConfig, vocab_size: int) -> Transformer:
    """A freshly initialised model; draws from PyTorch's generator."""
    return Transformer(config, vocab_size)
