"""Unknown pieces of a translation replaced by words of its source."""

from __future__ import annotations

import torch

from data_shards.clean import normalise
from data_shards.config import BOS_ID, UNK_ID
from trainer.run import LoadedModel

# How SentencePiece writes the unknown piece.
_WRITTEN = " \u2047 "
# How it marks the beginning of a word.
_WORD = "\u2581"


def copy_unknown(
    loaded: LoadedModel, line: str, source_ids: list[int], target_ids: list[int]
) -> str:
    """The translation's text, each unknown piece replaced by the source word attended to most.

    Attention is the mean over the heads of the last decoder layer but one (of the only one), where
    it aligns best: Garg et al. 2019 (arXiv 1909.02074). Words replace unknown ones as in Luong et
    al. 2015 (arXiv 1410.8206).

    Args:
        line: the source text.
        source_ids: its pieces, EOS last; maybe cut.
        target_ids: the translation's, without BOS and EOS.
    """
    device = next(loaded.model.parameters()).device
    maps = loaded.model.attention_maps(
        torch.tensor([source_ids], device=device),
        torch.tensor([[BOS_ID, *target_ids]], device=device),
    )
    # Row t is the attention that wrote piece t; the last column is EOS, which is no word.
    cross_TS = maps["cross"][-2:][0, 0].mean(0)[:, :-1]
    source_words = normalise(line).split(" ")
    word_of = _word_numbers(loaded.vocabulary.pieces(source_ids[:-1]))
    copied = [
        source_words[word_of[int(cross_TS[place].argmax())]]
        for place, piece in enumerate(target_ids)
        if piece == UNK_ID
    ]
    (text,) = loaded.vocabulary.decode([target_ids])
    # The blanks at the text's ends are gone already.
    first, *rest = f" {text} ".split(_WRITTEN)
    for word, following in zip(copied, rest, strict=True):
        first = f"{first.rstrip()} {word}{following}"
    return first.strip()


def _word_numbers(pieces: list[str]) -> list[int]:
    """Which word of the text each piece belongs to."""
    numbers, number = [], -1
    for piece in pieces:
        number += piece.startswith(_WORD)
        numbers.append(max(number, 0))
    return numbers
