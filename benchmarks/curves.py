"""Validation loss against tokens read: this trainer in bf16 against plain float32 loops.

    python benchmarks/curves.py            # writes results/curves.json and docs/images/curves.svg

Speed counts only where as much is learnt from as many tokens. The contestants of ``train.py`` train
on Multi30k with the same shape, token budget a step, learning rates, Adam constants, clipping and
smoothing, from initial weights and in an order of their own, and look at the same validation set
after the same steps. Loss is per target token, unsmoothed; tokens are real source and target ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    ALLOCATOR,
    RESULTS,
    ROOT,
    Spread,
    corpus_config,
    default_corpora,
    machine,
    one_rank,
    row,
    write_result,
)
from train import drop_less, plain_loss, plain_model, plain_steps, run_config

from data_shards.manifest import Manifest
from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig, TrainerConfig
from trainer.paper.charts import Panel, Series, write_charts
from trainer.schedule import learning_rate

PICTURE = ROOT / "docs" / "images" / "curves.svg"
OURS, PLAIN, SAME_DROPOUT = "babelray bf16", "plain fp32", "plain fp32, same dropout"
CONTESTANTS = {OURS: "ours", PLAIN: "plain", SAME_DROPOUT: "plain-same-dropout"}
CURVE = "curve.json"

# What one run may differ by from another that only has another seed, nats a token.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Point:
    """A validation; ``cpu_s`` is the processor time of the training before it."""

    step: int
    tokens: int
    cpu_s: float
    loss: float


class Stopwatch:
    """Processor time of this process, without what is spent between ``stop`` and ``go_on``."""

    def __init__(self) -> None:
        self._began = time.process_time()

    def stop(self) -> float:
        """The time so far."""
        self._stopped = time.process_time()
        return self._stopped - self._began

    def go_on(self) -> None:
        """The interruption is over."""
        self._began += time.process_time() - self._stopped


def train_ours(run_dir: Path) -> list[Point]:
    """The trainer's own loop."""
    from trainer.events import EventLog
    from trainer.loop import Loop
    from trainer.metrics import RankMetrics, RunMetrics
    from trainer.rank import Rank
    from trainer.reporter import Voices

    points: list[Point] = []

    class Events(EventLog):
        """Keeps the validations; a step's event comes before its validation."""

        def write(self, event: str, **values: Any) -> None:
            super().write(event, **values)
            if event == "step":
                self.tokens = values["source_tokens"] + values["target_tokens"]
                self.cpu_s = watch.stop()
            elif event == "validated":
                points.append(
                    Point(values["step"], self.tokens, self.cpu_s, float(values["valid_nll"]))
                )
                watch.go_on()

    one_rank(run_dir)
    rank = Rank(run_config(run_dir), run_dir, rank=0, world_size=1, local_rank=0)
    rank.prepare()
    watch = Stopwatch()
    voices = Voices(
        Events(run_dir / "events.jsonl"), RunMetrics("benchmark"), RankMetrics("benchmark", 0)
    )
    Loop(rank, voices).run()
    return points


def train_plain(run_dir: Path, *, less_dropout: bool = False) -> list[Point]:
    """The plain loop of ``train.py`` with the trainer's learning rates and clipping."""
    import torch

    from trainer.validation import ValidationSet

    torch.set_num_threads(1)
    config = run_config(run_dir)
    settings = config.trainer
    manifest = Manifest.load(config.data.folder())
    held_out = ValidationSet.of(manifest, max_length=config.data.max_length)
    torch.manual_seed(settings.seed)
    model = plain_model(config.model, manifest.vocabulary_size)
    if less_dropout:
        drop_less(model)
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.0, betas=betas, eps=settings.adam_epsilon, fused=True
    )
    points = []
    tokens = 0
    watch = Stopwatch()
    steps = enumerate(plain_steps(config, manifest), start=1)
    model.train()
    for step, (batches, source_tokens, target_tokens) in steps:
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            loss = plain_loss(model, batch, settings.label_smoothing)
            (loss / target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        done = step / config.trainer.max_steps if config.trainer.max_steps else 0.0
        rate = learning_rate(settings, step, d_model=config.model.d_model, done=done)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        tokens += source_tokens + target_tokens
        if step % settings.validate_every == 0:
            cpu_s = watch.stop()
            model.eval()
            with torch.no_grad():
                total = sum(float(plain_loss(model, batch)) for batch in held_out.batches)
            model.train()
            points.append(Point(step, tokens, cpu_s, total / held_out.target_tokens))
            watch.go_on()
        if step == settings.max_steps:
            break
    return points


WORKERS: dict[str, Callable[[Path], list[Point]]] = {
    "ours": train_ours,
    "plain": train_plain,
    "plain-same-dropout": partial(train_plain, less_dropout=True),
}


def run(name: str, run_dir: Path) -> list[Point]:
    """One contestant in a process of its own, with one thread and the trainer's allocator."""
    environment = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--worker", CONTESTANTS[name], str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended: {done.stderr[-2000:]}")
    points = [Point(**values) for values in json.loads((run_dir / CURVE).read_text())]
    print(f"  {name}: loss {points[-1].loss:.3f} after {points[-1].tokens:,} tokens")
    return points


def differences(ours: list[Point], other: list[Point]) -> list[float]:
    """Our loss less the other's at our points, the other's interpolated between its own.

    Over the logarithm of tokens, in which the curves are nearly straight; none before the other's
    first point or beyond its last.
    """
    first, last = other[0].tokens, other[-1].tokens
    at = np.log([point.tokens for point in other])
    losses = [point.loss for point in other]
    return [
        point.loss - float(np.interp(np.log(point.tokens), at, losses))
        for point in ours
        if first <= point.tokens <= last
    ]


def draw(curves: dict[str, list[Point]], picture: Path, title: str) -> None:
    """Loss against tokens, and against processor time."""

    def panel(title: str, x_label: str, x: Callable[[Point], float]) -> Panel:
        series = [
            Series(name, [x(point) for point in points], [point.loss for point in points])
            for name, points in curves.items()
        ]
        return Panel(title, x_label, "validation loss, nats a token", series)

    panels = [
        panel("Equal tokens", "million tokens read", lambda point: point.tokens / 1e6),
        panel("Equal time", "CPU seconds of training", lambda point: point.cpu_s),
    ]
    write_charts(picture, panels, title=title)


def main() -> None:
    """Train, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "curves.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--validate-every", type=int, default=20)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--peak-learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary-size", type=int, default=8000)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", type=int, default=2, help="contestants at a time")
    parser.add_argument("--quick", action="store_true", help="few steps, within about a minute")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, run_dir = arguments.worker
        points = WORKERS[kind](Path(run_dir))
        (Path(run_dir) / CURVE).write_text(json.dumps([asdict(point) for point in points]))
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if arguments.quick:
        arguments.steps, arguments.validate_every, arguments.warmup_steps = 30, 10, 10
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        data = corpus_config(
            arguments.corpora,
            Path(folder) / "data",
            vocabulary_size=arguments.vocabulary_size,
            tokens_per_step=arguments.tokens_per_step,
            lanes=2,
            max_length=128,
        )
        manifest = Manifest.load(prepare(data))
        trainer = TrainerConfig(
            precision="bf16",
            threads=1,
            seed=arguments.seed,
            max_steps=arguments.steps,
            warmup_steps=arguments.warmup_steps,
            peak_learning_rate=arguments.peak_learning_rate,
            log_every=1,
            validate_every=arguments.validate_every,
            checkpoint_every=arguments.steps,
        )
        model = ModelConfig(preset=arguments.shape)
        config = RunConfig(model=model, data=data, trainer=trainer)
        folders = {name: Path(folder) / kind for name, kind in CONTESTANTS.items()}
        for run_dir in folders.values():
            run_dir.mkdir()
            (run_dir / "config.json").write_text(config.to_json())
        # The slowest first: that is how they fill two cores best.
        names = sorted(CONTESTANTS, key=[PLAIN, SAME_DROPOUT, OURS].index)
        with ThreadPoolExecutor(arguments.together) as pool:
            results = pool.map(lambda name: run(name, folders[name]), names)
            done = dict(zip(names, results, strict=True))
    curves = {name: done[name] for name in CONTESTANTS}
    print(f"  {'tokens':>12}" + "".join(f"{name:>28}" for name in curves))
    for points in zip(*curves.values(), strict=True):
        print(f"  {points[0].tokens:12,}" + "".join(f"{point.loss:28.3f}" for point in points))
    apart = {name: differences(curves[OURS], curves[name]) for name in (PLAIN, SAME_DROPOUT)}
    summary = []
    for name, values in apart.items():
        late = values[len(values) // 2 :]
        mean = float(np.mean(late))
        print(
            f"  babelray's loss less that of {name}, second half: {mean:+.3f} nats "
            f"({min(late):+.3f} to {max(late):+.3f})"
        )
        summary.append(
            row(
                f"{arguments.shape}, bf16: loss less {name}'s at equal tokens",
                Spread(mean, min(late), max(late)),
                "nats",
                goal=TOLERANCE,
                higher_is_better=False,
            )
        )
    title = f"{arguments.shape}, {data.corpus}, {data.tokens_per_step} tokens a side and step"
    draw(curves, arguments.picture, title)
    content = {
        "shape": arguments.shape,
        "corpus": data.corpus,
        "pairs": manifest.num_pairs,
        "vocabulary_size": manifest.vocabulary_size,
        "trainer": trainer.model_dump(mode="json"),
        "curves": {name: [asdict(point) for point in points] for name, points in curves.items()},
        "differences": apart,
        "summary": summary,
    }
    write_result(arguments.output, before, content)


if __name__ == "__main__":
    main()
