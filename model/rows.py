"""A padded batch's tokens as rows, of which there are only few different numbers.

oneDNN, which multiplies PyTorch's bfloat16 matrices on a CPU, compiles each product for its exact
shape: 1 to 3 ms and 1 MB each, where the product itself takes 0.2 ms. So what treats every token by
itself is given a multiple of 64 rows, the last ones of which are nobody's.

Shapes: B batch, L length, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Of rows; also the loss'.
MULTIPLE = 64


class Rows(NamedTuple):
    """How sequences lie in rows: one after the other, padding and all, and then nobody's."""

    num_sequences: int
    length: int

    @property
    def num_used(self) -> int:
        """Rows that are of a sequence."""
        return self.num_sequences * self.length

    @property
    def num_rows(self) -> int:
        """All rows."""
        return -(-self.num_used // MULTIPLE) * MULTIPLE

    def join(self, states_BLC: Tensor) -> Tensor:
        """[B, L, C] to [R, C], zero where nobody's."""
        free = self.num_rows - self.num_used
        return functional.pad(states_BLC.flatten(0, 1), (0, 0, 0, free))

    def split(self, states_RC: Tensor) -> Tensor:
        """[R, C] to [B, L, C], a view."""
        return states_RC[: self.num_used].view(self.num_sequences, self.length, -1)

    def room(self, sample: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        """Like ``join`` of what is yet to be written: [R, C], and the part to write, [B, L, C]."""
        whole_RC = sample.new_empty((self.num_rows, num_columns))
        whole_RC[self.num_used :].zero_()
        return whole_RC, self.split(whole_RC)


def rows_of(ids_BL: Tensor, dtype: torch.dtype) -> Rows | None:
    """The rows of this batch's tokens; None where nothing is gained by having them."""
    if ids_BL.device.type != "cpu" or dtype != torch.bfloat16 or ids_BL.numel() == 0:
        return None
    return Rows(ids_BL.size(0), ids_BL.size(1))
