"""How long a run stands still when a rank is killed: babelray against stock Ray Train, in turns.

    python benchmarks/recovery.py          # prints a table, writes benchmarks/results/recovery.json

  babelray   ``babelray train`` as a user starts it
  stock      Ray Train V2's ``TorchTrainer`` with its default settings, whose workers call the same
             training function: the same model, corpus, checkpoints and loop

Each run has two workers. Once it trains, a rank is killed with SIGKILL, a few times a run; counted
are the seconds from the kill to the end of the next optimizer step, as ``events.jsonl`` has it. The
two take turns, a run each, with nothing else running in between.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Spread, machine, row, write_result

from data_shards.shards import prepare
from trainer.config import RunConfig, load_config

GOAL = 0.5
_WORKERS = 2
_PATIENCE_S = 240.0
_SETTLE_S = 5.0  # of undisturbed training between kills


def run_config(root: Path) -> RunConfig:
    """The demo's model, which saves often enough that little is done again."""
    settings = [
        f"data.root={root / 'data'}",
        "trainer.max_steps=1000000",
        "trainer.log_every=1",
        "trainer.validate_every=1000000",
        "trainer.checkpoint_every=10",
        "trainer.metrics_port=0",
        "trainer.threads=1",
        "recovery.max_failures=1000",
    ]
    return load_config(ROOT / "configs" / "tiny.yaml", settings)


def stock(run_dir: Path) -> None:
    """Train under Ray Train as its documentation has it; for a process of its own."""
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    def work() -> None:
        import ray.train

        from cluster.ranks import _log_to
        from trainer.attempt import train

        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        handler = _log_to(run_dir / "logs" / f"rank-{rank:03d}.log")
        handler.stream.write(f"rank {rank} of {world_size}, process {os.getpid()},\n")
        handler.flush()
        config = run_config(run_dir.parents[1])
        train(config, run_dir, rank=rank, world_size=world_size, resume=True)

    ray.init(num_cpus=_WORKERS, log_to_driver=False)
    TorchTrainer(
        work,
        scaling_config=ScalingConfig(num_workers=_WORKERS),
        run_config=RayRunConfig(
            name=run_dir.name,
            storage_path=str(run_dir / ".ray"),
            failure_config=FailureConfig(max_failures=-1),
        ),
    ).fit()


class Run:
    """A run in a process of its own, looked at through its folder."""

    def __init__(self, kind: str, root: Path, name: str) -> None:
        self.run_dir = root / "runs" / name
        (self.run_dir / "logs").mkdir(parents=True)
        config = root / f"{name}.json"
        config.write_text(run_config(root).to_json())
        command = {
            "babelray": ["-m", "cluster.cli", "train", "--config", str(config), "--name", name,
                         "--workers", str(_WORKERS), "--overwrite"],
            "stock": [__file__, "--stock", str(self.run_dir)],
        }[kind]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            # Of the packages' own noise alone: nothing that recovery depends on.
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._output = (root / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The command's process."""
        return self._process.pid

    def step_after(self, moment: float) -> dict[str, Any]:
        """The first step logged after ``moment`` (Unix time)."""
        return self._wait(
            lambda: next((e for e in self._events() if e["time"] > moment), None),
            f"a step of {self.run_dir.name}",
        )

    def kill(self, rank: int) -> float:
        """Kill a rank; when."""
        log = (self.run_dir / "logs" / f"rank-{rank:03d}.log").read_text()
        pid = int(re.findall(rf"rank {rank} of \d+, process (\d+)", log)[-1])
        os.kill(pid, signal.SIGKILL)
        return time.time()

    def close(self) -> None:
        """End it and wait."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _events(self) -> list[dict[str, Any]]:
        file = self.run_dir / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["event"] == "step"]

    def _wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        said = Path(self._output.name).read_text()[-2000:]
        raise RuntimeError(f"waited in vain for {what}:\n{said}")


def measure(kind: str, root: Path, name: str, kills: int) -> tuple[float, list[float]]:
    """Seconds from the command to the first step, and from each kill to the next step."""
    began = time.time()
    run = Run(kind, root, name)
    try:
        start_s = run.step_after(began)["time"] - began
        recoveries = []
        for number in range(kills):
            time.sleep(_SETTLE_S)
            killed_at = run.kill(rank=(number + 1) % _WORKERS)
            # The other rank may still log a step that was complete before the kill.
            recoveries.append(run.step_after(killed_at + 0.5)["time"] - killed_at)
        return start_s, recoveries
    finally:
        run.close()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--kills", type=int, default=3, help="kills a run (3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "recovery.json")
    parser.add_argument("--stock", type=Path, metavar="RUN_DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stock:
        stock(arguments.stock)
        return
    before = machine()
    kinds = ("babelray", "stock")
    starts: dict[str, list[float]] = {kind: [] for kind in kinds}
    recoveries: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="babelray-recovery-") as scratch:
        root = Path(scratch)
        prepare(run_config(root).data)
        for number in range(arguments.rounds):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                start_s, seconds = measure(kind, root, f"{kind}-{number}", arguments.kills)
                starts[kind].append(start_s)
                recoveries[kind].append(seconds)
                shown = "  ".join(f"{value:.1f}" for value in seconds)
                print(f"round {number + 1}: {kind:<9} start {start_s:.1f} s, kills {shown} s")
    spreads = {kind: Spread.of([*chain.from_iterable(recoveries[kind])]) for kind in kinds}
    begun = {kind: Spread.of(starts[kind]) for kind in kinds}
    per_round = [
        Spread.of(ours).median / Spread.of(others).median
        for ours, others in zip(recoveries["babelray"], recoveries["stock"], strict=True)
    ]
    ratio = Spread.of(per_round)
    print(f"\n{'':<10}{'kill to next step':>24}{'command to first step':>26}")
    for kind in kinds:
        one, other = spreads[kind], begun[kind]
        print(
            f"{kind:<10}{one.median:>9.1f} s ({one.lowest:.1f} to {one.highest:.1f})"
            f"{other.median:>12.1f} s ({other.lowest:.1f} to {other.highest:.1f})"
        )
    met = "met" if ratio.median <= GOAL else "NOT met"
    print(
        f"ratio {ratio.median:.2f} ({ratio.lowest:.2f} to {ratio.highest:.2f}), goal {GOAL}: {met}"
    )
    write_result(
        arguments.output,
        before,
        {
            "kill_to_next_step_s": {kind: asdict(spreads[kind]) for kind in kinds},
            "command_to_first_step_s": {kind: asdict(begun[kind]) for kind in kinds},
            "ratio": asdict(ratio),
            "goal": GOAL,
            "kills": recoveries,
            "starts": starts,
            "summary": [
                row(
                    "kill of a rank to the next step",
                    spreads["babelray"],
                    "s",
                    ratio=ratio,
                    against="stock Ray Train",
                    goal=GOAL,
                    higher_is_better=False,
                )
            ],
        },
    )


if __name__ == "__main__":
    main()
