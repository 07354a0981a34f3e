"""Unknown pieces of a translation replaced by words of its source."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.clean import normalise
from trainer.attention import word_alignment
from trainer.run import LoadedModel

# How SentencePiece writes the unknown piece: this, with a blank on either side.
_UNKNOWN = "\u2047"


def copied_words(
    loaded: LoadedModel, line: str, source_ids: list[int], target_ids: list[int]
) -> list[str]:
    """For each unknown piece of a translation the source word that was attended to most.

    Args:
        line: the source text.
        source_ids: its pieces, EOS last; maybe cut.
        target_ids: the translation's, without BOS and EOS.

    Source: Luong et al. 2015 (arXiv 1410.8206); attention as in ``word_alignment``.
    """
    source_words = normalise(line).split(" ")
    target_words = loaded.vocabulary.decode([target_ids])[0].split()
    aligned = {
        target: source for source, target in word_alignment(loaded, [(source_ids, target_ids)])[0]
    }
    return [
        source_words[aligned[number]] if number in aligned else word
        for number, word in enumerate(target_words)
        if word == _UNKNOWN
    ]


def fill_in(text: str, words: Sequence[str]) -> str:
    """The decoded text with its unknown pieces replaced by the words, each a word of its own.

    What follows without a blank in the pieces, as a full stop, follows without one.
    """
    filled, *rest = f" {text} ".split(f" {_UNKNOWN} ")
    for word, following in zip(words, rest, strict=True):
        filled = f"{filled.rstrip()} {word}{following}"
    return filled.strip()
