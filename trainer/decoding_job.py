"""Test sets translated batch by batch, by whatever decodes; finished batches survive any end.

The batches of a test set are fixed by its text, the vocabulary and ``evaluation.batch_tokens``, and
each is decoded by itself. So it does not matter how many processes decode them, in which order, or
how often they were interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from data_shards.errors import RunFailedError, UserError
from data_shards.manifest import Manifest, file_sha256
from trainer.config import EvaluationConfig
from trainer.ensemble import load_ensemble
from trainer.partial import PartialResult, others, partial_file
from trainer.run import LoadedModel
from trainer.test_sets import TestSet
from trainer.translate import Translator

_PROGRESS_S = 5.0

_translate_log = logging.getLogger("trainer.translate")

Say = Callable[[str], None]


@dataclass(frozen=True)
class System:
    """What translates: a run's checkpoint, perhaps an ensemble with others, and how it searches.

    Attributes:
        run_dir: the run's folder, which all that decode must reach.
        checkpoint: as ``trainer.run.load_model`` takes it.
        ensemble: the other members, ``RUN`` or ``RUN@CHECKPOINT``.
        runs: the folder of the runs that ``ensemble`` names.
        evaluation: settings of the search.
        identity: of the weights, vocabulary and settings that it must turn out to have; None
            before that is known.
    """

    run_dir: Path
    checkpoint: str
    evaluation: EvaluationConfig
    ensemble: tuple[str, ...] = ()
    runs: Path = Path("runs")
    identity: str | None = None

    def load(self, device: str | torch.device) -> list[LoadedModel]:
        """The members, the named checkpoint first.

        Raises:
            UserError: no such run or checkpoint, a damaged file, members of different vocabularies.
            RunFailedError: by now the checkpoint's name stands for another one.
        """
        members = load_ensemble(
            self.run_dir, self.checkpoint, self.ensemble, runs=self.runs, device=device
        )
        if self.identity not in (None, _identity(members, self.evaluation)):
            raise RunFailedError(
                f"{self.run_dir.name} went on training, and its checkpoint {self.checkpoint} is "
                "another one now: evaluate it again, or give a step"
            )
        return members


@dataclass(frozen=True)
class Batch:
    """Sentences that are decoded together: which system's, which of its batches."""

    system: int
    job: int
    number: int
    indices: list[int]
    lines: list[str]


@dataclass(frozen=True)
class Decoded:
    """A batch's hypotheses, in the batch's order, and the seconds that decoding took."""

    job: int
    number: int
    hypotheses: list[str]
    seconds: float


# Decodes batches in any order. Closing the iterator ends whatever decodes.
Decoder = Callable[[Sequence[System], Sequence[Batch]], Generator[Decoded, None, None]]


@dataclass(frozen=True)
class _Pairing:
    """A test set and a system that translates it.

    Attributes:
        number: of the system, from 0.
        name: of the system among others: its prefix and label, fit for a file name.
        label: the checkpoint (and what was ensembled with it), fit for a file name.
        steps: of the checkpoints whose mean the first member is.
        digest: of all that decides the hypotheses.
    """

    number: int
    name: str
    system: System
    test_set: TestSet
    manifest: Manifest
    label: str
    step: int
    steps: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Translated(_Pairing):
    """A test set as a system translated it.

    Attributes:
        seconds: spent decoding, added up over all that decoded.
        partial: holds the hypotheses until the result is written.
    """

    hypotheses: list[str]
    seconds: float
    partial: PartialResult


class BatchDecoder:
    """Decodes the batches of any of the systems; holds the model that was last needed.

    Batches should therefore come system by system.
    """

    def __init__(self, systems: Sequence[System], device: str | torch.device) -> None:
        self._systems = systems
        self._device = device
        self._held: int | None = None
        self._translator: Translator | None = None

    def __call__(self, batch: Batch) -> Decoded:
        """Translate one batch."""
        if self._translator is None or self._held != batch.system:
            self._translator = None  # the memory is needed for the next
            system = self._systems[batch.system]
            self._translator = Translator(system.load(self._device), system.evaluation)
            self._held = batch.system
        start = time.perf_counter()
        found = self._translator.translate(batch.lines, keys=batch.indices)
        seconds = time.perf_counter() - start
        return Decoded(
            batch.job, batch.number, [translations[0].text for translations in found], seconds
        )


def decode_here(
    systems: Sequence[System],
    batches: Sequence[Batch],
    *,
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> Generator[Decoded, None, None]:
    """Decode in this process.

    Args:
        systems, batches: what to decode.
        threads: CPU threads while decoding; by default as torch chose.
        device: by default a GPU if there is one.

    Raises:
        RunFailedError: the memory does not suffice.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = BatchDecoder(systems, device)
    try:
        with _threads(threads), _without_warnings():
            yield from map(decoder, batches)
    except torch.OutOfMemoryError:
        raise out_of_memory() from None


def out_of_memory() -> RunFailedError:
    """The one mend."""
    return RunFailedError(
        "decoding ran out of memory: lower evaluation.batch_tokens or evaluation.beam"
    )


def translate_all(
    systems: Sequence[tuple[System, str]],
    test_sets: Sequence[TestSet],
    folder: Path,
    *,
    decode: Decoder,
    say: Say,
) -> Generator[Translated, None, None]:
    """Translate every test set with every system; what an earlier attempt finished is kept.

    No other process can have a partial result until the generator ends.

    Args:
        systems: each with a prefix for the names of its files, empty for the run's own.
        test_sets: what to translate.
        folder: where partial results lie.
        decode: decodes the batches that are missing.
        say: takes lines for the person who watches.

    Yields:
        One for each system and test set as soon as it is whole, about system by system.

    Raises:
        UserError: a system cannot be loaded; another process makes one of these evaluations; they
            are more than this process may have open files.
        RunFailedError: decoding failed.
    """
    jobs = [
        job
        for number, (system, prefix) in enumerate(systems)
        for job in _jobs(number, system, test_sets, folder, prefix, say)
    ]
    with ExitStack() as stack:
        partials = _open_partials(jobs, stack)
        for job, partial in zip(jobs, partials, strict=True):
            _tell_found(job, partial, say)
        for job, partial in zip(jobs, partials, strict=True):
            if job.is_whole(partial):
                yield job.translated(partial)
        missing = [
            Batch(job.number, index, number, indices, [job.test_set.sources[i] for i in indices])
            for index, (job, partial) in enumerate(zip(jobs, partials, strict=True))
            for number, indices in enumerate(job.batches)
            if number not in partial.batches
        ]
        if missing:
            sentences = sum(len(batch.lines) for batch in missing)
            say(f"translating {sentences:,} sentences in {len(missing):,} batches")
            pinned = {job.number: job.system for job in jobs}
            systems_of = [pinned[number] for number in sorted(pinned)]
            for index in _decode(decode, systems_of, missing, partials, say):
                if jobs[index].is_whole(partials[index]):
                    yield jobs[index].translated(partials[index])


@dataclass(frozen=True)
class _Job(_Pairing):
    """One test set for one system, ready to be decoded."""

    batches: list[list[int]]
    partial: Path

    def is_whole(self, partial: PartialResult) -> bool:
        return len(partial.batches) == len(self.batches)

    def translated(self, partial: PartialResult) -> Translated:
        # A line without a single piece is in no batch: its translation is as empty.
        hypotheses = [""] * len(self.test_set.sources)
        for number, indices in enumerate(self.batches):
            for index, text in zip(indices, partial.batches[number], strict=True):
                hypotheses[index] = text
        pairing = {field.name: getattr(self, field.name) for field in fields(_Pairing)}
        return Translated(
            **pairing, hypotheses=hypotheses, seconds=partial.seconds, partial=partial
        )


def _jobs(
    number: int,
    system: System,
    test_sets: Sequence[TestSet],
    folder: Path,
    prefix: str,
    say: Say,
) -> list[_Job]:
    """Load the system once, so that whatever is wrong with it is told before anything is begun."""
    members = system.load("cpu")
    first = members[0]
    identity = _identity(members, system.evaluation)
    if system.checkpoint in ("best", "last") and not system.ensemble:
        system = replace(system, checkpoint=str(first.step))  # a run may be training on
    system = replace(system, identity=identity)
    label = "+".join([first.label, *(_label(other) for other in system.ensemble)])
    translator = Translator(members, system.evaluation)
    longest = min(member.config.model.max_positions for member in members) - 1
    for test_set in test_sets:
        _tell_cut(test_set, label, first, longest, say)
    digests = [
        hashlib.sha256(f"{identity} {test_set.sha256()}".encode()).hexdigest()
        for test_set in test_sets
    ]
    return [
        _Job(
            number=number,
            name=f"{prefix}{label}",
            system=system,
            test_set=test_set,
            manifest=first.manifest,
            label=label,
            step=first.step,
            steps=first.steps,
            digest=digest,
            batches=translator.batches(test_set.sources),
            partial=partial_file(folder, f"{test_set.unique_stem}-{prefix}{label}", digest),
        )
        for test_set, digest in zip(test_sets, digests, strict=True)
    ]


def _label(other: str) -> str:
    return other.replace("@", "-").replace(":", "-").replace("/", "-").strip("-")


def _identity(members: Sequence[LoadedModel], evaluation: EvaluationConfig) -> str:
    """Of the weights as they were read (averaged or not), the vocabulary and all settings."""
    digest = hashlib.sha256(evaluation.model_dump_json().encode())
    for member in members:
        digest.update(member.config.model.model_dump_json().encode())
        digest.update(file_sha256(member.manifest.vocabulary_path).encode())
        for name, tensor in sorted(member.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tell_cut(test_set: TestSet, label: str, loaded: LoadedModel, longest: int, say: Say) -> None:
    pieces = loaded.vocabulary.encode(test_set.sources)
    lines = [number for number, ids in enumerate(pieces, start=1) if len(ids) > longest]
    if lines:
        shown = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        say(
            f"{test_set.name}, checkpoint {label}: {len(lines)} sentences are longer than the "
            f"{longest} pieces that the model takes (model.max_positions), and are cut: line "
            f"{shown}"
        )


def _open_partials(jobs: Sequence[_Job], stack: ExitStack) -> list[PartialResult]:
    try:
        return [stack.enter_context(PartialResult(job.partial, job.digest)) for job in jobs]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UserError(
            f"{len(jobs)} evaluations in one go are more than this process may have open files: "
            "give fewer checkpoints or test sets, or raise the limit (ulimit -n)"
        ) from None


def _tell_found(job: _Job, partial: PartialResult, say: Say) -> None:
    what = f"{job.test_set.name}, checkpoint {job.label}"
    if partial.batches:
        say(
            f"{what}: going on after an interruption, {len(partial.batches)} of "
            f"{len(job.batches)} batches are there"
        )
    elif others(job.partial):
        say(
            f"{what}: what an interrupted evaluation left is of another model, test set or "
            "setting: it is not used"
        )


def _decode(
    decode: Decoder,
    systems: Sequence[System],
    missing: Sequence[Batch],
    partials: Sequence[PartialResult],
    say: Say,
) -> Generator[int, None, None]:
    """Decode and keep the batches that are missing; of each the index of its job."""
    num_sentences, done = sum(len(batch.lines) for batch in missing), 0
    last: float | None = None  # what decodes takes a while to start
    with closing(decode(systems, missing)) as results:
        for decoded in results:
            partials[decoded.job].add(decoded.number, decoded.hypotheses, decoded.seconds)
            done += len(decoded.hypotheses)
            last = last or time.monotonic()
            if time.monotonic() - last >= _PROGRESS_S:
                last = time.monotonic()
                say(f"{done:,} of {num_sentences:,} sentences translated")
            yield decoded.job


@contextmanager
def _without_warnings() -> Generator[None, None, None]:
    """Those of translating count lines in a batch; what is cut has been told by then."""
    disabled, _translate_log.disabled = _translate_log.disabled, True
    try:
        yield
    finally:
        _translate_log.disabled = disabled


@contextmanager
def _threads(num_threads: int | None) -> Generator[None, None, None]:
    """Torch's CPU threads, for the time of the block."""
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
