"""The encoder-decoder Transformer.

Shapes: B batch, S source length, T target length, D d_model, V vocabulary, N targets, H heads.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.attention import padding_mask
from model.config import ModelConfig
from model.decoding import AttentionState
from model.encoder_decoder import EncoderDecoder
from model.layers import DecoderLayer, EncoderLayer, Positions
from model.loss import PAD_ID
from model.packed import Packing, call_layer, packed_states
from model.rows import Rows, rows_of


class Transformer(EncoderDecoder):
    """Encoder and decoder of self-attention and feed-forward layers.

    Attributes:
        call_layer: how a layer is called over packed sequences; may be a compiled version.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.call_layer: Callable[..., Tensor] = call_layer
        self.source_positions = Positions(config)
        self.target_positions = Positions(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        # Pre-norm layers leave their sum unnormalised; post-norm ones do not.
        is_pre = config.norm == "pre"
        self.encoder_norm = nn.LayerNorm(config.d_model) if is_pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if is_pre else nn.Identity()

    def states(self, source_BS: Tensor, target_in_BT: Tensor) -> Tensor:
        """Final decoder states [B, T, D]."""
        dtype = next(self.parameters()).dtype
        rows = rows_of(target_in_BT, dtype), rows_of(source_BS, dtype)
        memory, mask = self._encode(source_BS, rows=rows[1])
        states = self._decode(target_in_BT, memory, mask, rows=rows)
        return states if rows[0] is None else rows[0].split(states)

    def packed_states(self, source_M: Tensor, target_in_N: Tensor, packing: Packing) -> Tensor:
        """See ``EncoderDecoder``."""
        return packed_states(self, source_M, target_in_N, packing)

    def encode(self, source_BS: Tensor) -> Tensor:
        """The encoder's final states [B, S, D]."""
        return self._encode(source_BS)[0]

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

    def start(self, source_BS: Tensor, width: int) -> AttentionState:
        """Encode, and open the caches for ``width`` hypotheses a sentence; no gradients."""
        memory_BSD, mask = self._encode(source_BS)
        memory = [_decoder_layer(layer).cross.memory_heads(memory_BSD) for layer in self.decoder]
        return AttentionState(memory, mask, width, self.config.local_radius)

    def step(
        self, ids_N: Tensor, state: AttentionState, record: list[Tensor] | None = None
    ) -> Tensor:
        """Final states [N, D], to project, of ``ids_N``, the newest piece of every hypothesis.

        ``state`` takes the position in. Rows are sentences' hypotheses, one sentence after the
        other; no gradients. ``record`` takes the last layer's cross-attention, [B, H, J, S].
        """
        embedded_N1D = self.matrix("target", ids_N[:, None], "embed")
        states_ND = self.target_positions(embedded_N1D, state.length)[:, 0]
        places = state.advance()
        last = len(self.decoder) - 1
        for index, layer in enumerate(self.decoder):
            states_ND = _decoder_layer(layer).step(
                states_ND,
                state.caches[index],
                places,
                state.memory[index],
                state.memory_mask,
                record if index == last else None,
            )
        return self.decoder_norm(states_ND)  # type: ignore[no-any-return]

    def _encode(
        self, source_BS: Tensor, record: list[Tensor] | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        keep_BS = source_BS != PAD_ID
        # Asking a GPU whether anything is padded would make the host wait for it.
        padded = source_BS.device.type != "cpu" or not bool(keep_BS.all())
        mask = padding_mask(keep_BS) if padded else None
        states_BSD = self.source_positions(self.matrix("source", source_BS, "embed"))
        if rows is not None:
            states_BSD = rows.join(states_BSD)
        for layer in self.encoder:
            states_BSD = layer(states_BSD, mask, record, rows)
        return self.encoder_norm(states_BSD), mask

    def _decode(
        self,
        target_in_BT: Tensor,
        memory_BSD: Tensor,
        memory_mask: Tensor | None,
        record: list[Tensor] | None = None,
        cross_record: list[Tensor] | None = None,
        rows: tuple[Rows | None, Rows | None] = (None, None),
    ) -> Tensor:
        # Targets are padded on the right, so the causal mask alone hides padding from the rest.
        states_BTD = self.target_positions(self.matrix("target", target_in_BT, "embed"))
        if rows[0] is not None:
            states_BTD = rows[0].join(states_BTD)
        for layer in self.decoder:
            states_BTD = layer(states_BTD, memory_BSD, memory_mask, record, cross_record, *rows)
        return self.decoder_norm(states_BTD)  # type: ignore[no-any-return]


def _decoder_layer(layer: nn.Module) -> DecoderLayer:
    assert isinstance(layer, DecoderLayer)
    return layer
