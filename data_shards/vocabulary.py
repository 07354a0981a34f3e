"""The vocabulary that source and target share: SentencePiece, learnt and used.

Special pieces have the same ids in every vocabulary: padding 0, beginning 1, end 2, unknown 3.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from data_shards.clean import LONGEST_PIECE_CHARACTERS, normalise
from data_shards.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from data_shards.errors import DataError

# Rarer characters become the unknown piece. SentencePiece's own default (0.9995) is made for
# thousands of Chinese characters; in a corpus of Multi30k's size it would drop digits.
_CHARACTER_COVERAGE = 0.99999

# Part of what decides the result of the unigram method, which adds up one sum a thread; a constant,
# so that the same text gives the same vocabulary on every machine.
_TRAINING_THREADS = 4

# Bytes; longer lines are left out of learning (not out of the corpus).
_LONGEST_LINE_BYTES = 8192

_MAX_ENCODING_THREADS = 16


class Vocabulary:
    """Text to piece ids and back."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, path: Path) -> None:
        self._processor = processor
        self.path = path
        self.size: int = processor.get_piece_size()

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read a SentencePiece model.

        Raises:
            DataError: the file is missing, is not a SentencePiece model, or numbers the special
                pieces otherwise than this system does.
        """
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"vocabulary {path} cannot be read ({error.strerror or error}): run "
                "`babelray data prepare` with the same configuration"
            ) from None
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(
                f"vocabulary {path} is not a SentencePiece model, or it was cut short: prepare "
                "the corpus again"
            ) from None
        ids = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
        if ids != (PAD_ID, BOS_ID, EOS_ID, UNK_ID):
            raise DataError(
                f"vocabulary {path} numbers pad, bos, eos and unk {ids}; expected "
                f"{(PAD_ID, BOS_ID, EOS_ID, UNK_ID)}. Learn it with `babelray data prepare`"
            )
        return cls(processor, path)

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Piece ids of each line, without begin and end signs; an empty line gives no ids."""
        if not lines:
            return []
        # A thread a few hundred lines: for a handful of lines starting them costs more.
        threads = max(1, min(_available_cores(), _MAX_ENCODING_THREADS, len(lines) // 256))
        ids: list[list[int]] = self._processor.encode(
            [normalise(line) for line in lines], out_type=int, num_threads=threads
        )
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sequence of ids; padding, begin and end signs are dropped."""
        special = (PAD_ID, BOS_ID, EOS_ID)
        kept = [[int(piece) for piece in sequence if piece not in special] for sequence in ids]
        # One thread: outputs come in batches of a few dozen.
        texts: list[str] = self._processor.decode(kept, num_threads=1) if kept else []
        return texts

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The written form of each id, as an attention map labels its axes."""
        return [self._processor.id_to_piece(int(piece)) for piece in ids]


def train(
    sentences: Iterable[str],
    path: Path,
    *,
    size: int,
    kind: Literal["bpe", "unigram"],
) -> Vocabulary:
    """Learn a vocabulary and write it to ``path``.

    The same sentences in the same order give the same bytes.

    Args:
        sentences: normalised sentences of both languages; SentencePiece holds them in memory.
        path: where the model is written.
        size: pieces, the four special ones included.
        kind: how pieces are chosen.

    Raises:
        DataError: the text cannot yield ``size`` pieces, or has more distinct characters than that.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_not_empty(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            character_coverage=_CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            max_sentencepiece_length=LONGEST_PIECE_CHARACTERS,
            max_sentence_length=_LONGEST_LINE_BYTES,
            num_threads=_TRAINING_THREADS,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            pad_piece="<pad>",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), size) from None
    path.write_bytes(model.getvalue())
    return Vocabulary.load(path)


def _not_empty(sentences: Iterable[str]) -> Iterator[str]:
    found = False
    for sentence in sentences:
        found = found or bool(sentence)
        yield sentence
    if not found:
        # SentencePiece would abort with an internal check instead.
        raise DataError("no sentence to learn a vocabulary from: the cleaned corpus is empty")


def _explain(message: str, size: int) -> DataError:
    """SentencePiece's own error, as what the user can do about it."""
    too_large = re.search(r"value <= (\d+)", message)
    if too_large:
        largest = too_large.group(1)
        return DataError(
            f"data.vocabulary_size {size} is too large for this corpus, which yields at most "
            f"{largest} pieces: set data.vocabulary_size={largest} or less"
        )
    too_small = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if too_small:
        smallest = too_small.group(1)
        return DataError(
            f"data.vocabulary_size {size} is too small for this corpus, whose characters alone "
            f"need {smallest} pieces: set data.vocabulary_size well above {smallest}"
        )
    return DataError(f"SentencePiece could not learn a vocabulary of {size} pieces: {message}")


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
