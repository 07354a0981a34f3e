"""Every Prometheus metric of babelray is declared here; ``docs/metrics.md`` is made of it.

Several processes of a machine tell about a run: the run's first rank what holds for all of it
(``RunMetrics``), each rank what it does itself (``RankMetrics``), their server that they are there
(``ServerMetrics``). Each writes its values into files that it maps into memory (prometheus_client's
multiprocess mode), and one process of the machine serves what lies in all of them
(``cluster.exporter``). A write is a store to memory: no lock, no connection, nothing to wait for.

Files are named by a slot, not by a process id: a rank that takes a dead one's place in the slot
counts on from where that one was, and files do not grow in number. Counters, histograms and the
times of events outlive the rank that wrote them. Its other gauges are removed with it: what a dead
rank saw last says nothing of now.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.multiprocess import mark_process_dead

from trainer.guard import Reason
from trainer.phases import PHASES

PREFIX = "babelray_"

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client looks for the folder

# Of each file; several times what a process' metrics of one kind take.
_FILE_BYTES = 128 * 1024

_STEP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PHASE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
_LONG_BUCKETS_S = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)

# Why ranks are started anew: what cluster.recovery tells apart, or a planned change of number.
Cause = Literal["killed", "hung", "exception", "preempted", "start", "controller", "resized"]
CAUSES: tuple[Cause, ...] = get_args(Cause)

Kind = Literal["counter", "gauge", "histogram"]

# In a slot's folder: the run has ended as it should, and nobody needs to look for it.
ENDED = "ended"


@dataclass(frozen=True)
class Declared:
    """A metric: its full name as a query names it (a histogram's without ``_bucket`` and such)."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


# Told by another run's server on the machine, about one that cannot tell any more.
RUN_LOST = Declared(
    f"{PREFIX}run_lost",
    "gauge",
    "1 for an hour after a run's server on this machine ended while the run had not: it was given "
    "up or killed. Absent where no other run is served there: then the target is down.",
    ("run",),
)


class Slot:
    """Where a process keeps its values: files in ``folder`` that no other process writes.

    Args:
        name: without an underscore, and unique in the folder as long as the process lives.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._value_class: Any = None

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Metrics made in the block keep their values here.

        Raises:
            OSError: there is no room for them.
        """
        if self._value_class is None:
            self._reserve()
            # One for all of the process, since each keeps a place of its own to append at.
            self._value_class = values.MultiProcessValue(lambda: self.name)  # type: ignore[no-untyped-call]
        before, folder = values.ValueClass, os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(self.folder)
        values.ValueClass = self._value_class
        try:
            yield
        finally:
            values.ValueClass = before
            if folder is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = folder

    def _reserve(self) -> None:
        """Have the disk give its blocks now: a store to one that it has not ends the process."""
        for kind in ("counter", "histogram", "gauge_mostrecent", "gauge_livemostrecent"):
            file = self.folder / f"{kind}_{self.name}.db"
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _allocate(descriptor)
            except OSError:
                file.unlink()
                raise
            finally:
                os.close(descriptor)

    def end(self) -> None:
        """Say that the run has ended as it should."""
        (self.folder / ENDED).touch()

    def vacate(self) -> None:
        """Remove what only a live process can say; it has ended."""
        mark_process_dead(self.name, str(self.folder))  # type: ignore[no-untyped-call]


def _allocate(descriptor: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, _FILE_BYTES)
        return
    size = os.fstat(descriptor).st_size
    if size < _FILE_BYTES:
        os.pwrite(descriptor, bytes(_FILE_BYTES - size), size)


class _Family:
    """Metrics of one run that one process writes.

    Args:
        run: the run's name, a label of every metric.
        slot: where the values are kept; None keeps them in this process, in ``registry``.

    Raises:
        OSError: there is no room for the values.
    """

    def __init__(self, run: str, slot: Slot | None = None) -> None:
        self.run = run
        self.declared: list[Declared] = []
        self.registry = CollectorRegistry() if slot is None else None
        self._slot = slot
        with self._stored():
            self._declare()

    def _declare(self) -> None:
        raise NotImplementedError

    def _stored(self) -> AbstractContextManager[None]:
        return nullcontext() if self._slot is None else self._slot.stored()

    def _note(self, name: str, kind: Kind, text: str, labels: Sequence[str]) -> None:
        self.declared.append(Declared(PREFIX + name, kind, text, ("run", *labels)))

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        self._note(f"{name}_total", "counter", text, labels)
        made = Counter(PREFIX + name, text, ["run", *labels], registry=self.registry)
        return made if labels else made.labels(self.run)

    def _restarts(self) -> dict[Cause, Counter]:
        restarts = self._counter(
            "restarts", "Starts of the ranks anew, by what made them.", ["cause"]
        )
        return {cause: restarts.labels(self.run, cause) for cause in CAUSES}

    def _gauge(
        self, name: str, text: str, labels: Sequence[str] = (), *, lasting: bool = False
    ) -> Gauge:
        """``lasting``: stays when the process that set it has ended."""
        self._note(name, "gauge", text, labels)
        made = Gauge(
            PREFIX + name,
            text,
            ["run", *labels],
            registry=self.registry,
            multiprocess_mode="mostrecent" if lasting else "livemostrecent",
        )
        return made if labels else made.labels(self.run)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        self._note(name, "histogram", text, labels)
        made = Histogram(
            PREFIX + name, text, ["run", *labels], registry=self.registry, buckets=buckets
        )
        return made if labels else made.labels(self.run)


class RunMetrics(_Family):
    """Of the run as a whole; written by its first rank."""

    def _declare(self) -> None:
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        # What was done. Steps that are done again after a failure count again.
        self.steps = counter("steps", "Optimizer updates made.")
        self.target_tokens = counter(
            "target_tokens", "Target tokens consumed, end signs included, padding not."
        )
        self.source_tokens = counter(
            "source_tokens", "Source tokens consumed, end signs included, padding not."
        )
        self.samples = counter("samples", "Sentence pairs consumed.")
        self.flops = counter(
            "flops",
            "Floating-point operations of the model, forward and backward, padding not counted.",
        )
        self._energy = counter(
            "energy_joules",
            "Energy that the machines' GPUs and CPU packages took while training, as far as they "
            "tell it; absent where they do not.",
            ["source"],
        )
        self._energy_of: dict[str, Counter] = {}
        # How fast.
        self.step_seconds = histogram("step_seconds", "Wall time of a step.", _STEP_BUCKETS_S)
        self.tokens_per_second = gauge(
            "tokens_per_second", "Source and target tokens a second since the last logged step."
        )
        self.mfu = gauge(
            "mfu_ratio",
            "Model FLOPs utilisation: operations a second since the last logged step, over "
            "babelray_peak_flops.",
        )
        self.peak_flops = gauge(
            "peak_flops",
            "Operations a second that all devices together could make: from the data sheet, or "
            "measured with a matrix product (a CPU), or as configured.",
        )
        self.padding_efficiency = gauge(
            "padding_efficiency_ratio",
            "Real tokens over tokens computed on, padding included, since the last logged step.",
        )
        self.slowest_rank = gauge(
            "slowest_rank", "Rank that needed the most time of its own a token."
        )
        self.rank_skew = gauge(
            "rank_skew_ratio",
            "Time of its own a token that the slowest rank needed, over the median rank's; 1 is "
            "even. Since the last logged step.",
        )
        # How well.
        self.loss = gauge(
            "loss_nats",
            "Training loss a target token, label-smoothed, over the updates since the last logged "
            "step.",
        )
        self.nll = gauge("nll_nats", "The same without smoothing: negative log-likelihood.")
        self.valid_nll = gauge(
            "valid_nll_nats",
            "Negative log-likelihood a target token on the validation set.",
        )
        self.best_valid_nll = gauge(
            "best_valid_nll_nats", "The lowest babelray_valid_nll_nats so far."
        )
        self.stale_validations = gauge(
            "stale_validations", "Validations of the loss since the best one."
        )
        self.valid_bleu = gauge(
            "valid_bleu",
            "BLEU of the newest checkpoint scored on the validation set; absent without "
            "trainer.bleu_every.",
        )
        self.learning_rate = gauge("learning_rate", "Learning rate of the last logged update.")
        self.grad_norm = gauge("grad_norm", "Gradient norm before clipping.")
        self.loss_scale = gauge("loss_scale", "Factor of the loss in fp16; 1 in other precisions.")
        # Where it stands.
        self.world_size = gauge("world_size", "Workers that train.")
        self.epoch = gauge("epoch", "Epochs finished.")
        self.position = gauge(
            "position_steps", "Position in the data: steps consumed, trained on or not."
        )
        self.steps_per_epoch = gauge("steps_per_epoch", "Steps of one pass over the corpus.")
        self.data_hash = gauge(
            "data_hash",
            "Rolling hash of the consumed pair ids: its lower 48 bits, which a float holds "
            "exactly; data_hash in events.jsonl has all 64.",
        )
        self.validating = gauge("validating", "1 while the run validates, else 0.")
        self.last_step_time = gauge(
            "last_step_timestamp_seconds", "Unix time of the last step.", lasting=True
        )
        # Checkpoints.
        self.last_checkpoint_time = gauge(
            "last_checkpoint_timestamp_seconds",
            "Unix time of the last committed checkpoint.",
            lasting=True,
        )
        self.last_checkpoint_step = gauge(
            "last_checkpoint_step",
            "Step of the last committed checkpoint, or of the one that the ranks started from.",
        )
        self.last_checkpoint_size = gauge(
            "last_checkpoint_size_bytes", "Size of the last committed checkpoint.", lasting=True
        )
        self.checkpoint_interval = gauge(
            "checkpoint_interval_steps", "trainer.checkpoint_every: steps between checkpoints."
        )
        self.checkpoint_seconds = histogram(
            "checkpoint_seconds",
            "From the copy of the state to the commit; training goes on meanwhile.",
            _LONG_BUCKETS_S,
        )
        self.checkpoint_stall_seconds = counter(
            "checkpoint_stall_seconds", "Time that training stood still for checkpoints."
        )
        self.checkpoint_failures = counter(
            "checkpoint_failures", "Checkpoints that could not be written; each is tried again."
        )
        self.validation_seconds = histogram(
            "validation_seconds", "Wall time of a validation of the loss.", _LONG_BUCKETS_S
        )
        # What went wrong.
        skipped = counter(
            "skipped_steps", "Steps not trained on, because their numbers went wrong.", ["reason"]
        )
        self.skipped_steps = {
            reason: skipped.labels(self.run, reason) for reason in get_args(Reason)
        }
        self.rewinds = counter("rewinds", "Returns to the weights of an earlier checkpoint.")
        self.restarts = self._restarts()
        recovery = histogram(
            "recovery_seconds", "From a failure to the next update.", _LONG_BUCKETS_S, ["cause"]
        )
        self.recovery_seconds = {cause: recovery.labels(self.run, cause) for cause in CAUSES}
        # What it is.
        self._run_info = gauge(
            "run_info",
            "1; the labels say what is trained.",
            [
                "corpus",
                "source",
                "target",
                "model",
                "parameters",
                "precision",
                "zero_stage",
                "seed",
            ],
        )
        self._data_info = gauge(
            "data_info", "1; the label says which data: the manifest's sha256.", ["manifest_sha256"]
        )
        self._build_info = gauge(
            "build_info",
            "1; the labels say with which versions.",
            ["version", "python", "torch", "deepspeed", "ray"],
        )

    def add_energy(self, source: str, joules: float) -> None:
        """Count energy; ``source`` is one of ``trainer.energy.SOURCES``."""
        if source not in self._energy_of:
            with self._stored():
                self._energy_of[source] = self._energy.labels(self.run, source)
        self._energy_of[source].inc(joules)

    def describe(self, *, run: dict[str, str], manifest_sha256: str, build: dict[str, str]) -> None:
        """Set the three ``_info`` metrics; ``run`` and ``build`` by their labels."""
        with self._stored():
            self._run_info.labels(run=self.run, **run).set(1)
            self._data_info.labels(run=self.run, manifest_sha256=manifest_sha256).set(1)
            self._build_info.labels(run=self.run, **build).set(1)


class RankMetrics(_Family):
    """Of one rank; each rank writes its own."""

    def __init__(self, run: str, rank: int, slot: Slot | None = None) -> None:
        self._rank = str(rank)
        super().__init__(run, slot)

    def _declare(self) -> None:
        phases = self._histogram(
            "step_phase_seconds",
            "Part of a step by what a rank spent it on, a sample for each rank and step. Forward "
            "includes the vocabulary's gradients, which the fused loss computes at once. "
            "Communication includes waiting for slower ranks; on a GPU, data_wait is what the "
            "device stood idle for.",
            _PHASE_BUCKETS_S,
            ["phase"],
        )
        self.phases = {phase: phases.labels(self.run, phase) for phase in PHASES}
        busy = self._gauge(
            "rank_busy_seconds",
            "Mean time of a step that a rank spent on its own, not waiting for other ranks or a "
            "checkpoint, since the last logged step.",
            ["rank"],
        )
        self.busy = busy.labels(self.run, self._rank)
        self._memory = self._gauge(
            "gpu_memory_bytes",
            "GPU memory of a rank, by kind: allocated to tensors, reserved by PyTorch, peak "
            "allocation so far. Absent on a CPU.",
            ["rank", "kind"],
        )
        self._memory_of: dict[str, Gauge] = {}

    def set_memory(self, *, allocated: int, reserved: int, peak: int) -> None:
        """GPU memory, bytes."""
        if not self._memory_of:
            with self._stored():
                self._memory_of = {
                    kind: self._memory.labels(self.run, self._rank, kind)
                    for kind in ("allocated", "reserved", "peak")
                }
        self._memory_of["allocated"].set(allocated)
        self._memory_of["reserved"].set(reserved)
        self._memory_of["peak"].set(peak)


class ServerMetrics(_Family):
    """Of a run on one machine; written by the server that starts its ranks."""

    def _declare(self) -> None:
        self.started = self._gauge(
            "run_started_timestamp_seconds", "Unix time of the command that started or resumed it."
        )
        self.live_ranks = self._gauge("live_ranks", "Ranks of the run that live on this machine.")
        # Zeros: the first rank counts a restart as soon as it is there, and an increase is seen
        # only from a value that was there before. The exporter adds up.
        self._restarts()


# Of one result of ``babelray evaluate``: suffix of the metric, field of the result, what it is.
EVALUATION_GAUGES = (
    ("bleu", "bleu", "sacreBLEU's BLEU, 0 to 100."),
    ("paper_bleu", "paper_bleu", "Tokenised, compound-split BLEU, 0 to 100."),
    ("chrf", "chrf", "chrF, 0 to 100."),
    ("ter", "ter", "Translation edit rate, from 0; lower is better."),
    ("step", "step", "Step of the checkpoint."),
    ("sentences", "num_sentences", "Sentences of the test set."),
    ("decoding_seconds", "seconds", "Time spent decoding, over all processes."),
    ("timestamp_seconds", "time", "Unix time of the evaluation."),
)
EVALUATION_LABELS = ("run", "test_set", "checkpoint")


def declared_evaluation() -> list[Declared]:
    """What ``babelray evaluate`` leaves for a collector of text files, or pushes."""
    return [
        Declared(f"{PREFIX}evaluation_{suffix}", "gauge", text, EVALUATION_LABELS)
        for suffix, _, text in EVALUATION_GAUGES
    ]


def declared() -> list[Declared]:
    """Every metric that a training run serves."""
    families = (RunMetrics("run"), RankMetrics("run", 0), ServerMetrics("run"))
    return list(
        dict.fromkeys([*(metric for each in families for metric in each.declared), RUN_LOST])
    )
