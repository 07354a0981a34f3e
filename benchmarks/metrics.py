"""What watching a run costs: the trainer's loop with its metrics, and without any, in turns.

    python benchmarks/metrics.py           # prints a table, writes benchmarks/results/metrics.json

  watched    as ``babelray train`` does it: phases of every step, work, skew and energy of all
             ranks, metrics in mapped files, served, and scraped every 5 seconds. The server and the
             scraper are threads of the same process, so that their time counts, too.
  unwatched  the same loop with none of these (what the stream sums up of its batches' lengths, and
             the wrappers around DeepSpeed's collectives, stay)

Both log events every 50 steps, which is the default. Rates are real source and target tokens per
second of processor time, in one thread. Turns of the same contestant vary by more than the watching
costs, so what it does at a step is also timed by itself, 2,000 times over.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import (
    ALLOCATOR,
    RESULTS,
    Meter,
    Worker,
    corpus_config,
    default_corpora,
    machine,
    one_rank,
    rates,
    ratios,
    row,
    take_turns,
    uninterrupted,
    write_result,
)
from train import run_config

from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig, TrainerConfig
from trainer.measures import Measured

GOAL = 0.99
_SCRAPE_S = 5.0


class _NoPhases:
    """Takes the place of the clock."""

    annotate = False

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def lap(self) -> None:
        return None

    def restart(self) -> None:
        pass


class _NoMeasures:
    """Takes the place of what ranks measure."""

    size = 0

    def pack(self, *_: object, **__: object) -> list[float]:
        return []

    def unpack(self, _: object) -> Measured:
        return Measured(computed_tokens=1.0)


def train(run_dir: Path, meter: Meter, *, watched: bool) -> None:
    """Train on and on; the meter stops it between turns."""
    from trainer.events import EventLog
    from trainer.loop import Loop
    from trainer.metrics import RankMetrics, RunMetrics, Slot
    from trainer.rank import Rank
    from trainer.reporter import Update, Voices

    one_rank(run_dir)
    rank = Rank(run_config(run_dir), run_dir, rank=0, world_size=1, local_rank=0)
    rank.prepare()
    events = EventLog(run_dir / "events.jsonl")
    with _served() if watched else nullcontext() as slot:
        if isinstance(slot, Slot):
            voices = Voices(
                events, RunMetrics(run_dir.name, slot), RankMetrics(run_dir.name, 0, slot)
            )
        else:
            voices = Voices(events)
            rank.phases = _NoPhases()  # type: ignore[assignment]
        loop = Loop(rank, voices)
        if not watched:
            loop.measures = _NoMeasures()  # type: ignore[assignment]
        tell = loop.reporter.stepped

        def stepped(update: Update) -> None:
            tell(update)
            step = rank.state.step - 1
            meter.stepped(rank.plan.source_tokens(step) + rank.plan.target_tokens(step))

        loop.reporter.stepped = stepped  # type: ignore[method-assign]
        meter.start()
        loop.run()


@contextlib.contextmanager
def _served() -> Iterator[object]:
    """A slot whose content is served and scraped."""
    from cluster.exporter import Exporter, Shelf, Target

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    shelf = Shelf(Target("benchmark", "127.0.0.1", port, time.time()))
    Exporter("127.0.0.1", port)
    threading.Thread(target=_scrape, args=(port,), daemon=True).start()
    with shelf.slot() as slot:
        yield slot


def _scrape(port: int) -> None:
    while True:
        time.sleep(_SCRAPE_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"babelray_steps_total" in answer.read()


def seconds_a_step(folder: Path) -> float:
    """Processor time of what is done more at a watched step of two lanes; nothing is trained."""
    import torch

    from data_shards.stream import Batch
    from trainer.energy import EnergyMeter
    from trainer.events import EventLog
    from trainer.machine import Rates
    from trainer.measures import Measures
    from trainer.metrics import RankMetrics, RunMetrics, Slot
    from trainer.phases import Phases
    from trainer.reporter import Reporter, Update, Voices
    from trainer.state import TrainState

    cpu, state = torch.device("cpu"), TrainState()
    slot = Slot(folder, "rank0")
    voices = Voices(
        EventLog(folder / "events.jsonl"), RunMetrics("timed", slot), RankMetrics("timed", 0, slot)
    )
    plan: Any = SimpleNamespace(
        source_tokens=lambda step: 3600, target_tokens=lambda step: 3900,
        num_pairs=lambda step: 250, locate=lambda step: (0, step), steps_per_epoch=120,
    )  # fmt: skip
    reporter = Reporter(
        RunConfig(), plan, state, world_size=2, device=cpu,
        rates=Rates(1e12, "measured", 1e12), voices=voices,
    )  # fmt: skip
    measures = Measures(
        ModelConfig(preset="tiny"), vocab_size=8000, rank=0, world_size=2,
        energy=EnergyMeter(cpu, local_rank=0), energy_every=50, stragglers=True,
    )  # fmt: skip
    ids = torch.zeros(125, 16, dtype=torch.int64)
    batch = Batch(
        source_BS=ids, target_in_BT=ids, target_out_BT=ids, lane=0, num_pairs=125,
        num_source_tokens=1800, num_target_tokens=1950, length_products=(26_000, 28_000, 30_000),
        data_hash=0,
    )  # fmt: skip
    phases, lap, num = Phases(cpu), None, 2000
    began = time.process_time()
    for _ in range(num):
        for phase in ("data_wait", "forward", "backward", "forward", "backward", "communication"):
            with phases(phase):
                pass
        for phase in ("optimizer", "communication", "communication", "checkpoint"):
            with phases(phase):
                pass
        measured = measures.unpack(measures.pack(state.step, [batch, batch], lap))
        state.step += 1
        state.elapsed_s += 0.5
        reporter.stepped(Update(7800.0, 7000.0, 1e-3, 0.5, 1.0, measured, lap))
        lap = phases.lap()
    return (time.process_time() - began) / num


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "metrics.json")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds a turn")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, run_dir = arguments.worker
        train(Path(run_dir), Meter(), watched=kind == "watched")
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        data = corpus_config(
            arguments.corpora,
            Path(folder),
            vocabulary_size=8000,
            tokens_per_step=4096,
            lanes=2,
            max_length=128,
        )
        prepare(data)
        workers = []
        for kind in ("watched", "unwatched"):
            trainer = uninterrupted(
                precision="bf16",
                log_every=TrainerConfig().log_every,
                stragglers=kind == "watched",
            )
            config = RunConfig(
                model=ModelConfig(preset=arguments.preset), data=data, trainer=trainer
            )
            run_dir = Path(folder) / kind
            run_dir.mkdir()
            (run_dir / "config.json").write_text(config.to_json())
            workers.append(Worker(kind, kind, run_dir, environment=ALLOCATOR))
        try:
            turns = take_turns(
                workers, rounds=arguments.rounds, seconds=arguments.seconds, say=print
            )
        finally:
            for worker in workers:
                worker.close()
    with tempfile.TemporaryDirectory() as folder:
        own_s = seconds_a_step(Path(folder))
    step_s = statistics.median(turn.cpu_s / turn.steps for turn in turns[0])
    watched, unwatched = (rates(own) for own in turns)
    ratio = ratios(*turns)
    print(f"{arguments.preset}, bf16, one thread, tokens per CPU-second:")
    for kind, rate in (("watched", watched), ("unwatched", unwatched)):
        print(f"  {kind:9} {rate.median:10,.0f}  ({rate.lowest:,.0f} to {rate.highest:,.0f})")
    print(
        f"  ratio     {ratio.median:10.4f}  ({ratio.lowest:.4f} to {ratio.highest:.4f}), "
        f"goal {GOAL} (load {before['load_average']:.1f})"
    )
    print(
        f"  by itself {1e6 * own_s:10,.0f} microseconds of a step's {1e3 * step_s:,.0f} ms: "
        f"{100 * own_s / step_s:.2f} %"
    )
    write_result(
        arguments.output,
        before,
        {
            "goal_ratio": GOAL,
            "preset": arguments.preset,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "ratio": asdict(ratio),
            "watching_s_a_step": own_s,
            "cpu_s_a_step": step_s,
            "tokens_per_cpu_s": {"watched": asdict(watched), "unwatched": asdict(unwatched)},
            "turns": {
                kind: [asdict(turn) for turn in own]
                for kind, own in zip(("watched", "unwatched"), turns, strict=True)
            },
            "summary": [
                row(
                    f"{arguments.preset}, bf16, watched",
                    watched,
                    "tokens/CPU s",
                    ratio=ratio,
                    against="not watched",
                    goal=GOAL,
                )
            ],
        },
    )


if __name__ == "__main__":
    main()
