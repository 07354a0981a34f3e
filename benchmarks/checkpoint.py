"""What a checkpoint costs the training that goes on meanwhile.

    python benchmarks/checkpoint.py    # prints a table, writes benchmarks/results/checkpoint.json

The trainer's own loop trains tiny and base in one process and saves every few steps. Two costs are
told apart: the *stall*, in which training stands still while the state is copied, and the *drag*,
by which the steps are slower that run beside the writing (their time over the others' median).
The share is of the time between two saves at the default ``trainer.checkpoint_every``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
    Spread,
    corpus_config,
    default_corpora,
    machine,
    one_rank,
    row,
    write_result,
)

from data_shards.config import DataConfig
from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig, TrainerConfig

GOAL = 0.01
# Steps, and steps between saves: long enough that a save is over before the next.
_LENGTHS = {"tiny": (120, 20), "base": (15, 3)}


def run_config(model: str, data: DataConfig, precision: str) -> RunConfig:
    """A run that does nothing but train and save."""
    steps, every = _LENGTHS[model]
    trainer = TrainerConfig(
        precision=precision,
        max_steps=steps,
        checkpoint_every=every,
        keep_checkpoints=1,
        log_every=1,
        validate_every=1_000_000,
        metrics_port=0,
        threads=1,
    )
    return RunConfig(model=ModelConfig(preset=model), data=data, trainer=trainer)


def costs(events: list[dict[str, Any]], interval_steps: int) -> dict[str, Any]:
    """From a run's events: seconds a step, and what each save cost."""
    steps = [event for event in events if event["event"] == "step"]
    # The last save is waited for at the run's end, so it drags nothing.
    saves = [event for event in events if event["event"] == "checkpoint"][:-1]
    ends = {event["step"]: event["time"] for event in steps}
    begun = {event["step"]: ends[event["step"]] for event in saves}
    seconds = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    beside: dict[int, list[int]] = {
        save["step"]: [
            step
            for step in seconds
            if ends[step] > begun[save["step"]]
            and ends[step - 1] < begun[save["step"]] + save["seconds"]
        ]
        for save in saves
    }
    busy = {step for steps_of in beside.values() for step in steps_of}
    usual_s = statistics.median(value for step, value in seconds.items() if step not in busy)
    stalls = [save["stall_seconds"] for save in saves]
    drags = [
        sum(seconds[step] - usual_s for step in beside[save["step"]]) - save["stall_seconds"]
        for save in saves
    ]
    interval_s = interval_steps * usual_s
    return {
        "bytes": saves[0]["bytes"],
        "step_s": usual_s,
        "save_s": asdict(Spread.of([save["seconds"] for save in saves])),
        "stall_s": asdict(Spread.of(stalls)),
        "drag_s": asdict(Spread.of(drags)),
        "interval_s": interval_s,
        "stall_share": statistics.median(stalls) / interval_s,
        "share": (statistics.median(stalls) + max(0.0, statistics.median(drags))) / interval_s,
    }


def work(run_dir: Path) -> None:
    """Train in this process."""
    from trainer.attempt import train

    one_rank(run_dir)
    config = RunConfig.model_validate_json((run_dir / "config.json").read_text())
    train(config, run_dir, rank=0, world_size=1, resume=False)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint.json")
    parser.add_argument("--worker", type=Path, metavar="RUN_DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    before, results = machine(), {}
    interval = TrainerConfig().checkpoint_every
    print(f"{'':<12}{'MB':>7}{'step s':>9}{'save s':>9}{'stall s':>9}{'drag s':>9}{'share':>9}")
    with tempfile.TemporaryDirectory(prefix="babelray-checkpoint-") as scratch:
        root = Path(scratch)
        data = corpus_config(
            arguments.corpora, root / "data", vocabulary_size=8000, lanes=2, tokens_per_step=4096
        )
        prepare(data)
        for model, precision in (("tiny", "fp32"), ("tiny", "bf16"), ("base", "bf16")):
            run_dir = root / f"{model}-{precision}"
            run_dir.mkdir()
            config = run_config(model, data, precision)
            (run_dir / "config.json").write_text(config.to_json())
            environment = {
                **os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)
            }  # fmt: skip
            with (run_dir / "output.log").open("w") as output:
                subprocess.run(
                    [sys.executable, __file__, "--worker", str(run_dir)],
                    check=True,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            lines = (run_dir / "events.jsonl").read_text().splitlines()
            found = costs([json.loads(line) for line in lines], interval)
            results[f"{model} {precision}"] = found
            print(
                f"{model + ' ' + precision:<12}{found['bytes'] / 1e6:>7.0f}{found['step_s']:>9.3f}"
                f"{found['save_s']['median']:>9.2f}{found['stall_s']['median']:>9.3f}"
                f"{found['drag_s']['median']:>9.2f}{found['share']:>9.3%}"
            )
    worst = max(found["share"] for found in results.values())
    print(
        f"share of the time between saves every {interval} steps: at most {worst:.3%}, "
        f"goal {GOAL:.0%}: {'met' if worst <= GOAL else 'NOT met'}"
    )
    summary = [
        row(
            f"{name}: training stands still a save",
            Spread(**found["stall_s"]),
            "s",
            higher_is_better=False,
        )
        for name, found in results.items()
    ]
    share = row("most of the time between saves", worst, "", goal=GOAL, higher_is_better=False)
    content = {"interval_steps": interval, "runs": results, "summary": [*summary, share]}
    write_result(arguments.output, before, content)


if __name__ == "__main__":
    main()
