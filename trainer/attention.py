"""What a model's attention looked at while it read a sentence and wrote its translation.

Shapes: B batch, H heads, S source pieces with "</s>", T target pieces with "<s>" or "</s>".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_shards.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from trainer.run import LoadedModel

Kind = Literal["encoder", "decoder", "cross"]

# SentencePiece's mark of a space, which begins a word.
SPACE = "\u2581"
# Attention weights recorded in one pass, so that memory stays small whatever is aligned.
_WEIGHTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of every layer and head, float32 on the CPU; each row sums to 1.

    A row is a query, a column a key. Row t of ``decoder`` and ``cross`` is of the state that reads
    ``inputs[t]`` and predicts ``outputs[t]``.
    """

    source: list[str]
    inputs: list[str]
    outputs: list[str]
    encoder: Tensor
    """[layers, H, S, S]"""
    decoder: Tensor
    """[layers, H, T, T], 0 right of the diagonal"""
    cross: Tensor
    """[layers, H, T, S]"""

    def labelled(self, kind: Kind) -> tuple[Tensor, list[str], list[str]]:
        """The weights [layers, H, queries, keys] of a kind, its rows' and its columns' pieces.

        The decoder's rows are labelled with the piece that they predict.
        """
        if kind == "encoder":
            return self.encoder, self.source, self.source
        if kind == "decoder":
            return self.decoder, self.outputs, self.inputs
        return self.cross, self.outputs, self.source


def attention_maps(
    loaded: LoadedModel, source_ids: list[int], target_ids: list[int]
) -> AttentionMaps:
    """The weights as the model reads ``source_ids`` and is made to write ``target_ids``.

    Args:
        source_ids: piece ids with EOS last.
        target_ids: piece ids without BOS and EOS; may be empty.
    """
    inputs, outputs = [BOS_ID, *target_ids], [*target_ids, EOS_ID]
    maps = _maps(loaded, [source_ids], [inputs])
    pieces = loaded.vocabulary.pieces
    return AttentionMaps(
        source=pieces(source_ids),
        inputs=pieces(inputs),
        outputs=pieces(outputs),
        encoder=maps["encoder"][:, 0].cpu(),
        decoder=maps["decoder"][:, 0].cpu(),
        cross=maps["cross"][:, 0].cpu(),
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
    for batch in _batches(loaded, pairs):
        sources = [pairs[index][0] for index in batch]
        targets = [pairs[index][1] for index in batch]
        maps = _maps(loaded, sources, [[BOS_ID, *target] for target in targets])
        cross_LBHTS = maps["cross"]
        cross_BTS = cross_LBHTS[max(0, len(cross_LBHTS) - 2)].mean(1).cpu()
        for row, index in enumerate(batch):
            weights_TS = cross_BTS[row, : len(targets[row]), : len(sources[row])]
            source = _words(loaded, sources[row], unknown_apart=False)
            target = _words(loaded, targets[row], unknown_apart=True)
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
    """Indices of pairs that have words, those of like length together, the longest first."""
    config = loaded.config.model
    maps = (config.encoder_layers + 2 * config.decoder_layers) * config.num_heads
    lengths = [max(len(source), len(target) + 1) for source, target in pairs]
    order = sorted(
        (index for index, (source, target) in enumerate(pairs) if source and target),
        key=lambda index: (-lengths[index], index),
    )
    start = 0
    while start < len(order):
        rows = max(1, _WEIGHTS_AT_ONCE // (maps * lengths[order[start]] ** 2))
        yield order[start : start + rows]
        start += rows


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
