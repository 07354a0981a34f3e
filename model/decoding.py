"""What a decoder remembers from step to step.

Shapes: B sentences, J hypotheses of each, N = B * J, H heads, S source length, K width of a head, C
places of a sentence's cache, L those in use: J for each position so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Positions by which the caches grow.
_GROWTH = 16


class DecoderState(Protocol):
    """What a search asks of the memory of any kind of model."""

    def reorder(self, parents_BJ: Tensor) -> None:
        """Let hypothesis j of every sentence go on from the past of its ``parents_BJ[:, j]``."""

    def keep(self, vacant: Tensor, movers: Tensor, num_left: int) -> None:
        """Let sentences leave: ``movers`` take the places ``vacant``, the first ``num_left`` stay.

        Moving few instead of copying all is what lets sentences leave at every step.
        """


class RowState:
    """Memory of a fixed size for every hypothesis, and what each sentence's source left.

    Attributes:
        memory: of each sentence, [B, ...] each; the state's own, which it changes in place.
        memory_mask: additive mask of the source's padding, [B, 1, 1, S], or None.
        rows: of each hypothesis, [N, ...] each; a model's ``step`` replaces them by new tensors.
        width: hypotheses a sentence, J.
        length: positions decoded.
    """

    def __init__(
        self,
        memory: list[Tensor],
        memory_mask: Tensor | None,
        rows: list[Tensor],
        width: int,
    ) -> None:
        self.memory, self.memory_mask = memory, memory_mask
        self.rows = rows
        self.width = width
        self.length = 0

    def reorder(self, parents_BJ: Tensor) -> None:
        """See ``DecoderState``."""
        if self.width > 1:
            first_B1 = torch.arange(parents_BJ.size(0), device=parents_BJ.device)[:, None]
            index_N = (first_B1 * self.width + parents_BJ).flatten()
            self.rows = [row.index_select(0, index_N) for row in self.rows]

    def keep(self, vacant: Tensor, movers: Tensor, num_left: int) -> None:
        """See ``DecoderState``."""
        self.memory = [_moved(part, vacant, movers, num_left) for part in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = _moved(self.memory_mask, vacant, movers, num_left)
        self.rows = [
            _moved(
                row.view(len(row) // self.width, self.width, *row.shape[1:]),
                vacant,
                movers,
                num_left,
            ).flatten(0, 1)
            for row in self.rows
        ]


@dataclass(frozen=True)
class Places:
    """Of a cache, at one step.

    Attributes:
        new: the J places that the new position takes.
        seen: those that are seen from it, its own included, L of them.
        mask: additive, [B, 1, J, L]: which of them are a hypothesis' own past; None for all.
    """

    new: slice
    seen: slice
    mask: Tensor | None


class AttentionState:
    """Keys and values of the source, made once, and those of the target so far.

    The target's are never reordered when a beam is: every hypothesis of a sentence sees all places
    of that sentence's cache through a mask that is open at its own past and at nothing else. The
    past that hypotheses share is so kept and read only once.

    Attributes:
        memory: of each layer, keys and values of the source, [B, H, S, K] each.
        memory_mask: additive mask of its padding, [B, 1, 1, S], or None.
        caches: of each layer, keys and values of the target, [B, H, C, K] each.
        width: hypotheses a sentence, J.
        radius: how many positions back are seen; None for all.
        length: positions decoded.
    """

    def __init__(
        self,
        memory: list[tuple[Tensor, Tensor]],
        memory_mask: Tensor | None,
        width: int,
        radius: int | None = None,
    ) -> None:
        self.memory = memory
        self.width, self.radius = width, radius
        self.length = 0
        sample = memory[0][0]
        self.memory_mask = None if memory_mask is None else memory_mask.to(sample.dtype)
        # Values may be of another width than keys.
        self.caches = [(keys[:, :, :0], values[:, :, :0]) for keys, values in memory]
        # What each hypothesis may see of the places in use, [B, 1, J, L]: 0 or minus infinity.
        self._visible = sample.new_empty((sample.size(0), 1, width, 0))
        self._own = sample.new_full((width, width), -math.inf).fill_diagonal_(0)

    def advance(self) -> Places:
        """Make room for one more position."""
        first, end = self.length * self.width, (self.length + 1) * self.width
        if end > self.caches[0][0].size(2):
            self.caches = [(self._grown(keys), self._grown(values)) for keys, values in self.caches]
        # A position's places lie side by side, so a neighbourhood is a slice.
        far = 0 if self.radius is None else max(0, self.length - self.radius) * self.width
        self.length += 1
        if self.width == 1:
            return Places(slice(first, end), slice(far, end), None)
        own = self._own.expand(self._visible.size(0), 1, -1, -1)
        self._visible = torch.cat([self._visible, own], dim=3)
        return Places(slice(first, end), slice(far, end), self._visible[..., far:])

    def _grown(self, cache: Tensor) -> Tensor:
        shape = list(cache.shape)
        shape[2] += _GROWTH * self.width
        grown = cache.new_empty(shape)
        grown[:, :, : cache.size(2)] = cache
        return grown

    def reorder(self, parents_BJ: Tensor) -> None:
        """See ``DecoderState``."""
        if self.width > 1:
            index = parents_BJ[:, None, :, None].expand(-1, -1, -1, self._visible.size(3))
            self._visible = self._visible.gather(2, index)

    def keep(self, vacant: Tensor, movers: Tensor, num_left: int) -> None:
        """See ``DecoderState``."""

        def kept(tensor: Tensor) -> Tensor:
            return _moved(tensor, vacant, movers, num_left)

        self.memory = [(kept(keys), kept(values)) for keys, values in self.memory]
        self.caches = [(kept(keys), kept(values)) for keys, values in self.caches]
        self._visible = kept(self._visible)
        if self.memory_mask is not None:
            self.memory_mask = kept(self.memory_mask)


def _moved(tensor: Tensor, vacant: Tensor, movers: Tensor, num_left: int) -> Tensor:
    if movers.numel():
        tensor.index_copy_(0, vacant, tensor.index_select(0, movers))
    return tensor[:num_left]
