"""What a decoder remembers from step to step.

Shapes: Y layers, B sentences, N hypotheses (the same number a sentence, one sentence after the
other), H heads, S source length, T target length, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Positions by which the cache grows.
_GROWTH = 16


class DecoderState:
    """Keys and values of the source, made once, and those of the target so far.

    Attributes:
        memory: keys and values of the source, [Y, 2, B, H, S, K].
        mask: additive mask of its padding, [B, 1, 1, S], or None.
        cache: keys and values of the target, [N, Y, 2, H, T, K]; T has room beyond ``length``.
        length: positions decoded.
    """

    def __init__(self, memory: Tensor, mask: Tensor | None, num_hypotheses: int) -> None:
        self.memory = memory
        self.mask = mask
        num_layers, pair, num_sentences, num_heads, _, width = memory.shape
        rows = num_sentences * num_hypotheses
        self.cache = memory.new_empty((rows, num_layers, pair, num_heads, 0, width))
        self._spare = self.cache
        self.length = 0

    def reserve(self) -> None:
        """Make room for one more position."""
        if self.length == self.cache.size(4):
            shape = list(self.cache.shape)
            shape[4] = _GROWTH
            self.cache = torch.cat([self.cache, self.cache.new_empty(shape)], dim=4)
            self._spare = torch.empty_like(self.cache)

    def select(self, rows_N: Tensor, sentences_B: Tensor | None) -> None:
        """Keep (or repeat, or reorder) hypotheses, never more than before, and sentences if given.

        The rows are copied to and fro between two buffers: a fresh one each step would be paged in
        anew, which takes longer than the copy.
        """
        selected = self._spare[: rows_N.numel()]
        torch.index_select(self.cache, 0, rows_N, out=selected)
        self.cache, self._spare = selected, self.cache
        if sentences_B is not None:
            self.memory = self.memory.index_select(2, sentences_B)
            if self.mask is not None:
                self.mask = self.mask.index_select(0, sentences_B)
