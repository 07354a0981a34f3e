"""What a model's attention looked at while it read a sentence and wrote its translation.

Shapes: B batch, H heads, S source pieces with "</s>", T target pieces with "<s>" or "</s>".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from data_shards.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from trainer.run import LoadedModel

Kind = Literal["cross", "encoder", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# SentencePiece's mark of a space, which begins a word.
SPACE = "\u2581"
# Attention weights recorded in one pass, and pieces of one side with their padding, so that memory
# stays small whatever is aligned.
_WEIGHTS_AT_ONCE = 2**24
_PIECES_AT_ONCE = 2**13


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of every layer and head, float32 on the CPU; each row sums to 1.

    A row is a query, a column a key. Row t of "decoder" and "cross" is of the state that reads
    ``inputs[t]`` and predicts ``outputs[t]``.

    Attributes:
        weights: by kind, of those that the model has: "cross" [layers, H, T, S]; where there is
            self-attention "encoder" [layers, H, S, S] and "decoder" [layers, H, T, T], 0 right of
            the diagonal.
    """

    source: list[str]
    inputs: list[str]
    outputs: list[str]
    weights: dict[Kind, Tensor]

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of attention that the model has, "cross" first."""
        return [kind for kind in KINDS if kind in self.weights]

    def labelled(self, kind: Kind) -> tuple[Tensor, list[str], list[str]]:
        """The weights [layers, H, queries, keys] of a kind, its rows' and its columns' pieces.

        The decoder's rows are labelled with the piece that they predict.
        """
        rows = self.source if kind == "encoder" else self.outputs
        return self.weights[kind], rows, self.inputs if kind == "decoder" else self.source


def attention_maps(
    loaded: LoadedModel, source_ids: list[int], target_ids: list[int]
) -> AttentionMaps:
    """The weights as the model reads ``source_ids`` and is made to write ``target_ids``.

    Args:
        source_ids: piece ids with EOS last.
        target_ids: piece ids without BOS and EOS; may be empty.
    """
    [(_, maps)] = each_pairs_maps(loaded, [(source_ids, target_ids)])
    return maps


def each_pairs_maps(
    loaded: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> Iterator[tuple[int, AttentionMaps]]:
    """``attention_maps`` of every pair with its number, in batches, the longest pairs first."""
    pieces = loaded.vocabulary.pieces
    for batch in _batches(loaded, pairs):
        sources = [pairs[index][0] for index in batch]
        targets = [pairs[index][1] for index in batch]
        maps = _maps(loaded, sources, [[BOS_ID, *target] for target in targets])
        on_cpu = {kind: maps[kind].cpu() for kind in KINDS if kind in maps}
        for row, index in enumerate(batch):
            num_source, num_target = len(sources[row]), len(targets[row]) + 1
            sides: dict[Kind, tuple[int, int]] = {
                "cross": (num_target, num_source),
                "encoder": (num_source, num_source),
                "decoder": (num_target, num_target),
            }
            yield (
                index,
                AttentionMaps(
                    source=pieces(sources[row]),
                    inputs=pieces([BOS_ID, *targets[row]]),
                    outputs=pieces([*targets[row], EOS_ID]),
                    weights={
                        kind: weights[:, row, :, : sides[kind][0], : sides[kind][1]]
                        for kind, weights in on_cpu.items()
                    },
                ),
            )


def word_alignment(
    loaded: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[list[tuple[int, int]]]:
    """For each word of the translation the word of the source that was attended to most.

    The weights are those of the last but one decoder layer, averaged over its heads and summed over
    the pieces of each word. The end of the sentence is no word: no link goes there.

    Args:
        pairs: source ids with EOS last, target ids without BOS and EOS; either may have no word.

    Returns:
        For each pair, links (source word, target word), counted from 0 and sorted. Words are those
        of the text split at spaces; an unknown piece is a part of its word in the source, and in
        the translation a word of its own, as its text has it.

    Source: Garg et al. 2019 (arXiv 1909.02074), section 4.1.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in pairs]
    with_words = [index for index, (source, target) in enumerate(pairs) if source and target]
    for place, maps in each_pairs_maps(loaded, [pairs[index] for index in with_words]):
        index = with_words[place]
        cross_LHTS = maps.weights["cross"]
        weights_TS = cross_LHTS[max(0, len(cross_LHTS) - 2)].mean(0)[:-1]
        source = _words(loaded, pairs[index][0], unknown_apart=False)
        target = _words(loaded, pairs[index][1], unknown_apart=True)
        found[index] = _links(weights_TS, source, target)
    return found


def _maps(
    loaded: LoadedModel, sources: Sequence[list[int]], inputs: Sequence[list[int]]
) -> dict[str, Tensor]:
    device = next(loaded.model.parameters()).device
    return loaded.model.attention_maps(_padded(sources).to(device), _padded(inputs).to(device))


def _padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])


def _batches(
    loaded: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> Iterator[list[int]]:
    """Indices of the pairs, those of like length together, the longest first."""
    if len(pairs) < 2:
        yield from ([index] for index in range(len(pairs)))
        return
    lengths = [max(len(source), len(target) + 1) for source, target in pairs]
    order = sorted(range(len(pairs)), key=lambda index: (-lengths[index], index))
    maps = _num_maps(loaded, *pairs[order[-1]])
    start = 0
    while start < len(order):
        length = lengths[order[start]]
        rows = min(_WEIGHTS_AT_ONCE // (maps * length**2), _PIECES_AT_ONCE // length)
        yield order[start : start + max(1, rows)]
        start += max(1, rows)


def _num_maps(loaded: LoadedModel, source: list[int], target: list[int]) -> int:
    """How many maps this model makes of a pair: it is asked for those of a short one."""
    maps = _maps(loaded, [source], [[BOS_ID, *target]])
    return sum(weights.size(0) * weights.size(2) for weights in maps.values())


def _words(loaded: LoadedModel, ids: list[int], *, unknown_apart: bool) -> list[int]:
    """The number of the word that each piece belongs to, -1 for none.

    A lone space belongs to the word behind it.
    """
    numbers: list[int] = []
    number, begins = -1, True
    for piece_id, piece in zip(ids, loaded.vocabulary.pieces(ids), strict=True):
        is_apart = unknown_apart and piece_id == UNK_ID
        begins = begins or is_apart or piece.startswith(SPACE)
        if piece_id in (PAD_ID, BOS_ID, EOS_ID):
            numbers.append(-1)
        elif piece == SPACE:
            numbers.append(number + 1)
        else:
            number += begins
            numbers.append(number)
            begins = is_apart
    return [own if own <= number else -1 for own in numbers]


def _links(weights_TS: Tensor, source: list[int], target: list[int]) -> list[tuple[int, int]]:
    num_source, num_target = max(source, default=-1) + 1, max(target, default=-1) + 1
    if not num_source or not num_target:
        return []
    words_TS = _membership(target, num_target).T @ weights_TS @ _membership(source, num_source)
    best = words_TS.argmax(1).tolist()
    return sorted((word, number) for number, word in enumerate(best))


def _membership(numbers: list[int], num_words: int) -> Tensor:
    """[pieces, words]: 1 where the piece belongs to the word."""
    return (torch.tensor(numbers)[:, None] == torch.arange(num_words)).float()
