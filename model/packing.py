"""From padded batches to sequences laid end to end, on the host.

All of a batch is one buffer of int64, so that it is one copy to a device; ``Layout`` says what lies
where.

Shapes: B pairs, S source length, T target length, N target and M source tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.loss import PAD_ID
from model.packed import Packing, Side

# Sizes between two powers of two: so finely numbers of tokens are rounded up, to at least so many.
_SIZES, _LEAST = 16, 64


@dataclass(frozen=True, slots=True)
class Layout:
    """What a packed buffer holds: of each part its length, in the order in which they lie.

    Attributes:
        source_tokens, target_tokens: with those that fill a row up.
        num_sequences: with those that the fillers are dealt to, and empty ones.
        longest_source, longest_target: bounds on a sequence's length.
        lanes: of each batch its source and target tokens.
    """

    source_tokens: int
    target_tokens: int
    num_sequences: int
    longest_source: int
    longest_target: int
    lanes: tuple[tuple[int, int], ...]


class Packed(NamedTuple):
    """A batch of packed sequences: what ``EncoderDecoder.forward`` takes."""

    source_M: Tensor  # noqa: N815 - shape suffix
    target_in_N: Tensor  # noqa: N815
    target_out_N: Tensor  # noqa: N815
    packing: Packing


def bucket(size: int) -> int:
    """The next of few sizes: at most a sixteenth more, and no fewer than 64.

    A compiled step or a CUDA graph is of one shape; with sixteen sizes between two powers of two a
    run meets a handful. (The fillers cost as much as real tokens do: 3 % on average.)
    """
    if size <= _LEAST:
        return _LEAST
    step = max(_LEAST // _SIZES, (1 << (size - 1).bit_length()) // 2 // _SIZES)
    return -(-size // step) * step


def pack(
    batches: Sequence[tuple[Tensor, Tensor, Tensor]], *, bucketed: bool
) -> tuple[Tensor, Layout]:
    """Lay the sequences of padded batches end to end.

    Args:
        batches: ``(source_BS, target_in_BT, target_out_BT)`` each, int64 on a CPU, padded on the
            right.
        bucketed: round the numbers of tokens and sequences up to few different ones. The fillers
            are sequences of their own, of PAD_ID, which no loss counts.
    """
    sources, targets_in, targets_out = zip(*batches, strict=True)
    source = [batch[batch != PAD_ID] for batch in sources]
    # (A decoder's input is as long as its output; BOS and EOS are no padding.)
    target_out = [batch[batch != PAD_ID] for batch in targets_out]
    target_in = [batch[batch != PAD_ID] for batch in targets_in]
    lengths = [
        torch.cat([(batch != PAD_ID).sum(1) for batch in side]) for side in (sources, targets_out)
    ]
    longest = [max(1, int(side.max())) for side in lengths]
    totals = [int(side.sum()) for side in lengths]
    if bucketed:
        sizes = [bucket(total) for total in totals]
        fillers = max(
            -(-(size - total) // most)
            for size, total, most in zip(sizes, totals, longest, strict=True)
        )
        num_sequences = bucket(lengths[0].numel() + fillers)
    else:
        sizes, num_sequences = totals, lengths[0].numel()
    parts: list[Tensor] = []
    starts: list[Tensor] = []
    for side, ids in enumerate(([source], [target_in, target_out])):
        ends = torch.zeros(num_sequences + 1, dtype=torch.int64)
        num_real = lengths[side].numel()
        torch.cumsum(lengths[side], 0, out=ends[1 : num_real + 1])
        # As many sequences of fillers as it takes, the last a shorter one, and then empty ones.
        rest = torch.arange(1, num_sequences - num_real + 1) * longest[side]
        ends[num_real + 1 :] = (totals[side] + rest).clamp(max=sizes[side])
        positions = torch.arange(sizes[side]) - ends[:-1].repeat_interleave(ends.diff())
        filler = torch.full((sizes[side] - totals[side],), PAD_ID)
        parts += [torch.cat([*tokens, filler]) for tokens in ids]
        parts.append(positions)
        starts.append(ends)
    lanes = tuple(
        (one.numel(), other.numel()) for one, other in zip(source, target_out, strict=True)
    )
    layout = Layout(sizes[0], sizes[1], num_sequences, longest[0], longest[1], lanes)
    return torch.cat(parts + starts), layout


def unpack(buffer: Tensor, layout: Layout) -> Packed:
    """What ``pack`` has laid down, of a copy of its buffer on any device."""
    m, n, b = layout.source_tokens, layout.target_tokens, layout.num_sequences + 1
    source, source_at, target_in, target_out, target_at, source_starts, target_starts = torch.split(
        buffer, [m, m, n, n, n, b, b]
    )
    return Packed(
        source,
        target_in,
        target_out,
        Packing(
            Side(source_at, source_starts.int(), layout.longest_source),
            Side(target_at, target_starts.int(), layout.longest_target),
        ),
    )
