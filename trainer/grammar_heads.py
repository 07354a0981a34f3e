"""Heads that follow the grammar of the generated corpus: from a word to the one it depends on.

What a head is credited with is set beside three heads that know no grammar: one that looks
everywhere alike, the best of those that look a fixed number of pieces away, and the head itself
where it looks at words of the partner's kind that are not the partner.

Shapes: L layers, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_shards.config import EOS_ID
from data_shards.embedded import Sentence, sentences
from data_shards.embedded_relations import Relation, Span, relations
from trainer.attention import SPACE, AttentionMaps, Kind, each_pairs_maps
from trainer.heads import most
from trainer.run import LoadedModel


@dataclass(frozen=True)
class Finding:
    """The head that follows a relation best, and how far it goes beyond chance.

    The head is chosen on sentences of the validation split and measured on those of the test split,
    so that the best of many by luck is not what is told. Weights are shares of a row, 0 to 1, mean
    over the cases.

    Attributes:
        name: such as "verb → its subject".
        kind, layer, head: where; layer and head are counted from 0.
        cases: how many words were measured.
        weight: on the pieces of the partner.
        strongest: share of the rows whose strongest key is a piece of the partner.
        even: the weight that a head would put there that looks everywhere alike.
        offset, at_offset: keys ahead of the query of the best head that always looks so many pieces
            away, and the weight that it would put there; chosen on the measured cases themselves.
        rival: the head's mean weight on a word of the partner's kind that is not the partner, where
            there is one; None without such cases.
        beside_rival: its weight on the partner in those cases.
    """

    name: str
    kind: Kind
    layer: int
    head: int
    cases: int
    weight: float
    strongest: float
    even: float
    offset: int
    at_offset: float
    rival: float | None
    beside_rival: float | None


def has_grammar(loaded: LoadedModel) -> bool:
    """Whether the run's sentences are those whose grammar is known: generated, English first."""
    data = loaded.config.data
    return (data.corpus, data.source, data.target) == ("embedded", "en", "de")


def follow_grammar(loaded: LoadedModel, num_sentences: int) -> list[Finding]:
    """The best head of every relation of which there are cases, in the order of their names.

    Args:
        num_sentences: of each of the two splits.
    """
    chosen, measured = (
        _measure(loaded, list(sentences(split, num_sentences))) for split in ("valid", "test")
    )
    return [
        measured[name].finding(name, *most(chosen[name].mean("weight"))[:2])
        for name in sorted(measured.keys() & chosen.keys())
    ]


@dataclass
class _Measured:
    """Sums over the cases of one relation; tensors are [L, H]."""

    kind: Kind
    cases: int = 0
    rival_cases: int = 0
    even: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    at_offset: Counter[int] = field(default_factory=Counter)

    def add(self, name: str, value_LH: Tensor) -> None:
        self.sums[name] = self.sums[name] + value_LH if name in self.sums else value_LH

    def mean(self, name: str) -> Tensor:
        cases = self.rival_cases if name.endswith("rival") else self.cases
        return self.sums[name] / cases

    def finding(self, name: str, layer: int, head: int) -> Finding:
        offset, at_offset = max(self.at_offset.items(), key=lambda item: (item[1], -abs(item[0])))
        of_rivals = [
            float(self.mean(which)[layer, head]) if self.rival_cases else None
            for which in ("rival", "beside_rival")
        ]
        return Finding(
            name, self.kind, layer, head, self.cases,
            float(self.mean("weight")[layer, head]), float(self.mean("strongest")[layer, head]),
            self.even / self.cases, offset, at_offset / self.cases, *of_rivals,
        )  # fmt: skip


def _measure(loaded: LoadedModel, chosen: Sequence[Sentence]) -> dict[str, _Measured]:
    found: dict[str, _Measured] = {}
    pairs = encoded(loaded, chosen)
    for index, maps in each_pairs_maps(loaded, pairs):
        for relation, rows, columns, rivals in _placed(chosen[index], maps):
            kind = _kind_of(relation)
            if kind in maps.weights:
                entry = found.setdefault(relation.name, _Measured(kind))
                _add(entry, maps.weights[kind], rows, columns, rivals)
    return found


def _add(
    entry: _Measured,
    weights_LHQK: Tensor,
    rows: list[int],
    columns: list[int],
    rivals: list[list[int]],
) -> None:
    of_rows_LHQK = weights_LHQK[:, :, rows]
    weight_LH = of_rows_LHQK[..., columns].sum(-1).mean(-1)
    entry.cases += 1
    entry.add("weight", weight_LH)
    is_partner_K = torch.zeros(weights_LHQK.size(-1))
    is_partner_K[columns] = 1
    entry.add("strongest", is_partner_K[of_rows_LHQK.argmax(-1)].mean(-1))
    for row in rows:
        visible = row + 1 if entry.kind == "decoder" else weights_LHQK.size(-1)
        entry.even += len(columns) / visible / len(rows)
        for column in columns:
            entry.at_offset[column - row] += 1 / len(rows)  # type: ignore[assignment]
    if rivals:
        entry.rival_cases += 1
        entry.add("beside_rival", weight_LH)
        on_rivals = [of_rows_LHQK[..., rival].sum(-1).mean(-1) for rival in rivals]
        entry.add("rival", torch.stack(on_rivals).mean(0))


def _kind_of(relation: Relation) -> Kind:
    if relation.word.side == "source":
        return "encoder"
    return "decoder" if relation.partner.side == "target" else "cross"


def _placed(
    one: Sentence, maps: AttentionMaps
) -> Iterator[tuple[Relation, list[int], list[int], list[list[int]]]]:
    """Each relation with the rows of its word, the columns of its partner and of its rivals."""
    for relation in relations(one):
        rows = places(maps.source if relation.word.side == "source" else maps.outputs,
                      relation.word)  # fmt: skip
        columns, *rivals = (_columns(maps, span) for span in (relation.partner, *relation.rivals))
        if rows and columns:
            yield relation, rows, columns, [rival for rival in rivals if rival]


def _columns(maps: AttentionMaps, span: Span) -> list[int]:
    # What the decoder has read begins with the begin sign, which no place of the text touches.
    return places(maps.source if span.side == "source" else maps.inputs, span)


def places(pieces: Sequence[str], span: Span) -> list[int]:
    """The pieces, of a text's with its signs, that hold characters of a span of the text."""
    found = []
    end = -1  # the first piece begins with a space that the text does not have
    for number, piece in enumerate(pieces):
        if piece.startswith("<") and piece.endswith(">"):
            continue
        start, end = end, end + len(piece)
        if max(start + piece.startswith(SPACE), span.start) < min(end, span.end):
            found.append(number)
    return found


def encoded(loaded: LoadedModel, chosen: Sequence[Sentence]) -> list[tuple[list[int], list[int]]]:
    """Source ids with EOS last and target ids of sentences."""
    source = loaded.vocabulary.encode([one.english for one in chosen])
    target = loaded.vocabulary.encode([one.german for one in chosen])
    return [([*ids, EOS_ID], other) for ids, other in zip(source, target, strict=True)]
