"""BLEU and chrF of a run's checkpoint, with all that is needed to compare or repeat the number.

A BLEU without its signature is not comparable (Post 2018), so every score is stored with
sacreBLEU's: cased, 13a tokenisation, one reference, on detokenised text.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from sacrebleu.metrics import BLEU, CHRF

from data_shards.errors import UserError
from trainer.config import EvaluationConfig
from trainer.events import EventLog
from trainer.run import LoadedModel, evaluation_dir, events_path, load_model
from trainer.storage import write_atomically
from trainer.translate import read_lines, translate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One evaluation; the fields of its JSON file, ``file`` aside."""

    test_set: str
    checkpoint: str
    step: int
    averaged_steps: tuple[int, ...]
    num_sentences: int
    bleu: float
    signature: str
    bleu_detail: str  # precisions, brevity penalty, length ratio, as sacreBLEU prints them
    chrf: float
    chrf_signature: str
    beam: int
    length_penalty: float
    max_extra_length: int
    batch_tokens: int
    seconds: float
    sentences_per_second: float
    hypotheses: str  # the file's name, beside the JSON file
    source: str | None  # the user's own files; None for a split of the run's corpus
    reference: str | None
    time: float
    file: Path

    def to_json(self) -> dict[str, Any]:
        """What the JSON file holds."""
        values = asdict(self)
        del values["file"]
        return values

    @classmethod
    def read(cls, file: Path) -> Result:
        """The evaluation that a JSON file holds.

        Raises:
            OSError: the file cannot be read.
            ValueError: it does not hold an evaluation.
        """
        values = json.loads(file.read_text(encoding="utf-8"))
        try:
            steps = tuple(values.pop("averaged_steps"))
            return cls(**values, averaged_steps=steps, file=file)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an evaluation: {error}") from None


@dataclass(frozen=True)
class TestSet:
    """Parallel sentences with the name that they are reported under."""

    # Not a test case, though pytest's collection would take it for one by its name.
    __test__ = False

    name: str
    sources: list[str]
    references: list[str]
    files: tuple[Path, Path] | None = None


def evaluate(
    run_dir: Path,
    *,
    checkpoint: str = "best",
    test_set: Literal["test", "valid"] = "test",
    source: Path | None = None,
    reference: Path | None = None,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_extra_length: int | None = None,
    batch_tokens: int | None = None,
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> Result:
    """Translate a test set and score it against its references.

    Writes ``evaluation/<test set>-<checkpoint>.json`` and the hypotheses beside it, each whole or
    not at all, and logs an ``evaluated`` event.

    Args:
        run_dir: the run's folder.
        checkpoint: best, last, average, average:N or a step (see ``trainer.run.load_model``).
        test_set: a split of the run's own corpus; not used if ``source`` is given.
        source, reference: two files of the user's own, line by line parallel; both or neither.
        beam, length_penalty, max_extra_length, batch_tokens: instead of the configuration's.
        threads: CPU threads while decoding; by default as torch chose.
        device: where to decode; by default a GPU if there is one.

    Raises:
        UserError: no such run, checkpoint or file; a setting out of range; source and reference
            of different length.
    """
    if (source is None) != (reference is None):
        raise UserError("give both a source and a reference file, or neither")
    # The user's files are read before the model is loaded: a typo is told at once.
    given = None
    if source is not None and reference is not None:
        given = read_test_set(source, reference)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run_dir, checkpoint, device=device)
    evaluation = override(
        loaded.config.evaluation,
        beam=beam,
        length_penalty=length_penalty,
        max_extra_length=max_extra_length,
        batch_tokens=batch_tokens,
    )
    tested = given or _split(loaded, test_set)
    log.info(
        "translating %d sentences of %s with checkpoint %s (step %d)",
        len(tested.sources), tested.name, loaded.label, loaded.step,
    )  # fmt: skip
    start = time.perf_counter()
    with _threads(threads):
        hypotheses = list(
            translate(loaded, tested.sources, evaluation, chunk_lines=len(tested.sources))
        )
    seconds = time.perf_counter() - start
    result = _score(run_dir, loaded, tested, hypotheses, evaluation, seconds)
    _write(run_dir, result, hypotheses)
    return result


def override(evaluation: EvaluationConfig, **values: float | None) -> EvaluationConfig:
    """The configuration with what is not None put in its place, validated.

    Raises:
        UserError: a value is out of range.
    """
    changes = {name: value for name, value in values.items() if value is not None}
    try:
        return EvaluationConfig.model_validate({**evaluation.model_dump(), **changes})
    except ValidationError as error:
        reasons = [f"evaluation.{item['loc'][0]}: {item['msg']}" for item in error.errors()]
        raise UserError("; ".join(reasons)) from None


def read_test_set(source: Path, reference: Path) -> TestSet:
    """Two parallel files as a test set named after the source file.

    Raises:
        UserError: a file is missing, not UTF-8 or empty, or they differ in length.
    """
    sources, references = _read_text(source), _read_text(reference)
    if len(sources) != len(references):
        raise UserError(
            f"source and reference are not parallel: {source} has {len(sources)} lines, "
            f"{reference} has {len(references)}"
        )
    if not sources:
        raise UserError(f"nothing to evaluate: {source} is empty")
    return TestSet(
        name=source.name,
        sources=sources,
        references=references,
        files=(source.resolve(), reference.resolve()),
    )


def _read_text(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            return list(read_lines(stream, name=str(file)))
    except FileNotFoundError:
        raise UserError(f"file not found: {file}") from None
    except OSError as error:
        raise UserError(f"file cannot be read: {file}: {error.strerror}") from None


def _split(loaded: LoadedModel, name: Literal["test", "valid"]) -> TestSet:
    if name not in ("test", "valid"):
        raise UserError(
            f"unknown test set {name!r}: use test or valid, or give source and reference files"
        )
    sources, references = (
        loaded.manifest.split_text(name) if name in loaded.manifest.data.splits else ([], [])
    )
    if not sources:
        raise UserError(
            f"the corpus in {loaded.manifest.folder} has no {name} sentences: "
            "give source and reference files"
        )
    return TestSet(name=name, sources=sources, references=references)


def _score(
    run_dir: Path,
    loaded: LoadedModel,
    tested: TestSet,
    hypotheses: list[str],
    evaluation: EvaluationConfig,
    seconds: float,
) -> Result:
    bleu, chrf = BLEU(), CHRF()
    bleu_score = bleu.corpus_score(hypotheses, [tested.references])
    chrf_score = chrf.corpus_score(hypotheses, [tested.references])
    stem = f"{tested.name}-{loaded.label}"
    return Result(
        test_set=tested.name,
        checkpoint=loaded.label,
        step=loaded.step,
        averaged_steps=loaded.steps,
        num_sentences=len(hypotheses),
        bleu=float(bleu_score.score),
        signature=str(bleu.get_signature()),
        bleu_detail=str(bleu_score),
        chrf=float(chrf_score.score),
        chrf_signature=str(chrf.get_signature()),
        beam=evaluation.beam,
        length_penalty=evaluation.length_penalty,
        max_extra_length=evaluation.max_extra_length,
        batch_tokens=evaluation.batch_tokens,
        seconds=round(seconds, 3),
        sentences_per_second=round(len(hypotheses) / max(seconds, 1e-9), 2),
        hypotheses=f"{stem}.hypotheses.txt",
        source=str(tested.files[0]) if tested.files else None,
        reference=str(tested.files[1]) if tested.files else None,
        time=round(time.time(), 3),
        file=evaluation_dir(run_dir) / f"{stem}.json",
    )


def _write(run_dir: Path, result: Result, hypotheses: list[str]) -> None:
    result.file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{hypothesis}\n" for hypothesis in hypotheses)
    write_atomically(result.file.with_name(result.hypotheses), text)
    values = json.dumps(result.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
    write_atomically(result.file, values + "\n")
    events = EventLog(events_path(run_dir))
    try:
        events.write(
            "evaluated",
            test_set=result.test_set,
            checkpoint=result.checkpoint,
            step=result.step,
            bleu=result.bleu,
            chrf=result.chrf,
            signature=result.signature,
        )
    finally:
        events.close()


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    """Torch's CPU threads, for the time of the block."""
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
