"""The parameters of Table 3's rows, reckoned and counted, and which vocabularies give the paper's.

The paper says that its vocabulary has about 37,000 pieces, and prints whole millions. A row's
number of parameters is linear in the vocabulary, so each printed number allows a range of
vocabularies, and it can be asked which one vocabulary all rows allow: under this architecture, and
under the ones that leave out biases or norms or tie fewer matrices.

Source: Vaswani et al. 2017 (arXiv 1706.03762), sections 3.4, 5.1 and Table 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig
from model.size import num_parameters
from trainer.paper.table3 import BASE, ROWS, Row

PAPER_VOCABULARY = 37_000
# In the middle of what all rows but "big" allow: see ``common``.
FITTING_VOCABULARY = 41_000
BIG = "big"

_MILLION = 1_000_000


def listed() -> list[Row]:
    """The rows that the paper prints a number of parameters for."""
    return [row for row in ROWS.values() if row.parameters is not None]


def reckoned(row: Row, vocabulary: int) -> int:
    """Parameters of the row in full size, by formula."""
    return num_parameters(row.model(), vocabulary)


def counted(row: Row, vocabulary: int) -> int:
    """Parameters of the row's model in full size, which is built without memory for them."""
    import torch

    from model.build import build

    with torch.device("meta"):
        model = build(row.model(), vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())


def millions(parameters: int) -> int:
    """As the paper prints them: whole millions, halves up."""
    return (parameters + _MILLION // 2) // _MILLION


@dataclass(frozen=True)
class Architecture:
    """What the paper leaves open about its parameters.

    Attributes:
        biases: of every linear map, of the feed-forward layers only, or of none.
        norms: whether layer norms have a gain and a bias.
        matrices: of the size of the vocabulary: 1 shared, 2 (the softmax' own), or 3.
    """

    biases: Literal["all", "feed-forward", "none"] = "all"
    norms: bool = True
    matrices: Literal[1, 2, 3] = 1

    def parameters(self, model: ModelConfig, vocabulary: int) -> int:
        """Of a Transformer with the norm after each sub-layer and sinusoidal positions."""
        d, h = model.d_model, model.num_heads
        keys, values = h * model.key_width, h * model.value_width
        attention = 2 * d * keys + 2 * d * values
        if self.biases == "all":
            attention += 2 * keys + values + d
        feed_forward = 2 * d * model.d_ff
        if self.biases != "none":
            feed_forward += model.d_ff + d
        norm = 2 * d if self.norms else 0
        encoder = attention + feed_forward + 2 * norm
        decoder = 2 * attention + feed_forward + 3 * norm
        layers = model.encoder_layers * encoder + model.decoder_layers * decoder
        return self.matrices * vocabulary * d + layers

    def allows(self, row: Row) -> range:
        """The vocabularies with which the row has the paper's number of millions."""
        assert row.parameters is not None, row.name
        without = self.parameters(row.model(), 0)
        a_piece = self.parameters(row.model(), 1) - without
        least = row.parameters * _MILLION - _MILLION // 2 - without
        return range(-(-least // a_piece), -(-(least + _MILLION) // a_piece))


OURS = Architecture()
ARCHITECTURES = tuple(
    Architecture(biases, norms, matrices)
    for matrices in (1, 2, 3)
    for biases in ("all", "feed-forward", "none")
    for norms in (True, False)
)


def common(ranges: Iterable[range]) -> range:
    """What lies in all of them; empty if there is nothing."""
    found = list(ranges)
    return range(max(each.start for each in found), min(each.stop for each in found))


def allowed_by_all(architecture: Architecture, rows: Sequence[Row] | None = None) -> range:
    """The vocabularies that give the paper's number for all ``rows``; by default all but big."""
    rows = [row for row in listed() if row.name != BIG] if rows is None else rows
    return common(architecture.allows(row) for row in rows)


def learned_positions_within(vocabulary: int) -> int:
    """The most positions of either side's table with which "E-learned" rounds to base's number."""
    base, row = ROWS[BASE], ROWS["E-learned"]
    assert base.parameters is not None
    room = base.parameters * _MILLION + _MILLION // 2 - 1 - reckoned(base, vocabulary)
    return room // (2 * row.model().d_model)
