"""Lines of text in, their translations out, in the same order.

Shapes: B batch, S source length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from data_shards.config import EOS_ID, PAD_ID
from data_shards.errors import UserError
from model.search import Hypothesis, beam_search
from trainer.config import EvaluationConfig
from trainer.run import LoadedModel

log = logging.getLogger(__name__)

# Lines that are sorted by length together: enough to fill batches evenly, few enough to stream.
CHUNK_LINES = 1024


def translate(
    loaded: LoadedModel,
    lines: Iterable[str],
    evaluation: EvaluationConfig,
    *,
    chunk_lines: int = CHUNK_LINES,
) -> Iterator[str]:
    """Translate lines, one out for each one in, in order, a chunk at a time.

    A line without any piece (empty, or only white space) gives an empty line. A line longer than
    the model's positions is cut, with a warning that names it. An output holds no line break.

    Args:
        loaded: the model, its vocabulary and its configuration.
        lines: source text; a line's end, ``\\n`` or ``\\r\\n``, may still be there.
        evaluation: beam search's settings and the tokens decoded together.
        chunk_lines: lines read before the first translation comes out.
    """
    stream = iter(lines)
    first_line = 1
    while chunk := list(islice(stream, chunk_lines)):
        yield from _translate_chunk(loaded, chunk, evaluation, first_line)
        first_line += len(chunk)


def decode(
    loaded: LoadedModel, sources: list[list[int]], evaluation: EvaluationConfig
) -> list[Hypothesis]:
    """The best hypothesis of each source, in order, decoded in batches of like length.

    Args:
        sources: piece ids, each ending with EOS; none empty.
    """
    device = next(loaded.model.parameters()).device
    best: list[Hypothesis | None] = [None] * len(sources)
    for batch in length_batches([len(ids) for ids in sources], evaluation.batch_tokens):
        width = max(len(sources[index]) for index in batch)
        source_BS = torch.full((len(batch), width), PAD_ID, dtype=torch.int64)
        for row, index in enumerate(batch):
            source_BS[row, : len(sources[index])] = torch.tensor(sources[index])
        found = beam_search(
            loaded.model,
            source_BS.to(device),
            beam=evaluation.beam,
            length_penalty=evaluation.length_penalty,
            max_extra_length=evaluation.max_extra_length,
        )
        for index, hypotheses in zip(batch, found, strict=True):
            best[index] = hypotheses[0]
    assert all(hypothesis is not None for hypothesis in best)
    return [hypothesis for hypothesis in best if hypothesis is not None]


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


def read_lines(stream: Iterable[bytes], *, name: str) -> Iterator[str]:
    """Lines of UTF-8 text without their ends (``\\n`` or ``\\r\\n``) and without a leading BOM.

    Raises:
        UserError: bytes that are not UTF-8, with the line's number.
    """
    for number, raw in enumerate(stream, start=1):
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


def _translate_chunk(
    loaded: LoadedModel, chunk: list[str], evaluation: EvaluationConfig, first_line: int
) -> list[str]:
    limit = loaded.config.model.max_positions
    sources = []
    numbers = []
    pieces = loaded.vocabulary.encode([_without_end(line) for line in chunk])
    for number, ids in enumerate(pieces):
        if not ids:
            continue
        if len(ids) >= limit:
            log.warning(
                "line %d has %d pieces; the model's longest sentence is %d (model.max_positions): "
                "the rest is cut off",
                first_line + number, len(ids), limit - 1,
            )  # fmt: skip
        sources.append([*ids[: limit - 1], EOS_ID])
        numbers.append(number)
    found = decode(loaded, sources, evaluation)
    texts = loaded.vocabulary.decode([hypothesis.ids for hypothesis in found])
    translations = [""] * len(chunk)
    for number, text in zip(numbers, texts, strict=True):
        # Any break that a piece may hold, so that line n stays the translation of line n.
        translations[number] = " ".join(text.splitlines())
    return translations


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
