"""Scores of a run's checkpoints, with all that is needed to compare or repeat the numbers.

A score without its signature is not comparable (Post 2018), so each is stored with it, together
with the settings of the search, the hypotheses, and a digest of all that decided them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer import breakdown, evaluation_metrics
from trainer.config import EvaluationConfig
from trainer.decoding_job import Decoder, Say, System, Translated, decode_here, translate_all
from trainer.events import EventLog
from trainer.frequency import training_words
from trainer.partial import remove_others
from trainer.run import evaluation_dir, events_path, read_config
from trainer.scores import Scores, score
from trainer.storage import write_atomically
from trainer.system_comparison import (
    check_languages,
    compare_systems,
    each_once,
    run_names,
    with_compared,
)
from trainer.test_sets import TestSet, is_reserved, open_test_sets, read_test_set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One evaluation; the fields of its JSON file, ``file`` aside.

    What has a default is missing in files of earlier versions.
    """

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
    seconds: float  # spent decoding, added up over all processes that decoded
    sentences_per_second: float  # of one process
    hypotheses: str  # the file's name, beside the JSON file
    source: str | None  # the user's own files; None for a test set that has a name
    reference: str | None
    time: float
    file: Path
    run: str | None = None
    ter: float | None = None
    ter_signature: str | None = None
    paper_bleu: float | None = None  # tokenised, compounds split: see trainer.scores.paper_bleu
    paper_signature: str | None = None
    paper_detail: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # the whole evaluation section
    ensemble: tuple[str, ...] = ()
    digest: str | None = None
    by_length: list[dict[str, Any]] = field(default_factory=list)
    by_frequency: list[dict[str, Any]] = field(default_factory=list)
    frequency_note: str | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None

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
            ensemble = tuple(values.pop("ensemble", ()))
            return cls(**values, averaged_steps=steps, ensemble=ensemble, file=file)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not an evaluation: {error}") from None


@dataclass(frozen=True)
class Evaluated:
    """A result with its sentences."""

    result: Result
    test_set: TestSet
    hypotheses: list[str]


def evaluate(
    run_dir: Path,
    *,
    checkpoint: str = "best",
    test_set: str = "test",
    source: Path | None = None,
    reference: Path | None = None,
    threads: int | None = None,
    device: str | torch.device | None = None,
    **settings: float | None,
) -> Result:
    """Translate one test set in this process and score it.

    Args:
        run_dir: the run's folder.
        checkpoint: best, last, average, average:N, ema or a step (see ``trainer.run.load_model``).
        test_set: a name; not used if ``source`` is given.
        source, reference: two files of the user's own, line by line parallel; both or neither.
        threads: CPU threads while decoding; by default as torch chose.
        device: where to decode; by default a GPU if there is one.
        settings: fields of the evaluation section, instead of the run's.

    Raises:
        UserError: no such run, checkpoint, test set or file; a setting out of range; source and
            reference of different length.
    """
    test_sets = find_test_sets(run_dir, [test_set], source=source, reference=reference)
    evaluation = override(read_config(run_dir).evaluation, **settings)
    decode = partial(decode_here, threads=threads, device=device)
    system = System(run_dir, checkpoint, evaluation)
    return evaluate_systems([system], test_sets, decode=decode)[0].result


def find_test_sets(
    run_dir: Path,
    names: Sequence[str],
    *,
    source: Path | None = None,
    reference: Path | None = None,
    mirror: str | None = None,
) -> list[TestSet]:
    """The user's own files, or the named test sets for the languages of the run's corpus.

    Raises:
        UserError: a file or a name that is not there, files that are not parallel.
    """
    if (source is None) != (reference is None):
        raise UserError("give both a source and a reference file, or neither")
    if source is not None and reference is not None:
        return [read_test_set(source, reference)]
    manifest = Manifest.load(read_config(run_dir).data.folder())
    return open_test_sets(names, manifest, mirror=mirror)


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


def evaluate_systems(
    systems: Sequence[System],
    test_sets: Sequence[TestSet],
    *,
    decode: Decoder,
    compared: Sequence[System] = (),
    say: Say = log.info,
) -> list[Evaluated]:
    """Translate every test set with every system and score it.

    Writes ``evaluation/<test set>-<checkpoint>.json`` and the hypotheses beside it into the folder
    of the systems' run, each whole or not at all, as soon as they are translated, and logs an
    ``evaluated`` event for each. What is translated lies in ``….partial.jsonl`` there until all is
    written, and a second call goes on with it.

    Args:
        systems: checkpoints of one run.
        test_sets: what to translate.
        decode: decodes batches, here or elsewhere.
        compared: systems, of this or of other runs, that each of ``systems`` is compared with.
            Nothing is written into their runs.
        say: takes lines for the person who watches.

    Returns:
        System by system, test set by test set.

    Raises:
        UserError: a system cannot be loaded or translates into another language; another process
            makes one of these evaluations.
        RunFailedError: decoding failed.
    """
    run_dir = systems[0].run_dir
    folder = evaluation_dir(run_dir)
    check_languages(systems[0], compared)
    compared = each_once(compared)
    names = run_names([systems[0], *compared])
    # The compared ones first: then each of the others can be written when it is translated.
    named = [(system, f"{names[system.run_dir.resolve()]}@") for system in compared]
    named += [(system, "") for system in systems]
    others: list[Translated] = []
    waiting: list[Translated] = []
    written: list[Translated] = []
    found: dict[tuple[int, int], Evaluated] = {}
    with closing(translate_all(named, test_sets, folder, decode=decode, say=say)) as translated:
        for item in translated:
            (others if item.number < len(compared) else waiting).append(item)
            complete, waiting = with_compared(waiting, others, len(compared))
            for own, beside in complete:
                evaluated = _evaluated(own, folder, compare_systems(own, beside, names, say))
                _write(run_dir, evaluated, say)
                _write_compared(evaluated.result, beside)
                written.append(own)
                found[own.number, _index(test_sets, own.test_set)] = evaluated
            if len(found) == len(systems) * len(test_sets):
                # Not before: after an interruption all is needed again. Not later: by then another
                # process may have it.
                _remove(others + written)
    return [found[key] for key in sorted(found)]


def _remove(translated: Sequence[Translated]) -> None:
    for item in translated:
        item.partial.remove()
        remove_others(item.partial.file)


def _reported(own: Translated, folder: Path) -> TestSet:
    """The test set under the name that it is reported by.

    A file of the user's may be named as a test set, or as another file whose result is there.
    """
    tested = own.test_set
    if tested.files is None:
        return tested
    taken = is_reserved(tested.stem)
    try:
        earlier = Result.read(_result_file(folder, tested.stem, own.label))
        taken |= (earlier.source, earlier.reference) != tuple(map(str, tested.files))
    except (OSError, ValueError):
        pass
    return replace(tested, name=tested.unique_stem) if taken else tested


def _result_file(folder: Path, stem: str, label: str) -> Path:
    return folder / f"{stem}-{label}.json"


def _evaluated(own: Translated, folder: Path, comparison: dict[str, Any] | None) -> Evaluated:
    tested, evaluation = _reported(own, folder), own.system.evaluation
    references = tested.reference_streams
    scores = score(own.hypotheses, references, target_language=own.manifest.target_language)
    result = Result(
        test_set=tested.name,
        checkpoint=own.label,
        step=own.step,
        averaged_steps=own.steps,
        num_sentences=len(own.hypotheses),
        **_score_fields(scores),
        beam=evaluation.beam,
        length_penalty=evaluation.length_penalty,
        max_extra_length=evaluation.max_extra_length,
        batch_tokens=evaluation.batch_tokens,
        seconds=round(own.seconds, 3),
        sentences_per_second=round(len(own.hypotheses) / max(own.seconds, 1e-9), 2),
        hypotheses=_hypotheses_name(tested.stem, own.label),
        source=str(tested.files[0]) if tested.files else None,
        reference=str(tested.files[1]) if tested.files else None,
        time=round(time.time(), 3),
        file=_result_file(folder, tested.stem, own.label),
        run=own.system.run_dir.resolve().name,
        settings=evaluation.model_dump(mode="json"),
        ensemble=own.system.ensemble,
        digest=own.digest,
        **_breakdown(own),
        comparison=comparison,
    )
    return Evaluated(result, tested, own.hypotheses)


def _score_fields(scores: Scores) -> dict[str, Any]:
    return {
        "bleu": scores.bleu.value,
        "signature": scores.bleu.signature,
        "bleu_detail": scores.bleu.detail,
        "chrf": scores.chrf.value,
        "chrf_signature": scores.chrf.signature,
        "ter": scores.ter.value,
        "ter_signature": scores.ter.signature,
        "paper_bleu": scores.paper_bleu.value,
        "paper_signature": scores.paper_bleu.signature,
        "paper_detail": scores.paper_bleu.detail,
    }


def _breakdown(own: Translated) -> dict[str, Any]:
    tested, references = own.test_set, own.test_set.reference_streams
    language = own.manifest.target_language
    by_length = breakdown.by_length(
        tested.sources, own.hypotheses, references, target_language=language
    )
    worst = breakdown.worst(tested.sources, own.hypotheses, references, target_language=language)
    try:
        seen = training_words(own.manifest)
        buckets = breakdown.by_frequency(own.hypotheses, tested.references, seen.counts)
        by_frequency, note = breakdown.as_rows(buckets), seen.note
    except UserError as error:  # the scores do not need the training text
        by_frequency, note = [], f"not counted: {error}"
    return {
        "by_length": breakdown.as_rows(by_length),
        "by_frequency": by_frequency,
        "frequency_note": note,
        "worst": breakdown.as_rows(worst),
    }


def _hypotheses_name(stem: str, name: str) -> str:
    return f"{stem}-{name}.hypotheses.txt"


def _index(test_sets: Sequence[TestSet], test_set: TestSet) -> int:
    return next(number for number, other in enumerate(test_sets) if other is test_set)


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    write_atomically(file, "".join(f"{line}\n" for line in lines))


def _write_compared(result: Result, others: Sequence[Translated]) -> None:
    """Translations of the systems that a result is compared with, beside it."""
    stem = result.test_set.replace("/", "-")
    for other in others:
        file = result.file.with_name(_hypotheses_name(stem, other.name))
        _write_lines(file, other.hypotheses)


def _tell_replaced(result: Result, say: Say) -> None:
    try:
        earlier = Result.read(result.file)
    except (OSError, ValueError):
        return
    changed = {
        name: value
        for name, value in earlier.settings.items()
        if name in result.settings and result.settings[name] != value
    }
    if changed:
        shown = ", ".join(f"{name} {value}" for name, value in changed.items())
        say(
            f"{result.file.name}: the earlier result ({shown}, BLEU {earlier.bleu:.2f}) is replaced"
        )


def _write(run_dir: Path, evaluated: Evaluated, say: Say) -> None:
    result = evaluated.result
    _tell_replaced(result, say)
    _write_lines(result.file.with_name(result.hypotheses), evaluated.hypotheses)
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
            ter=result.ter,
            paper_bleu=result.paper_bleu,
            signature=result.signature,
        )
    finally:
        events.close()
    name = run_dir.resolve().name
    evaluation_metrics.write(evaluation_dir(run_dir), name, read_results(run_dir))


def read_results(run_dir: Path) -> list[Result]:
    """The results in the run's evaluation folder, oldest first, without unreadable ones."""
    results = []
    for file in sorted(evaluation_dir(run_dir).glob("*.json")):
        try:
            results.append(Result.read(file))
        except (OSError, ValueError) as error:
            log.warning("evaluation passed over: %s: %s", file, error)
    return sorted(results, key=lambda result: result.time)
