"""Lines of text in, their translations out, in the same order.

Shapes: B batch, S source length.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from data_shards.clean import normalise
from data_shards.config import EOS_ID, PAD_ID, UNK_ID
from data_shards.errors import UserError
from model.encoder_decoder import EncoderDecoder
from model.search import SearchOptions, search
from trainer.attention import SPACE
from trainer.config import EvaluationConfig
from trainer.ensemble import check_same_vocabulary
from trainer.run import LoadedModel
from trainer.unknown import copied_words, fill_in

log = logging.getLogger(__name__)

# Lines that are sorted by length together: enough to fill batches evenly, few enough to stream.
CHUNK_LINES = 1024


@dataclass(frozen=True)
class Translation:
    """A line's translation, without line breaks; ``ids`` are its pieces without BOS and EOS."""

    text: str
    score: float
    log_prob: float
    ids: list[int]


@dataclass(frozen=True)
class _Line:
    """A line with its ids, and the prefix forced on its translations."""

    text: str
    source_ids: list[int]
    prefix: str
    prefix_ids: list[int]


class Translator:
    """Translates lines with one model, or with several whose probabilities are averaged."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        evaluation: EvaluationConfig,
        *,
        num_best: int = 1,
    ) -> None:
        """Make the models ready; the given ones stay as they are.

        Args:
            models: at least one; the first's vocabulary, of which the others must have a copy.
            evaluation: how to search.
            num_best: translations a line; with search ``sample`` so many independent ones.

        Raises:
            UserError: the vocabularies differ, ``num_best`` is above the beam.
        """
        _check_num_best(evaluation, num_best)
        check_same_vocabulary(models)
        self.loaded = models[0]
        self.evaluation = evaluation
        self._device = next(models[0].model.parameters()).device
        self._models = [_prepared(loaded.model, evaluation.precision) for loaded in models]
        self._max_pieces = min(loaded.config.model.max_positions for loaded in models) - 1
        self._options = SearchOptions(
            method=evaluation.search,
            beam=evaluation.beam,
            num_best=num_best,
            length_rule=evaluation.length_rule,
            length_penalty=evaluation.length_penalty,
            coverage_rule=evaluation.coverage_rule,
            coverage_penalty=evaluation.coverage_penalty,
            max_extra_length=evaluation.max_extra_length,
            allow_unknown=evaluation.unknown != "forbid",
            temperature=evaluation.temperature,
            top_k=evaluation.top_k,
            top_p=evaluation.top_p,
            seed=evaluation.seed,
        )

    def encode(self, line: str) -> list[int]:
        """A line's source ids, EOS last; cut, with a warning, to what the model can take.

        A line without any piece (empty, or only white space) gives no ids at all.
        """
        return self._encode([line], first_line=1)[0]

    def translate(
        self,
        lines: Sequence[str],
        *,
        prefixes: Sequence[str] | None = None,
        keys: Sequence[int] | None = None,
        first_line: int = 1,
    ) -> list[list[Translation]]:
        """The translations of each line, best first.

        Args:
            lines: source text; a line's end, ``\\n`` or ``\\r\\n``, may still be there.
            prefixes: for every line what its translations begin with. It may end within a word,
                which the translation then goes on with or leaves as it is; blanks at its end are
                not kept.
            keys: for every line the number that, with the seed, decides its samples; by default
                its place among the lines.
            first_line: the first line's number, for warnings.

        Returns:
            As many a line as were asked for (or as the search found); of a line without any piece
            one empty translation.

        Raises:
            UserError: a prefix is longer than the model can take.
        """
        sources = self._encode(lines, first_line)
        prefixes = [normalise(prefix) for prefix in prefixes or [""] * len(lines)]
        forced = self._forced(prefixes)
        keys = range(len(lines)) if keys is None else keys
        translations = [[Translation("", 0.0, 0.0, [])] for _ in lines]
        for batch in self._batches(sources):
            rows = [index for index in batch if sources[index]]
            if not rows:
                continue
            found = search(
                self._models,
                _padded([sources[index] for index in rows]).to(self._device),
                self._options,
                prefixes=[forced[index] for index in rows],
                keys=[keys[index] for index in rows],
            )
            for index, hypotheses in zip(rows, found, strict=True):
                line = _Line(lines[index], sources[index], prefixes[index], forced[index])
                translations[index] = [
                    Translation(
                        self._text(line, hypothesis.ids),
                        hypothesis.score,
                        hypothesis.log_prob,
                        hypothesis.ids,
                    )
                    for hypothesis in hypotheses
                ]
        return translations

    def stream(
        self, lines: Iterable[str], *, chunk_lines: int = CHUNK_LINES
    ) -> Iterator[list[Translation]]:
        """As ``translate``, one line's translations after the other, a chunk at a time.

        Args:
            chunk_lines: lines read before the first translation comes out.
        """
        remaining, first_line = iter(lines), 1
        while chunk := list(islice(remaining, chunk_lines)):
            keys = range(first_line - 1, first_line - 1 + len(chunk))
            yield from self.translate(chunk, keys=keys, first_line=first_line)
            first_line += len(chunk)

    def batches(self, lines: Sequence[str]) -> list[list[int]]:
        """Indices of the lines in batches of like length, under ``evaluation.batch_tokens``.

        ``translate`` decodes the lines of one such batch, by themselves, as exactly that batch.
        """
        return self._batches(self._encode(lines, first_line=None))

    def _batches(self, sources: Sequence[list[int]]) -> list[list[int]]:
        return list(length_batches([len(ids) for ids in sources], self.evaluation.batch_tokens))

    def _encode(self, lines: Sequence[str], first_line: int | None) -> list[list[int]]:
        sources = []
        pieces = self.loaded.vocabulary.encode([_without_end(line) for line in lines])
        for number, ids in enumerate(pieces):
            if len(ids) > self._max_pieces and first_line is not None:
                log.warning(
                    "line %d has %d pieces; the model's longest sentence is %d "
                    "(model.max_positions): the rest is cut off",
                    first_line + number, len(ids), self._max_pieces,
                )  # fmt: skip
            sources.append([*ids[: self._max_pieces], EOS_ID] if ids else [])
        return sources

    def _forced(self, prefixes: Sequence[str]) -> list[list[int]]:
        forced = self.loaded.vocabulary.encode(prefixes)
        for number, ids in enumerate(forced, start=1):
            if len(ids) > self._max_pieces:
                raise UserError(
                    f"the prefix of line {number} has {len(ids)} pieces; the model's longest "
                    f"sentence is {self._max_pieces} (model.max_positions): give a shorter one"
                )
        return forced

    def _text(self, line: _Line, ids: list[int]) -> str:
        vocabulary = self.loaded.vocabulary
        # A prefix with characters unknown to the vocabulary stays as it was given.
        first = len(line.prefix_ids) if UNK_ID in line.prefix_ids else 0
        (text,) = vocabulary.decode([ids[first:]])
        if UNK_ID in ids[first:] and self.evaluation.unknown == "copy":
            words = copied_words(self.loaded, line.text, line.source_ids, ids)
            text = fill_in(text, words[ids[:first].count(UNK_ID) :])
        if first:
            following = "".join(vocabulary.pieces(ids[first:]))
            text = line.prefix + " " * following.startswith(SPACE) + text
        # Any break that a piece may hold, so that line n stays the translation of line n.
        return " ".join(text.splitlines())


def length_batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most ``batch_tokens`` tokens, padding included; longest first.

    The longest first, so that a batch that does not fit in memory fails at once and not at the end.
    A sentence longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def read_lines(stream: Iterable[bytes], *, name: str, first_line: int = 1) -> Iterator[str]:
    """Lines of UTF-8 text without their ends (``\\n`` or ``\\r\\n``) and without a leading BOM.

    Args:
        stream: raw lines.
        name: the file's, for errors.
        first_line: the number of the stream's first line within the file.

    Raises:
        UserError: bytes that are not UTF-8, with the line's number.
    """
    for number, raw in enumerate(stream, start=first_line):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number}: not UTF-8 text ({error.reason} at byte {error.start}): "
                "convert it, for example with iconv -f latin1 -t utf-8"
            ) from None
        if number == 1:
            line = line.removeprefix("\ufeff")
        yield _without_end(line)


def _check_num_best(evaluation: EvaluationConfig, num_best: int) -> None:
    most = {"beam": evaluation.beam, "greedy": 1}.get(evaluation.search)
    if num_best < 1 or (most is not None and num_best > most):
        raise UserError(
            f"{num_best} translations a line were asked for; search {evaluation.search} gives 1 "
            f"to {most or 'any number'}: set evaluation.beam at least so high"
        )


def _prepared(model: EncoderDecoder, precision: str) -> EncoderDecoder:
    if precision == "bf16":
        return copy.deepcopy(model).to(torch.bfloat16)
    return model


def _padded(sources: Sequence[list[int]]) -> Tensor:
    width = max(len(ids) for ids in sources)
    return torch.tensor([ids + [PAD_ID] * (width - len(ids)) for ids in sources])


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
