"""``babelray translate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from cluster.options import checkpoint_option, evaluation_settings, runs_option, say, search_option
from data_shards.errors import UserError

if TYPE_CHECKING:
    from trainer.translate import Translation, Translator


@click.command()
@click.argument("run")
@click.option(
    "--input",
    "input_file",
    type=click.File("rb"),
    default="-",
    metavar="FILE",
    help="Sentences, one a line; by default (or with '-') standard input.",
)
@checkpoint_option
@click.option(
    "--ensemble",
    "others",
    multiple=True,
    metavar="RUN[@CHECKPOINT]",
    help="Translate together with this run's model; @CHECKPOINT alone is another checkpoint of "
    "RUN. May be repeated.",
)
@click.option(
    "--nbest",
    "num_best",
    type=click.IntRange(min=1),
    metavar="N",
    help="The N best translations of each line, a line each: number ||| translation ||| score.",
)
@click.option("--scores", is_flag=True, help="Add the score that the search ranks by: ||| -0.53.")
@click.option(
    "--alignment",
    is_flag=True,
    help="Add which words belong together, source word - word of the translation, counted from 0: "
    "||| 0-0 1-2.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A JSON object for each line, with all there is: scores, pieces, alignments.",
)
@click.option("--prefix", metavar="TEXT", help="What each translation begins with.")
@click.option(
    "--prefix-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="... or, for each line of the input, a line that says so.",
)
@search_option
@runs_option
def translate(
    run: str,
    input_file: BinaryIO,
    checkpoint: str,
    others: tuple[str, ...],
    num_best: int | None,
    scores: bool,
    alignment: bool,
    as_json: bool,
    prefix: str | None,
    prefix_file: Path | None,
    settings: tuple[str, ...],
    runs: Path,
) -> None:
    """Translate sentences with the run RUN, one a line, in their order.

    From a pipe lines are answered as they come; on a terminal there is a prompt. --nbest writes as
    Moses does: lines are numbered from 0, the best translation first.

    \b
    Examples:
      echo "the old man sleeps" | babelray translate demo
      babelray translate demo --input news.en --checkpoint average > news.de
      babelray translate demo --ensemble @1000 --ensemble other@average < news.en
      babelray translate demo --nbest 4 --set evaluation.beam=12 --alignment < news.en
      babelray translate demo --set evaluation.search=sample --set evaluation.top_k=20 --json
    """
    from cluster.naming import find_run

    if prefix is not None and prefix_file is not None:
        raise UserError("--prefix and --prefix-file: give one of them")
    run_dir = find_run(run, runs)
    evaluation = evaluation_settings(run_dir, settings)
    import torch

    from cluster.lines import chunks, converse
    from trainer.ensemble import load_ensemble
    from trainer.translate import CHUNK_LINES, Translator

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_ensemble(run_dir, checkpoint, others, runs=runs, device=device)
    translator = Translator(models, evaluation, num_best=num_best or 1)
    write = _Writer(translator, num_best is not None, scores, alignment, as_json)

    if _is_terminal(input_file) and prefix_file is None:
        say("One sentence a line; Ctrl-D ends, Ctrl-C gives up a line.")
        converse(
            lambda line: write(0, [line], [prefix or ""]),
            prompt=f"{translator.loaded.manifest.source_language}> ",
            say=say,
        )
        return
    prefixes = _Prefixes(prefix, prefix_file)
    first = 0
    name = getattr(input_file, "name", "<stdin>")
    for lines in _decoded(chunks(input_file, CHUNK_LINES), name=name):
        click.echo(write(first, lines, prefixes.take(len(lines))), nl=False)
        sys.stdout.flush()
        first += len(lines)
    prefixes.finish()


def _is_terminal(file: BinaryIO) -> bool:
    return file is sys.stdin.buffer and file.isatty()


def _decoded(raw: Iterator[list[bytes]], *, name: str) -> Iterator[list[str]]:
    """The chunks as text; those lines of a chunk that come before a broken one are given first."""
    from trainer.translate import read_lines

    done = 0
    for chunk in raw:
        lines: list[str] = []
        try:
            lines.extend(read_lines(chunk, name=name, first_line=done + 1))
        except UserError:
            if lines:
                yield lines
            raise
        yield lines
        done += len(lines)


@dataclass(frozen=True)
class _Writer:
    """Lines in, the text of their translations out."""

    translator: Translator
    is_nbest: bool
    scores: bool
    alignment: bool
    as_json: bool

    def __call__(self, first: int, lines: Sequence[str], prefixes: Sequence[str]) -> str:
        found = self.translator.translate(
            lines,
            prefixes=prefixes if any(prefixes) else None,
            keys=range(first, first + len(lines)),
            first_line=first + 1,
        )
        links = self._links(lines, found)
        return "".join(
            self._line(first + index, lines[index], translations, links[index])
            for index, translations in enumerate(found)
        )

    def _links(
        self, lines: Sequence[str], found: list[list[Translation]]
    ) -> list[list[list[tuple[int, int]]]]:
        """For each translation of each line its alignment."""
        if not (self.alignment or self.as_json):
            return [[[]] * len(translations) for translations in found]
        from data_shards.config import EOS_ID
        from trainer.attention import word_alignment

        loaded = self.translator.loaded
        longest = loaded.config.model.max_positions - 1
        sources = [[*ids[:longest], EOS_ID] for ids in loaded.vocabulary.encode(lines)]
        aligned = iter(
            word_alignment(
                loaded,
                [
                    (source, translation.ids)
                    for source, translations in zip(sources, found, strict=True)
                    for translation in translations
                ],
            )
        )
        return [[next(aligned) for _ in translations] for translations in found]

    def _line(
        self,
        number: int,
        source: str,
        translations: list[Translation],
        links: list[list[tuple[int, int]]],
    ) -> str:
        both = list(zip(translations, links, strict=True))
        if self.as_json:
            told = [self._object(translation, pairs) for translation, pairs in both]
            value = {"source": source, "translations": told}
            return json.dumps(value, ensure_ascii=False) + "\n"
        return "".join(
            " ||| ".join(self._fields(number, translation, pairs)) + "\n"
            for translation, pairs in both
        )

    def _fields(
        self, number: int, translation: Translation, links: list[tuple[int, int]]
    ) -> list[str]:
        fields = [str(number)] if self.is_nbest else []
        fields.append(translation.text)
        if self.scores or self.is_nbest:
            fields.append(f"{translation.score:.6g}")
        if self.alignment:
            fields.append(" ".join(f"{source}-{target}" for source, target in links))
        return fields

    def _object(self, translation: Translation, links: list[tuple[int, int]]) -> dict[str, Any]:
        return {
            "text": translation.text,
            "score": translation.score,
            "log_prob": translation.log_prob,
            "pieces": self.translator.loaded.vocabulary.pieces(translation.ids),
            "alignment": links,
        }


class _Prefixes:
    """What translations begin with, in step with the input."""

    def __init__(self, prefix: str | None, file: Path | None) -> None:
        self._prefix = prefix or ""
        self._file = file
        self._lines: list[str] = []
        self._taken = 0
        if file is not None:
            from trainer.translate import read_lines

            with file.open("rb") as stream:
                self._lines = list(read_lines(stream, name=str(file)))

    def take(self, number: int) -> list[str]:
        """The prefixes of the next ``number`` lines.

        Raises:
            UserError: the file has fewer.
        """
        if self._file is None:
            return [self._prefix] * number
        start, self._taken = self._taken, self._taken + number
        if self._taken > len(self._lines):
            raise UserError(
                f"{self._file} has {len(self._lines)} lines, the input has more: a line each "
                "(empty where nothing is prescribed)"
            )
        return self._lines[start : self._taken]

    def finish(self) -> None:
        """The input has ended.

        Raises:
            UserError: the file has more lines than it had.
        """
        if self._file is not None and self._taken < len(self._lines):
            raise UserError(
                f"{self._file} has {len(self._lines)} lines, the input {self._taken}: a line each "
                "(empty where nothing is prescribed)"
            )
