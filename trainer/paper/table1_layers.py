"""The layers of the paper's Table 1, of equal width d on both sides, as plain as the paper's.

Each maps a sequence [B, n, d] to a sequence [B, n, d]: no residual connection, no normalisation,
attention with one head. Attention looks to both sides (a neighbourhood is "centered around the
respective output position", as the paper has it); recurrence and convolution go forward.

Shapes: B batch, N positions, D width, C blocks of positions, Q and K positions of a block's queries
and keys.

Source: Vaswani et al. 2017, section 4 and table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention import How, make_score

# What restricted attention and convolution see, where nothing else is said: r and k of the table.
NEIGHBOURHOOD = 33
KERNEL = 3

Compute = Literal["explicit", "fused", "banded", "masked"]
PaperRow = Literal["Self-Attention", "Recurrent", "Convolutional", "Self-Attention (restricted)"]


class SelfAttention(nn.Module):
    """Scaled dot-product self-attention of one head.

    Args:
        projections: make queries, keys and values, and the output, by a matrix each; without, they
            are the input itself, which is what the paper's O(n²·d) counts.
        compute: the formula, PyTorch's fused kernel, or a neighbourhood by blocks or by a mask.
        neighbourhood: r, odd, centred, of the latter two.
    """

    def __init__(self, d: int, compute: Compute, *, projections: bool, neighbourhood: int) -> None:
        super().__init__()
        self.compute = compute
        self.radius = (neighbourhood - 1) // 2
        self.score = make_score("scaled_dot", 1, d)
        self.query_key_value = nn.Linear(d, 3 * d) if projections else None
        self.output = nn.Linear(d, d) if projections else None
        if self.query_key_value is not None:
            for part in self.query_key_value.weight.chunk(3):
                nn.init.xavier_uniform_(part)

    def forward(self, inputs_BND: Tensor) -> Tensor:
        """Attend from every position."""
        query = key = value = inputs_BND
        if self.query_key_value is not None:
            query, key, value = self.query_key_value(inputs_BND).chunk(3, dim=-1)
        result_BND = self._attend(query, key, value)
        return result_BND if self.output is None else self.output(result_BND)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.compute == "banded":
            return banded_attention(query, key, value, radius=self.radius)
        radius = self.radius if self.compute == "masked" else None
        how: How = "fused" if self.compute == "fused" else "reference"
        heads = query[:, None], key[:, None], value[:, None]
        result_B1ND: Tensor = self.score(*heads, radius=radius, how=how)
        return result_B1ND[:, 0]


def _hidden(hide: Tensor) -> Tensor:
    """Additive mask: minus infinity where ``hide`` is true."""
    mask = torch.zeros(hide.shape, dtype=torch.float32, device=hide.device)
    return mask.masked_fill_(hide, -math.inf)


def banded_attention(query: Tensor, key: Tensor, value: Tensor, *, radius: int) -> Tensor:
    """Attention to the ``2 * radius + 1`` positions around each, in O(r n d) time and memory.

    Blocks of ``radius`` queries meet the three blocks of keys around them, and a mask hides the
    corners: 3 / 2 of the scores that are needed are computed, in matrix products that are not tiny.

    Args:
        query, key, value: [B, N, D].
    """
    num_batch, length, width = query.shape
    num_blocks = -(-length // radius)
    filled = num_blocks * radius - length
    query_BCQD = functional.pad(query, (0, 0, 0, filled)).view(num_batch, num_blocks, radius, width)
    windows = []
    for part in (key, value):
        padded = functional.pad(part, (0, 0, radius, radius + filled))
        windows.append(padded.unfold(1, 3 * radius, radius).transpose(2, 3))
    key_BCKD, value_BCKD = windows
    scores_BCQK = query_BCQD @ key_BCKD.transpose(2, 3) * width**-0.5
    scores_BCQK = scores_BCQK + _band(num_blocks, radius, length, query.device)
    result_BCQD = scores_BCQK.softmax(-1) @ value_BCKD
    result_BND: Tensor = result_BCQD.reshape(num_batch, num_blocks * radius, width)
    return result_BND[:, :length]


def _band(num_blocks: int, radius: int, length: int, device: torch.device) -> Tensor:
    """Additive mask [C, Q, K] of a block's keys: too far away, or beyond the sequence's ends.

    A query that is padding keeps the keys that it would see, so that no softmax is over nothing.
    """
    at_Q, at_K = torch.arange(radius, device=device), torch.arange(3 * radius, device=device)
    far_QK = (at_Q[:, None] + radius - at_K[None, :]).abs() > radius
    place_CK = torch.arange(num_blocks, device=device)[:, None] * radius + at_K[None, :] - radius
    place_CQ = torch.arange(num_blocks, device=device)[:, None] * radius + at_Q[None, :]
    outside_CQK = ((place_CK < 0) | (place_CK >= length))[:, None, :]
    outside_CQK = outside_CQK & (place_CQ < length)[:, :, None]
    return _hidden(far_QK[None] | outside_CQK)


class Recurrence(nn.Module):
    """PyTorch's recurrent layers, started from zeros."""

    def __init__(self, cell: Callable[..., nn.RNNBase], d: int) -> None:
        super().__init__()
        self.layer = cell(d, d, batch_first=True)

    def forward(self, inputs_BND: Tensor) -> Tensor:
        """The state after every position."""
        output_BND: Tensor = self.layer(inputs_BND)[0]
        return output_BND


class Convolution(nn.Module):
    """A convolution over a position and the ``kernel - 1`` before it (at steps of ``dilation``).

    It goes forward because a stack of centred ones with dilations 1, k, k², ... does not connect
    all positions: part of the way would lead over places outside the sequence, where there is none.

    ``separable``: one kernel a channel, then a matrix over the channels (Chollet 2016).
    """

    def __init__(self, d: int, kernel: int, *, dilation: int = 1, separable: bool = False) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.layer = nn.Conv1d(d, d, kernel, dilation=dilation, groups=d if separable else 1)
        self.mix = nn.Conv1d(d, d, 1) if separable else None

    def forward(self, inputs_BND: Tensor) -> Tensor:
        """Convolve."""
        inputs_BDN = functional.pad(inputs_BND.transpose(1, 2), (self.before, 0))
        output_BDN: Tensor = self.layer(inputs_BDN)
        if self.mix is not None:
            output_BDN = self.mix(output_BDN)
        return output_BDN.transpose(1, 2)


@dataclass(frozen=True)
class Layer:
    """A row of our table.

    Attributes:
        name: in results and files.
        label: for people.
        paper_row: the row of the paper's table that it belongs to.
        make: the layer, of d, the width of its window (r or k; ignored where there is none), and
            its dilation (ignored but for convolutions).
        window: r or k by default, None where the layer has none.
        operations: reckoned, of n, d and the window; a multiply-add counts as two, and only
            products count.
        formula: the same in words.
        cell: the recurrent layer's cell, None for the others.
        forward: an output sees no later input.
        dilated: a stack of them has dilations 1, k, k², ...
        timed: time and memory are measured, too.
    """

    name: str
    label: str
    paper_row: PaperRow
    make: Callable[[int, int, int], nn.Module]
    operations: Callable[[int, int, int], int]
    formula: str
    window: int | None = None
    cell: type[nn.RNNCellBase] | None = None
    forward: bool = False
    dilated: bool = False
    timed: bool = True


def _attention(compute: Compute, *, projections: bool = False) -> Callable[..., nn.Module]:
    return lambda d, window, dilation: SelfAttention(
        d, compute, projections=projections, neighbourhood=window
    )


def _recurrence(cell: Callable[..., nn.RNNBase]) -> Callable[..., nn.Module]:
    return lambda d, window, dilation: Recurrence(cell, d)


def _banded_operations(n: int, d: int, r: int) -> int:
    radius = (r - 1) // 2
    blocks = -(-n // radius)
    return 12 * blocks * radius * radius * d


LAYERS = {
    layer.name: layer
    for layer in (
        Layer(
            "attention",
            "self-attention",
            "Self-Attention",
            _attention("explicit"),
            lambda n, d, w: 4 * n * n * d,
            "4 n²d",
        ),
        Layer(
            "attention-fused",
            "self-attention, fused kernel",
            "Self-Attention",
            _attention("fused"),
            lambda n, d, w: 4 * n * n * d,
            "4 n²d",
        ),
        Layer(
            "attention-projected",
            "self-attention with projections",
            "Self-Attention",
            _attention("explicit", projections=True),
            lambda n, d, w: 4 * n * n * d + 8 * n * d * d,
            "4 n²d + 8 nd²",
        ),
        Layer(
            "rnn",
            "recurrence (RNN)",
            "Recurrent",
            _recurrence(nn.RNN),
            lambda n, d, w: 4 * n * d * d,
            "4 nd²",
            cell=nn.RNNCell,
            forward=True,
        ),
        Layer(
            "gru",
            "recurrence (GRU)",
            "Recurrent",
            _recurrence(nn.GRU),
            lambda n, d, w: 12 * n * d * d,
            "12 nd²",
            cell=nn.GRUCell,
            forward=True,
            timed=False,  # scales as the RNN does, and takes three times as long to measure
        ),
        Layer(
            "lstm",
            "recurrence (LSTM)",
            "Recurrent",
            _recurrence(nn.LSTM),
            lambda n, d, w: 16 * n * d * d,
            "16 nd²",
            cell=nn.LSTMCell,
            forward=True,
        ),
        Layer(
            "convolution",
            "convolution",
            "Convolutional",
            lambda d, window, dilation: Convolution(d, window),
            lambda n, d, w: 2 * w * n * d * d,
            "2 knd²",
            window=KERNEL,
            forward=True,
        ),
        Layer(
            "convolution-dilated",
            "convolution, dilated",
            "Convolutional",
            lambda d, window, dilation: Convolution(d, window, dilation=dilation),
            lambda n, d, w: 2 * w * n * d * d,
            "2 knd²",
            window=KERNEL,
            forward=True,
            dilated=True,
            timed=False,  # a single one is the one above
        ),
        Layer(
            "convolution-separable",
            "convolution, separable",
            "Convolutional",
            lambda d, window, dilation: Convolution(d, window, separable=True),
            lambda n, d, w: 2 * w * n * d + 2 * n * d * d,
            "2 knd + 2 nd²",
            window=KERNEL,
            forward=True,
        ),
        Layer(
            "attention-banded",
            "restricted self-attention, by blocks",
            "Self-Attention (restricted)",
            _attention("banded"),
            _banded_operations,
            "6 (r−1)nd",
            window=NEIGHBOURHOOD,
        ),
        Layer(
            "attention-masked",
            "restricted self-attention, by a mask",
            "Self-Attention (restricted)",
            _attention("masked"),
            lambda n, d, w: 4 * n * n * d,
            "4 n²d",
            window=NEIGHBOURHOOD,
        ),
    )
}


def make(layer: Layer, d: int, *, window: int | None = None, dilation: int = 1) -> nn.Module:
    """The layer, with another window if one is given."""
    return layer.make(d, window or layer.window or 3, dilation)


def make_stack(layer: Layer, d: int, depth: int, *, window: int | None = None) -> nn.Module:
    """``depth`` layers one after the other; dilated ones with dilations 1, k, k², ..."""
    width = window or layer.window or 3
    dilations = [width**place if layer.dilated else 1 for place in range(depth)]
    return nn.Sequential(*(make(layer, d, window=width, dilation=each) for each in dilations))
