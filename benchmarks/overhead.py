"""What DeepSpeed, the trainer's loop and Ray cost: the same model trained in four ways, in turns.

    python benchmarks/overhead.py          # prints a table, writes benchmarks/results/overhead.json
    python benchmarks/overhead.py --workers 2 --output benchmarks/results/overhead-2.json

  bare       a plain PyTorch loop of this model on batches that lie ready in memory: the same
             precision (bfloat16 weights with float32 masters by hand), Adam and clipping,
             under the same settings of the allocator
  engine     the same batches through DeepSpeed (trainer.engine)
  loop       the trainer's whole loop in one process: plan, stream, events, metrics, DeepSpeed
  command    ``babelray train``: the same under Ray

With ``--workers 2`` the bare loop has two processes as well, each with its own lanes, which add up
their gradients in one all-reduce a step (gloo); engine and loop are left out. What is compared with
is then all the processor time of these two.

Rates are real source and target tokens per second of processor time. For the command it is taken
between two logged steps in the middle of the run: of the workers alone, and of every process that
the command started. Its workers are stopped (SIGSTOP) while the others have their turns; Ray's
other processes go on, as they would be out of step with each other if they were stopped too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from common import (
    ALLOCATOR,
    RESULTS,
    ROOT,
    Meter,
    Turn,
    Worker,
    chosen_corpus,
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
from train import run_config, train_ours

from data_shards.manifest import Manifest
from data_shards.plan import Plan, lanes_of_rank
from data_shards.shards import prepare
from data_shards.stream import StepBatches, Stream
from model.config import ModelConfig
from trainer.config import RecoveryConfig, RunConfig
from trainer.schedule import learning_rate

if TYPE_CHECKING:
    import torch

GOAL = 0.95
_START_S = 300
_BARE_RANK = "BENCHMARK_BARE_RANK"


def ready_batches(
    config: RunConfig, manifest: Manifest, rank: int = 0, world_size: int = 1
) -> list[StepBatches]:
    """An epoch's batches of a rank in memory."""
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    lanes = lanes_of_rank(rank, world_size, plan.lanes)
    with Stream(manifest, plan, lanes, 0, prefetch_steps=8) as stream:
        return [next(stream) for _ in range(plan.steps_per_epoch)]


class Peers:
    """The ranks of a bare loop: what one would write by hand, an all-reduce of all gradients."""

    def __init__(self, run_dir: Path) -> None:
        given = run_dir / "workers"
        self.world_size = int(given.read_text()) if given.exists() else 1
        self.rank = int(os.environ.get(_BARE_RANK, "0"))
        self.others_cpu_s = 0.0
        if self.world_size == 1:
            return
        import torch.distributed

        if self.rank == 0:
            for rank in range(1, self.world_size):
                subprocess.Popen(
                    [sys.executable, *sys.argv],
                    env={**os.environ, _BARE_RANK: str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                )
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{run_dir.absolute()}/bare-rendezvous",
            rank=self.rank,
            world_size=self.world_size,
        )

    def add_up(self, parameters: Sequence[torch.nn.Parameter], loss_sum: float) -> float:
        """Gradients become their sums over all ranks; the loss summed over them.

        With it come the other ranks' processor seconds, for rank 0's meter.
        """
        if self.world_size == 1:
            return loss_sum
        import torch
        import torch.distributed

        for parameter in parameters:
            if parameter.grad is None:  # this rank's lanes were empty
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        shaped = [part.view_as(one) for part, one in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, shaped)
        own_cpu_s = 0.0 if self.rank == 0 else time.process_time()
        numbers = torch.tensor([loss_sum, own_cpu_s], dtype=torch.float64)
        torch.distributed.all_reduce(numbers)
        total, self.others_cpu_s = numbers.tolist()
        return float(total)


def train_bare(run_dir: Path, meter: Meter) -> None:
    """The loop that one would write by hand for this model."""
    import torch
    from torch import nn

    from model.build import build

    torch.set_num_threads(1)
    config = run_config(run_dir)
    trainer = config.trainer
    manifest = Manifest.load(config.data.folder())
    peers = Peers(run_dir)
    plan = Plan.of(manifest, config.data, trainer.seed)
    batches = ready_batches(config, manifest, peers.rank, peers.world_size)
    if peers.rank > 0:
        meter = Silent()
    else:
        meter._clock = lambda: time.process_time() + peers.others_cpu_s
    torch.manual_seed(trainer.seed)
    model = build(config.model, manifest.vocabulary_size).train()
    masters = list(model.parameters())
    if trainer.precision == "bf16":
        masters = [parameter.detach().clone() for parameter in model.parameters()]
        model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        masters,
        lr=0.0,
        betas=(trainer.adam_beta1, trainer.adam_beta2),
        eps=trainer.adam_epsilon,
        weight_decay=trainer.weight_decay,
        fused=True,
    )
    meter.start()
    for update, step in enumerate(cycle(batches), 1):
        source_tokens = plan.source_tokens(step.step)
        target_tokens = plan.target_tokens(step.step)
        loss_sum = 0.0
        for batch in step.batches:
            loss, _ = model.training_loss(
                batch.source_BS, batch.target_in_BT, batch.target_out_BT, trainer.label_smoothing
            )
            (loss / target_tokens).backward()
            loss_sum += loss.item()
        assert peers.add_up(parameters, loss_sum) < float("inf")
        if masters[0] is not parameters[0]:
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
                parameter.grad = None
        nn.utils.clip_grad_norm_(masters, trainer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trainer, update, d_model=config.model.d_model, done=0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if masters[0] is not parameters[0]:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        meter.stepped(source_tokens + target_tokens)


def train_engine(run_dir: Path, meter: Meter) -> None:
    """The same through DeepSpeed."""
    import torch

    from model.build import build
    from trainer.engine import Engine

    one_rank(run_dir)
    config = run_config(run_dir)
    trainer = config.trainer
    manifest = Manifest.load(config.data.folder())
    batches = ready_batches(config, manifest)
    torch.manual_seed(trainer.seed)
    model = build(config.model, manifest.vocabulary_size)
    engine = Engine(model, trainer, world_size=1, device=torch.device("cpu"))
    engine.train()
    meter.start()
    for update, step in enumerate(cycle(batches), 1):
        source_tokens = sum(batch.num_source_tokens for batch in step.batches)
        target_tokens = sum(batch.num_target_tokens for batch in step.batches)
        loss_sum = 0.0
        for batch in step.batches:
            loss, _ = engine(
                batch.source_BS, batch.target_in_BT, batch.target_out_BT, trainer.label_smoothing
            )
            engine.backward(loss, target_tokens=target_tokens)
            loss_sum += loss.item()
        assert loss_sum < float("inf")
        engine.step(learning_rate(trainer, update, d_model=config.model.d_model, done=0.0))
        meter.stepped(source_tokens + target_tokens)


class Silent(Meter):
    """Of a rank that nobody asks."""

    def __init__(self) -> None:
        """Nothing to answer to."""

    def start(self) -> None:
        """At once."""

    def stepped(self, tokens: int) -> None:
        """Go on."""


WORKERS = {"bare": train_bare, "engine": train_engine, "loop": train_ours}


class Command:
    """``babelray train``; a contestant whose workers are stopped between its turns.

    A turn begins and ends with a logged step. Its ``cpu_s`` is that of all processes; the workers'
    own share is in ``worker_turns``.
    """

    def __init__(self, name: str, run_dir: Path, workers: int) -> None:
        self.name = name
        self._num_workers = workers
        self.worker_turns: list[Turn] = []
        self.cpu_s: Counter[str] = Counter()  # by process
        self._events = run_dir / "runs" / "overhead" / "events.jsonl"
        self._log = run_dir / "command.log"
        command = ["train", "--config", "config.json", "--name", "overhead"]
        command += ["--workers", str(workers)]
        with self._log.open("w") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", "cluster.cli", *command],
                cwd=run_dir,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        self._seen = 0  # bytes of the events
        self._tokens, self._steps = 0, 0
        try:
            self._wait(lambda: self._steps > 0)
            self._workers = [self._find_worker(rank) for rank in range(workers)]
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """See ``Contestant``."""
        self._signal(signal.SIGCONT)
        self._wait(lambda: True)
        before, began = self._times(), time.perf_counter()
        tokens, steps = self._tokens, self._steps

        pids = {worker.pid for worker in self._workers}

        def worked() -> bool:
            used = sum(_cpu_s(worker) - before[worker.pid][1] for worker in self._workers)
            return used >= seconds

        self._wait(worked)
        after, wall_s = self._times(), time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        spent: dict[int, float] = {}
        for pid, (name, cpu_s) in after.items():
            spent[pid] = cpu_s - before.get(pid, ("", 0.0))[1]
            self.cpu_s["worker" if pid in pids else name] += spent[pid]
        tokens, steps = self._tokens - tokens, self._steps - steps
        own_s = sum(spent[pid] for pid in pids)
        self.worker_turns.append(Turn(tokens, steps, own_s, wall_s))
        return Turn(tokens, steps, sum(spent.values()), wall_s)

    def close(self) -> None:
        """End the command with all that it started."""
        processes = self._processes()
        for process in reversed(processes):
            process.kill()
        psutil.wait_procs(processes, timeout=20)

    def _processes(self) -> list[psutil.Process]:
        if not self._process.is_running():
            return []
        return [self._process, *self._process.children(recursive=True)]

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            worker.send_signal(number)

    def _find_worker(self, rank: int) -> psutil.Process:
        log = self._events.parent / "logs" / f"rank-{rank:03d}.log"
        found = re.search(r"process (\d+)", log.read_text())
        assert found is not None, log
        return psutil.Process(int(found[1]))

    def _times(self) -> dict[int, tuple[str, float]]:
        times = {}
        for process in self._processes():
            try:
                times[process.pid] = (_short_name(process), _cpu_s(process))
            except psutil.NoSuchProcess:
                continue  # its time is its parent's by now
        return times

    def _wait(self, enough: Callable[[], bool]) -> None:
        """Until a step is logged and it is enough."""
        latest = time.monotonic() + _START_S
        while True:
            with (
                self._events.open("rb") if self._events.exists() else open(os.devnull, "rb") as file
            ):
                file.seek(self._seen)
                lines = file.read().splitlines(keepends=True)
            logged = False
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._seen += len(line)
                event = json.loads(line)
                assert event["event"] in {"started", "step"}, event
                if event["event"] == "step":
                    logged = True
                    self._steps = event["step"]
                    self._tokens = event["source_tokens"] + event["target_tokens"]
            if logged and enough():
                return
            if self._process.poll() is not None or time.monotonic() > latest:
                raise RuntimeError(f"{self.name}: {self._log.read_text()[-2000:]}")
            time.sleep(0.005)


def _cpu_s(process: psutil.Process) -> float:
    """User and system time, that of its children that have ended included."""
    return float(sum(process.cpu_times()[:4]))


def _short_name(process: psutil.Process) -> str:
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].split("(")[0].split(".")[0]
    names = [Path(word).name for word in words[:4] if not word.startswith("-")]
    scripts = [name for name in names[1:] if name.endswith(".py")]
    if "cluster.cli" in words:
        return "babelray"
    return scripts[0] if scripts else names[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--zero-stage", type=int, help="by default the schema's")
    parser.add_argument("--vocabulary-size", type=int, default=8000)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8, help="CPU seconds a turn")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, run_dir = arguments.worker
        WORKERS[kind](Path(run_dir), Meter())
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder), before)


def measure(arguments: argparse.Namespace, folder: Path, before: dict[str, object]) -> None:
    """All of them in turns."""
    data = chosen_corpus(arguments, folder)
    prepare(data)
    stage = {} if arguments.zero_stage is None else {"zero_stage": arguments.zero_stage}
    trainer = uninterrupted(precision=arguments.precision, metrics_port=_free_port(), **stage)
    # Ranks that are stopped while others have their turns do not answer for a while.
    config = RunConfig(
        model=ModelConfig(preset=arguments.preset),
        data=data,
        trainer=trainer,
        recovery=RecoveryConfig(hang_timeout_s=600),
    )
    kinds = [*WORKERS] if arguments.workers == 1 else ["bare"]
    for kind in (*kinds, "command"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(config.to_json())
        (folder / kind / "workers").write_text(str(arguments.workers))
    contestants: list[Worker | Command] = []
    try:
        contestants += [Worker(kind, kind, folder / kind, environment=ALLOCATOR) for kind in kinds]
        command = Command("command", folder / "command", arguments.workers)
        contestants.append(command)
        print(
            f"{arguments.preset}, {arguments.precision}, ZeRO {trainer.zero_stage}: {data.corpus}, "
            f"{data.tokens_per_step} tokens a side and step in {data.lanes} batches, "
            f"{arguments.workers} workers"
        )
        turns = take_turns(
            contestants, rounds=arguments.rounds, seconds=arguments.seconds, say=print
        )
    finally:
        for contestant in contestants:
            contestant.close()
    measured = dict(zip(kinds, turns[:-1], strict=True))
    measured["command, workers alone"] = command.worker_turns[-arguments.rounds :]
    measured["command, all processes"] = turns[-1]
    rows = []
    print(f"  {'':24}{'tokens/CPU s':>14}{'lowest':>9}{'highest':>9}{'ratio':>8}{'ms/step':>9}")
    for name, own in measured.items():
        rate, ratio = rates(own), ratios(own, turns[0])
        step_ms = 1e3 * sum(turn.cpu_s for turn in own) / sum(turn.steps for turn in own)
        rows.append(
            {
                "name": name,
                "tokens_per_cpu_s": asdict(rate),
                "ratio": asdict(ratio),
                "cpu_ms_per_step": step_ms,
                "turns": [asdict(turn) for turn in own],
            }
        )
        print(
            f"  {name:24}{rate.median:14,.0f}{rate.lowest:9,.0f}{rate.highest:9,.0f}"
            f"{ratio.median:8.3f}{step_ms:9.1f}"
        )
    # Ray's own processes work by the clock, not by the step.
    wall_s = sum(turn.wall_s for turn in command.worker_turns)
    busy = {name: cpu_s / wall_s for name, cpu_s in command.cpu_s.most_common() if cpu_s > 0}
    print("  the command's processes, part of a core while it runs:")
    print("  " + ", ".join(f"{name} {part:.3f}" for name, part in busy.items()))
    others = sum(part for name, part in busy.items() if name != "worker")
    alone = rows[-2]["ratio"]["median"]  # type: ignore[index]
    # What it is where each worker has a core: the others' time is by the clock, and here it may be
    # that the workers had to share theirs.
    reckoned = alone / (1 + others / arguments.workers)
    print(
        f"  beside the workers {others:.3f} of a core; with a core for each worker that makes "
        f"{reckoned:.3f}"
    )
    achieved = rows[-1]["ratio"]["median"]  # type: ignore[index]
    print(f"goal {GOAL} of the bare loop: {achieved:.3f} (load {before['load_average']:.1f})")
    write_result(
        arguments.output,
        before,
        {
            "goal_ratio": GOAL,
            # Without what only this machine has.
            "config": config.model_dump(
                mode="json", exclude={"evaluation": True, "data": {"root", "mirror"}}
            ),
            "contestants": rows,
            "workers": arguments.workers,
            "cores_busy": busy,
            "cores_busy_beside_the_workers": others,
            "ratio_with_a_core_for_each_worker": reckoned,
            "summary": [
                row(
                    name,
                    rates(own),
                    "tokens/CPU s",
                    ratio=ratios(own, turns[0]),
                    against="bare loop",
                    goal=GOAL if name == "command, all processes" else None,
                )
                for name, own in measured.items()
                if name != "bare"
            ],
        },
    )


if __name__ == "__main__":
    main()
