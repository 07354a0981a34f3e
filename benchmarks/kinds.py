"""Attention against recurrence and convolution: the same corpus, the same cores, the same minutes.

    python benchmarks/kinds.py                  # trains every kind, one after the other (an hour)
    python benchmarks/kinds.py --minutes 2 --kinds transformer lstm
    python benchmarks/kinds.py --page           # only writes docs/paper/kinds.md again

Every kind is trained by ``babelray train`` for the same wall time on two workers, with the schedule
fitted to that time, and evaluated at every checkpoint; it should have the machine to itself. Tokens
per CPU-second are measured apart, in turns of one process a kind with one thread. Runs that are
finished are not trained again. Writes benchmarks/results/kinds.json, the page and its plot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import (
    ALLOCATOR,
    RESULTS,
    ROOT,
    Meter,
    Worker,
    corpus_config,
    default_corpora,
    machine,
    rates,
    ratios,
    take_turns,
    write_result,
)
from train import train_ours

from data_shards.manifest import Manifest
from data_shards.shards import prepare
from trainer.config import RunConfig, load_config
from trainer.paper.charts import Panel, Series, write_charts
from trainer.paper.pages import markdown_table, write_parts
from trainer.run import open_checkpoints, read_config, read_events

CONFIG = ROOT / "configs" / "multi30k.yaml"
WORKERS = 2
PAGE = ROOT / "docs" / "paper" / "kinds.md"
PLOT = ROOT / "docs" / "images" / "paper" / "kinds.svg"

_RECURRENT = ["trainer.peak_learning_rate=0.012", "trainer.warmup_steps=200"]

# What each kind trains best with, as far as a few short runs told; all else is of CONFIG.
SETTINGS: dict[str, list[str]] = {
    "transformer": [],
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn": _RECURRENT,
    "convolutional": [],
}
NAMES = {
    "transformer": "Transformer",
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN (tanh)",
    "convolutional": "convolution",
}


class Experiment:
    """Where things lie and what is asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.minutes: float = arguments.minutes
        self.kinds: list[str] = arguments.kinds
        self.folder: Path = arguments.folder.resolve()
        data = corpus_config(arguments.corpora, self.folder / "data")
        self.settings = [f"data.root={data.root}", f"data.corpus={data.corpus}"]
        if data.mirror is not None:
            self.settings.append(f"data.mirror={data.mirror}")

    def of(self, kind: str) -> list[str]:
        """All settings of a kind's training."""
        return [
            *self.settings,
            f"model.kind={kind}",
            f"trainer.max_minutes={self.minutes}",
            "trainer.bleu_every=null",
            "trainer.ema_decay=null",
            "trainer.keep_checkpoints=100",
            "trainer.metrics_port=0",
            "trainer.log_every=10",
            "trainer.validate_every=200",
            "trainer.checkpoint_every=200",
            *SETTINGS[kind],
        ]

    def babelray(self, command: str, *arguments: str) -> str:
        """Run a command of the product; its standard output."""
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", command, *arguments],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    def check(self) -> None:
        """Whether runs that are there are of this experiment.

        Raises:
            SystemExit: another run is in the way, or there is nothing to compare with.
        """
        if "transformer" not in self.kinds:
            raise SystemExit("--kinds: the others are compared with the Transformer: name it, too")
        for kind in self.kinds:
            run_dir = self.folder / kind
            if (run_dir / "config.json").is_file():
                wanted = load_config(CONFIG, self.of(kind))
                if read_config(run_dir).model_dump() != wanted.model_dump():
                    raise SystemExit(
                        f"{run_dir} was trained with other settings or minutes: give another "
                        "--folder, or remove it"
                    )

    def train(self, kind: str) -> None:
        """Train a kind, or go on with it."""
        run_dir = self.folder / kind
        ends = [event for event in read_events(run_dir) if event["event"] == "finished"]
        if ends and ends[-1]["reason"] != "stopped":
            return
        arguments = ["--resume"] if run_dir.exists() else []
        for setting in self.of(kind):
            arguments += ["--set", setting]
        self.babelray(
            "train", "--config", str(CONFIG), "--name", kind, "--workers", str(WORKERS),
            "--runs", str(self.folder), *arguments,
        )  # fmt: skip

    def evaluate(self, kind: str) -> dict[str, Any]:
        """Scores of every checkpoint, and what the training was."""
        run_dir = self.folder / kind
        runs = ["--runs", str(self.folder)]
        steps = open_checkpoints(run_dir).committed()
        self.babelray("evaluate", kind, "--checkpoint", ",".join(map(str, steps)), *runs)
        compare = ["--compare", "transformer"] if kind != "transformer" else []
        self.babelray("evaluate", kind, *compare, *runs)
        events = read_events(run_dir)
        logged = [event for event in events if event["event"] == "step"]
        elapsed = {event["step"]: event["elapsed_s"] for event in logged}
        last = logged[-1]
        started = next(event for event in events if event["event"] == "started")
        best = _result(run_dir, "best")
        return {
            "kind": kind,
            "settings": [f"model.kind={kind}", *SETTINGS[kind]],
            "parameters": started["parameters"],
            "steps": last["step"],
            "tokens": last["source_tokens"] + last["target_tokens"],
            "training_s": last["elapsed_s"],
            "curve": [
                {"step": step, "minutes": _at(elapsed, step) / 60, "bleu": score["bleu"]}
                for step in steps
                for score in [_result(run_dir, str(step))]
            ],
            "validation": [
                {"step": event["step"], "minutes": _at(elapsed, event["step"]) / 60,
                 "nll": event["valid_nll"]}
                for event in events
                if event["event"] == "validated"
            ],
            "best_step": best["step"],
            "bleu": best["bleu"],
            "chrf": best["chrf"],
            "signature": best["signature"],
            "sentences_per_second": best["sentences_per_second"],
            "comparison": best["comparison"]["rows"] if compare else None,
        }  # fmt: skip

    def speed(self, rounds: int, seconds: float) -> dict[str, Any]:
        """Tokens per CPU-second of every kind, in turns."""
        workers = []
        with tempfile.TemporaryDirectory() as folder:
            for kind in self.kinds:
                endless = 1_000_000_000
                settings = [
                    *self.of(kind),
                    "trainer.threads=1",
                    "trainer.max_minutes=null",
                    f"trainer.max_steps={endless}",
                    "trainer.log_every=1",
                    f"trainer.validate_every={endless}",
                    f"trainer.checkpoint_every={endless}",
                ]
                config: RunConfig = load_config(CONFIG, settings)
                Manifest.load(prepare(config.data))
                run_dir = Path(folder) / kind
                run_dir.mkdir()
                (run_dir / "config.json").write_text(config.to_json())
                workers.append(Worker(kind, "ours", run_dir, environment=ALLOCATOR))
            try:
                turns = take_turns(workers, rounds=rounds, seconds=seconds, say=print)
            finally:
                for worker in workers:
                    worker.close()
        of_kind = dict(zip(self.kinds, turns, strict=True))
        return {
            kind: {
                "tokens_per_cpu_s": asdict(rates(own)),
                "ratio": asdict(ratios(own, of_kind["transformer"])),
            }
            for kind, own in of_kind.items()
        }


def _result(run_dir: Path, checkpoint: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(
        (run_dir / "evaluation" / f"test-{checkpoint}.json").read_text()
    )
    return result


def _at(elapsed: dict[int, float], step: int) -> float:
    """Seconds trained at a step, from the logged ones around it."""
    before = max((other for other in elapsed if other <= step), default=0)
    after = min((other for other in elapsed if other >= step), default=before)
    first, second = elapsed.get(before, 0.0), elapsed.get(after, elapsed.get(before, 0.0))
    return (
        first if after == before else first + (second - first) * (step - before) / (after - before)
    )


def table(result: dict[str, Any]) -> str:
    """The page's table."""
    rows = []
    for kind in result["kinds"]:
        rate, ratio = (
            result["speed"][kind["kind"]][name]["median"] for name in ("tokens_per_cpu_s", "ratio")
        )
        rows.append(
            (
                NAMES[kind["kind"]],
                f"{kind['parameters'] / 1e6:.2f} M",
                f"{kind['steps']:,}",
                f"{kind['tokens'] / 1e6:.1f} M",
                f"{rate:,.0f}",
                f"{ratio:.2f}",
                f"{kind['tokens'] / kind['training_s'] / (WORKERS * rate):.2f}",
                f"{min(point['nll'] for point in kind['validation']):.3f}",
                f"{kind['bleu']:.2f}",
                f"{kind['chrf']:.2f}",
                _difference(kind["comparison"]),
            )
        )
    return markdown_table(
        ("kind", "parameters", "steps", "tokens trained", "tokens per CPU-second",
         "of the Transformer's", "share of the cores",
         "validation nll", "BLEU", "chrF", "BLEU against the Transformer"),
        rows,
    )  # fmt: skip


def _difference(rows: list[dict[str, Any]] | None) -> str:
    if rows is None:
        return ""
    [row] = [row for row in rows if row["metric"] == "bleu" and row["difference"] is not None]
    return f"{-row['difference']:+.2f} (p {row['p_bootstrap']:.3f})"


def draw(result: dict[str, Any]) -> None:
    """BLEU and validation loss against minutes trained."""
    panels = [
        Panel(title, "minutes trained, two cores", label, [
            Series(
                f"{NAMES[kind['kind']]}",
                [point["minutes"] for point in kind[points]],
                [point[value] for point in kind[points]],
            )
            for kind in result["kinds"]
        ])
        for title, label, points, value in (
            ("translation", "BLEU, test_2016_flickr", "curve", "bleu"),
            ("language", "validation nll, nats a piece", "validation", "nll"),
        )
    ]  # fmt: skip
    write_charts(PLOT, panels)


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "kinds")
    parser.add_argument("--output", type=Path, default=RESULTS / "kinds.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--kinds", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="CPU seconds a turn")
    parser.add_argument("--page", action="store_true", help="only write the page of the result")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train_ours(Path(arguments.worker[1]), Meter())
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if not arguments.page:
        measure(arguments)
    result = json.loads(arguments.output.read_text())
    print(table(result))
    draw(result)
    write_parts(PAGE, {"kinds": table(result)})


def measure(arguments: argparse.Namespace) -> None:
    """Train and evaluate all, measure their speed, write the result."""
    before = machine()
    experiment = Experiment(arguments)
    experiment.check()
    for kind in experiment.kinds:
        print(f"{kind}: {arguments.minutes} minutes")
        experiment.train(kind)
    found = [experiment.evaluate(kind) for kind in experiment.kinds]
    speed = experiment.speed(arguments.rounds, arguments.seconds)
    content = {"minutes": arguments.minutes, "kinds": found, "speed": speed}
    write_result(arguments.output, before, content)


if __name__ == "__main__":
    main()
