"""From the command to the first step, with two workers: babelray against stock Ray Train, in turns.

    python benchmarks/start.py             # prints tables, writes benchmarks/results/start.json

  babelray   ``babelray train`` as a user starts it
  stock      Ray Train V2's ``TorchTrainer`` with its default settings, whose workers call the same
             training function: the same model, corpus and DeepSpeed (as in recovery.py)

Counted are the seconds from the start of the process to the end of the first optimizer step, as
``events.jsonl`` has it, and the processor time that all processes had used by then. The corpus is
prepared, and one run of each comes before those that count: the machine is warm. What the seconds
of ``babelray train`` went to is what it says itself. ``babelray --help`` is timed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from common import RESULTS, ROOT, Spread, default_corpora, machine, row, write_result
from recovery import Run, run_config

from data_shards.shards import prepare
from trainer.startup import LABELS

GOAL_S = 15.0
GOAL_HELP_S = 0.5
KINDS = ("babelray", "stock")
FIRST_STEP = "first step"


def measure(kind: str, root: Path, name: str) -> dict[str, Any]:
    """One start: wall and processor seconds to the first step, processes, and the parts."""
    load = os.getloadavg()[0]
    began = time.time()
    run = Run(kind, root, name)
    try:
        step = run.step_after(began)
        cpu_s, num_processes = _used(run.pid)
        events = [json.loads(line) for line in (run.run_dir / "events.jsonl").open()]
    finally:
        run.close()
    started = next(event for event in events if event["event"] == "started")
    parts = dict(started.get("start_s", {}))
    parts[FIRST_STEP] = step["time"] - started["time"]
    return {
        "seconds": step["time"] - began,
        "cpu_s": cpu_s,
        "processes": num_processes,
        "parts": parts,
        "load_average": load,
    }


def _used(pid: int) -> tuple[float, int]:
    """Processor seconds of a process and all that it has started, and how many these are."""
    parent = psutil.Process(pid)
    seconds, number = 0.0, 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            seconds += sum(process.cpu_times()[:4])
            number += 1
        except psutil.NoSuchProcess:
            continue  # its time is its parent's by now
    return seconds, number


def time_help() -> float:
    """Seconds of ``babelray --help``."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "--help"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def spread(runs: Sequence[dict[str, Any]], what: str) -> Spread:
    """Of one number over the runs of a kind."""
    return Spread.of([run[what] for run in runs])


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, default=default_corpora(), help="not needed here")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each that count (5)")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--output", type=Path, default=RESULTS / "start.json")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    helps = [time_help() for _ in range(2 * rounds)]
    with tempfile.TemporaryDirectory(prefix="babelray-start-") as scratch:
        root = Path(scratch)
        prepare(run_config(root).data)
        for number in range(-1, rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                run = measure(kind, root, f"{kind}-{number + 1}")
                if number >= 0:
                    runs[kind].append(run)
                shown = f"round {number + 1}" if number >= 0 else "warm-up"
                print(
                    f"{shown}: {kind:<9}{run['seconds']:6.1f} s, {run['cpu_s']:5.1f} CPU seconds "
                    f"of {run['processes']} processes (load {run['load_average']:.1f})"
                )
    report(arguments.output, before, runs, Spread.of(helps))


def report(
    output: Path,
    before: dict[str, object],
    runs: dict[str, list[dict[str, Any]]],
    help_s: Spread,
) -> None:
    """The tables, and the file."""
    ours, stock = runs["babelray"], runs["stock"]
    ratio = Spread.of(
        [one["seconds"] / other["seconds"] for one, other in zip(ours, stock, strict=True)]
    )
    print(f"\n{'':<10}{'command to first step':>30}{'CPU seconds':>24}{'processes':>12}")
    for kind in KINDS:
        wall, cpu = spread(runs[kind], "seconds"), spread(runs[kind], "cpu_s")
        print(
            f"{kind:<10}{wall.median:>12.1f} s ({wall.lowest:.1f} to {wall.highest:.1f})"
            f"{cpu.median:>12.1f} ({cpu.lowest:.1f} to {cpu.highest:.1f})"
            f"{spread(runs[kind], 'processes').median:>10.0f}"
        )
    names = [*LABELS, FIRST_STEP]
    parts = {
        name: Spread.of([run["parts"].get(name, 0.0) for run in ours])
        for name in names
        if any(name in run["parts"] for run in ours)
    }
    print("\nwhat babelray's seconds go to")
    for name, part in parts.items():
        label = LABELS.get(name, name)
        print(f"  {label:<28}{part.median:5.1f} ({part.lowest:.1f} to {part.highest:.1f})")
    wall = spread(ours, "seconds")
    print(
        f"\nbabelray {wall.median:.1f} s, goal {GOAL_S:.0f}: {_met(wall.median <= GOAL_S)}; "
        f"{ratio.median:.2f} of stock ({ratio.lowest:.2f} to {ratio.highest:.2f}); "
        f"--help {help_s.median:.2f} s, goal {GOAL_HELP_S}: {_met(help_s.median <= GOAL_HELP_S)}"
    )
    write_result(
        output,
        before,
        {
            "workers": 2,
            "goal_s": GOAL_S,
            "goal_help_s": GOAL_HELP_S,
            "ratio": asdict(ratio),
            "command_to_first_step_s": {
                kind: asdict(spread(runs[kind], "seconds")) for kind in KINDS
            },
            "cpu_s_to_first_step": {kind: asdict(spread(runs[kind], "cpu_s")) for kind in KINDS},
            "parts_s": {name: asdict(part) for name, part in parts.items()},
            "help_s": asdict(help_s),
            "runs": runs,
            "summary": [
                row(
                    "command to first step, 2 workers",
                    wall,
                    " s",
                    goal=GOAL_S,
                    higher_is_better=False,
                ),
                row(
                    "CPU seconds to the first step, 2 workers",
                    spread(ours, "cpu_s"),
                    " s",
                    ratio=Spread.of(
                        [
                            one["cpu_s"] / other["cpu_s"]
                            for one, other in zip(ours, stock, strict=True)
                        ]
                    ),
                    against="stock Ray Train",
                    higher_is_better=False,
                ),
                row("--help", help_s, " s", goal=GOAL_HELP_S, higher_is_better=False),
            ],
        },
    )


def _met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


if __name__ == "__main__":
    main()
