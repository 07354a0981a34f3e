"""What each head is needed for: the model's words with one head's output set to nothing.

That a head looks at a word does not show that the model uses what it finds there (Jain and Wallace
2019, arXiv 1902.10186). Silencing it does, for this model as it is: what the others could learn to
do in its stead is another question, and a head whose work others do as well seems to be needed for
nothing.

Shapes: B batch, T target pieces, V vocabulary.

Source: Michel et al. 2019 (arXiv 1905.10650), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data_shards.config import BOS_ID, EOS_ID, PAD_ID
from data_shards.embedded import Sentence, sentences
from data_shards.embedded_relations import other_number, relations
from model.encoder_decoder import EncoderDecoder
from trainer.attention import KINDS, Kind
from trainer.grammar_heads import encoded, has_grammar, places
from trainer.run import LoadedModel

EVERY_WORD = "every piece"
OTHER = "every other piece"
NUMBER = "number of the verb"
# Target pieces in one pass, padding included.
_PIECES_AT_ONCE = 2**13


@dataclass(frozen=True)
class HeadName:
    """A head; layer and head are counted from 0."""

    kind: Kind
    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer + 1}.{self.head + 1}"


@dataclass(frozen=True)
class Right:
    """How well the model writes the words of a group when it is given what comes before them.

    Attributes:
        cases: words.
        right: share of them of which every piece is the most probable; of ``NUMBER`` of which the
            right form is more probable than that of the other number (macht, machen).
        nats: mean negative log-likelihood of a piece.
        each: of each word whether it is right, in the order of the group's.
    """

    cases: int
    right: float
    nats: float
    each: tuple[bool, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Needed:
    """By group of words: with all heads, and with each head silenced in turn.

    Attributes:
        sentences: by group, the number of each word's sentence.
    """

    whole: dict[str, Right]
    silenced: dict[HeadName, dict[str, Right]]
    sentences: dict[str, list[int]]


Pair = tuple[list[int], list[int]]
# A word: the number of its pair, and the places of its pieces.
Word = tuple[int, list[int]]


@dataclass(frozen=True)
class Words:
    """What a model is made to write.

    Attributes:
        pairs: source ids with EOS last, target ids without BOS and EOS.
        groups: words of these pairs, by what they are.
        changed: pairs in which one word has the form of the other number.
        contrasts: a word of ``pairs``, and of ``changed`` what stands in its place.
    """

    pairs: list[Pair]
    groups: dict[str, list[Word]]
    changed: list[Pair]
    contrasts: list[tuple[Word, Word]]


def heads_of(model: EncoderDecoder) -> dict[HeadName, nn.Linear]:
    """Each head of a model, with the projection that reads its output; none without such heads."""
    config = model.config
    found = {}
    for kind in KINDS:
        side, part = ("decoder", "cross") if kind == "cross" else (kind, "attention")
        layers = config.encoder_layers if kind == "encoder" else config.decoder_layers
        for layer in range(layers):
            try:
                output = model.get_submodule(f"{side}.{layer}.{part}.output")
            except AttributeError:
                continue
            assert isinstance(output, nn.Linear)
            for head in range(config.num_heads):
                found[HeadName(kind, layer, head)] = output
    return found


@contextmanager
def silenced(model: EncoderDecoder, name: HeadName) -> Iterator[None]:
    """The model without one head: nothing is read of what it puts out."""
    weight_DC = heads_of(model)[name].weight
    width = weight_DC.size(1) // model.config.num_heads
    part = weight_DC.data[:, name.head * width : (name.head + 1) * width]
    kept = part.clone()
    part.zero_()
    try:
        yield
    finally:
        part.copy_(kept)


def needed_for(loaded: LoadedModel, words: Words) -> Needed:
    """What is lost by each head alone, in every piece and in each group of words."""
    groups = {EVERY_WORD: _every_piece(words.pairs), **words.groups}
    whole = _scored(loaded, words, groups)
    found = {}
    for name in heads_of(loaded.model):
        with silenced(loaded.model, name):
            found[name] = _scored(loaded, words, groups)
    of = {group: [index for index, _ in chosen] for group, chosen in groups.items()}
    if words.contrasts:
        of[NUMBER] = [index for (index, _), _ in words.contrasts]
    return Needed(whole, found, of)


def words_to_write(
    loaded: LoadedModel, num_sentences: int, split: Literal["valid", "test"] = "test"
) -> Words:
    """Pairs of a held-out set, with groups of words where the grammar is known.

    Where there is no test set, "valid" and "test" are each every second pair of the validation set.
    """
    if not has_grammar(loaded):
        longest = loaded.config.model.max_positions - 1
        source, target = (
            loaded.vocabulary.encode(lines[:num_sentences]) for lines in _held_out(loaded, split)
        )
        pairs = [
            ([*ids[:longest], EOS_ID], other[:longest])
            for ids, other in zip(source, target, strict=True)
            if ids and other
        ]
        return Words(pairs, {}, [], [])
    chosen = list(sentences(split, num_sentences))
    words = Words(encoded(loaded, chosen), {}, [], [])
    for index, one in enumerate(chosen):
        pieces = loaded.vocabulary.pieces(words.pairs[index][1])
        written = {
            (relation.name.split(" →")[0], tuple(places(pieces, relation.word)))
            for relation in relations(one)
            if relation.word.side == "target"
        }
        for group, at in sorted(written):
            words.groups.setdefault(group, []).append((index, list(at)))
        named = {place for _, at in written for place in at}
        others = [at for at in range(len(pieces) + 1) if at not in named]
        words.groups.setdefault(OTHER, []).extend((index, [at]) for at in others)
        _contrast(loaded, words, index, one)
    return words


def has_test_set(loaded: LoadedModel) -> bool:
    """Whether the run's corpus has a test set."""
    return "test" in loaded.manifest.data.splits


def _held_out(loaded: LoadedModel, split: Literal["valid", "test"]) -> tuple[list[str], list[str]]:
    if has_test_set(loaded):
        return loaded.manifest.split_text(split)
    source, target = loaded.manifest.split_text("valid")
    first = 0 if split == "valid" else 1
    return source[first::2], target[first::2]


def _contrast(loaded: LoadedModel, words: Words, index: int, one: Sentence) -> None:
    source_ids, target_ids = words.pairs[index]
    at = loaded.vocabulary.pieces(target_ids)
    for span, form in other_number(one):
        text = one.german[: span.start] + form + one.german[span.end :]
        [ids] = loaded.vocabulary.encode([text])
        there = span._replace(end=span.start + len(form))
        changed = (len(words.changed), places(loaded.vocabulary.pieces(ids), there))
        words.changed.append((source_ids, ids))
        words.contrasts.append(((index, places(at, span)), changed))


def _every_piece(pairs: Sequence[Pair]) -> list[Word]:
    return [(index, [at]) for index, (_, ids) in enumerate(pairs) for at in range(len(ids) + 1)]


def _scored(loaded: LoadedModel, words: Words, groups: dict[str, list[Word]]) -> dict[str, Right]:
    nats, right = _written(loaded, words.pairs)
    found = {
        group: _right(
            chosen, nats, [all(right[index][at] for at in pieces) for index, pieces in chosen]
        )
        for group, chosen in groups.items()
    }
    if words.contrasts:
        other_nats, _ = _written(loaded, words.changed)
        chosen = [word for word, _ in words.contrasts]
        is_preferred = [
            _sum(nats, word) < _sum(other_nats, changed) for word, changed in words.contrasts
        ]
        found[NUMBER] = _right(chosen, nats, is_preferred)
    return found


def _right(words: Sequence[Word], nats: list[list[float]], is_right: Sequence[bool]) -> Right:
    num_pieces = sum(len(pieces) for _, pieces in words)
    total = sum(_sum(nats, word) for word in words)
    return Right(len(words), sum(is_right) / len(words), total / num_pieces, tuple(is_right))


def _sum(nats: list[list[float]], word: Word) -> float:
    index, pieces = word
    return sum(nats[index][at] for at in pieces)


def _written(
    loaded: LoadedModel, pairs: Sequence[Pair]
) -> tuple[list[list[float]], list[list[bool]]]:
    """Of each pair's pieces and its end: their nats, and whether nothing is more probable."""
    nats: list[list[float]] = [[] for _ in pairs]
    right: list[list[bool]] = [[] for _ in pairs]
    device = next(loaded.model.parameters()).device
    lengths = [max(len(source), len(target) + 1) for source, target in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        batch = order[start : start + max(1, _PIECES_AT_ONCE // lengths[order[start]])]
        start += len(batch)
        source_BS = _padded([pairs[index][0] for index in batch]).to(device)
        inputs_BT = _padded([[BOS_ID, *pairs[index][1]] for index in batch]).to(device)
        outputs_BT = _padded([[*pairs[index][1], EOS_ID] for index in batch]).to(device)
        with torch.no_grad():
            hidden_BTD = loaded.model.states(source_BS, inputs_BT)
            log_prob_BTV = loaded.model.project(hidden_BTD).float().log_softmax(-1)
        best_BT, written_BT = (
            log_prob_BTV.argmax(-1),
            log_prob_BTV.gather(-1, outputs_BT[..., None]),
        )
        for row, index in enumerate(batch):
            length = len(pairs[index][1]) + 1
            nats[index] = (-written_BT[row, :length, 0]).tolist()
            right[index] = (best_BT[row, :length] == outputs_BT[row, :length]).tolist()
    return nats, right


def _padded(rows: Sequence[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
