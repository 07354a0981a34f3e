"""How fast the stream makes batches, alone on one core, and what planning a large corpus costs.

WebDataset's own loader, on the same shards, is measured between the stream's cases.

    python benchmarks/stream.py            # prints a table, writes benchmarks/results/stream.json

The corpus is Multi30k if BABELRAY_TEST_CORPORA (or --corpora) names a folder that has multi30k/,
else the generated one. Tokens are real source and target pieces, end signs included and padding
left out. Rates are given by the wall clock and by the processor's time: on a machine that others
use too, the second is the one to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import RESULTS, Spread, corpus_config, default_corpora, machine, row, write_result

from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.plan_file import _read, _write
from data_shards.shards import prepare

if TYPE_CHECKING:
    from torch import Tensor

GOAL_TOKENS_PER_S = 1_000_000
PLANNED_PAIRS = 36_000_000  # WMT14 English-French


@dataclass(frozen=True)
class StreamCase:
    """How a corpus is dealt; small windows are left, and read again, every epoch."""

    name: str
    lanes: int
    tokens_per_step: int
    window_pairs: int


CASES = (
    StreamCase("small steps", lanes=4, tokens_per_step=4096, window_pairs=65_536),
    StreamCase("small steps, shards read again", lanes=4, tokens_per_step=4096, window_pairs=2048),
    StreamCase("small batches", lanes=8, tokens_per_step=4096, window_pairs=65_536),
    StreamCase("the paper's steps", lanes=8, tokens_per_step=25_000, window_pairs=65_536),
    StreamCase(
        "the paper's, shards read again", lanes=8, tokens_per_step=25_000, window_pairs=2048
    ),
)


@dataclass(frozen=True)
class StreamResult:
    """Medians over the repeats."""

    case: StreamCase
    tokens_per_s: float
    tokens_per_s_lowest: float
    tokens_per_s_highest: float
    tokens_per_cpu_s: float
    first_step_s: float
    padding_efficiency: float


@dataclass(frozen=True)
class PlanResult:
    """One plan of a made-up corpus; the memory includes that of its lengths' file."""

    num_pairs: int
    mean_length: float
    lanes: int
    tokens_per_step: int
    build_s: float
    build_cpu_s: float
    epoch_s: float
    first_step_s: float
    step_s: float
    peak_mib: float
    reopen_cpu_s: float
    lengths_mib: float
    steps_per_epoch: int
    padding_efficiency: float


def measure_stream(manifest: Manifest, case: StreamCase, repeats: int, passes: int) -> StreamResult:
    """Median over repeats of a few passes over the corpus, from the second step on."""
    from data_shards.stream import Stream

    plan = Plan(
        manifest.lengths,
        manifest.blocks["num_pairs"],
        lanes=case.lanes,
        tokens_per_step=case.tokens_per_step,
        window_pairs=case.window_pairs,
        seed=1,
    )
    rates, cpu_rates, first = [], [], []
    real = computed = 0
    for _ in range(repeats):
        began = time.perf_counter()
        with Stream(manifest, plan, range(case.lanes), 0, prefetch_steps=8) as stream:
            next(stream)
            first.append(time.perf_counter() - began)
            tokens, began, cpu_began = 0, time.perf_counter(), time.process_time()
            for _ in range(passes * plan.steps_per_epoch):
                for batch in next(stream).batches:
                    tokens += batch.num_source_tokens + batch.num_target_tokens
                    computed += batch.source_BS.numel() + batch.target_out_BT.numel()
            rates.append(tokens / (time.perf_counter() - began))
            cpu_rates.append(tokens / (time.process_time() - cpu_began))
            real += tokens
    return StreamResult(
        case=case,
        tokens_per_s=statistics.median(rates),
        tokens_per_s_lowest=min(rates),
        tokens_per_s_highest=max(rates),
        tokens_per_cpu_s=statistics.median(cpu_rates),
        first_step_s=statistics.median(first),
        padding_efficiency=real / computed,
    )


def webdataset_batches(manifest: Manifest, num_pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What WebDataset's own loader makes of the same shards: pairs, shuffled, padded batches.

    It knows nothing of lengths before it has read, so its batches have a number of pairs.
    """
    import torch
    import webdataset as wds
    from torch.nn.utils.rnn import pad_sequence

    def pairs(blocks: Iterator[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        for block in blocks:
            sides = [
                torch.from_numpy(block[f"{side}.npy"].astype(np.int64)).split(lengths.tolist())
                for side, lengths in zip(
                    ("source", "target"), block["lengths.npy"].T.astype(np.int64), strict=True
                )
            ]
            yield from zip(*sides, strict=True)

    def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        source, target = (
            pad_sequence(list(side), batch_first=True) for side in zip(*batch, strict=True)
        )
        return source, target

    shards = [manifest.shard_path(shard) for shard in range(len(manifest.data.shards))]
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.tarfile_to_samples(),
        wds.decode(),
        pairs,
        wds.shuffle(4096),
        wds.batched(num_pairs, collation_fn=collate, partial=True),
    )
    return iter(pipeline)


def measure_webdataset(manifest: Manifest) -> tuple[float, float]:
    """Tokens a second and a CPU-second of a pass over the corpus, from the second batch on."""
    batches = webdataset_batches(manifest, 32)  # about as large as "small batches"
    next(batches)
    tokens, began, cpu_began = 0, time.perf_counter(), time.process_time()
    for source, target in batches:
        tokens += int((source != 0).sum()) + int((target != 0).sum())
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu_began)


def measure_plan(lengths_file: Path, lanes: int, tokens_per_step: int) -> PlanResult:
    """Plan a made-up corpus whose lengths lie in a file; to be run in a process of its own."""
    lengths = np.load(lengths_file, mmap_mode="r")
    sizes = np.full(len(lengths) // 1024, 1024)
    before_mib = peak_mib()
    cpu_began, began = time.process_time(), time.perf_counter()
    plan = Plan(
        lengths, sizes, lanes=lanes, tokens_per_step=tokens_per_step, window_pairs=65_536, seed=1
    )
    cpu_built, built = time.process_time(), time.perf_counter()
    plan.target_tokens(123_456_789)
    scheduled = time.perf_counter()
    plan.step(123_456_789)
    opened = time.perf_counter()
    for step in range(123_456_790, 123_456_890):
        plan.step(step)
    ended = time.perf_counter()
    peak = peak_mib() - before_mib
    kept = lengths_file.with_suffix(f".{lanes}.plan")
    _write(kept, "benchmark", plan.tables)
    reopen_began = time.process_time()
    Plan(
        lengths, sizes, lanes=lanes, tokens_per_step=tokens_per_step, window_pairs=65_536, seed=1,
        tables=_read(kept, "benchmark"),
    )  # fmt: skip
    reopened = time.process_time() - reopen_began
    return PlanResult(
        num_pairs=len(lengths),
        mean_length=float(lengths[:: 1 << 10].mean()),
        lanes=lanes,
        tokens_per_step=tokens_per_step,
        build_s=built - began,
        build_cpu_s=cpu_built - cpu_began,
        epoch_s=scheduled - built,
        first_step_s=opened - scheduled,
        step_s=(ended - opened) / 100,
        peak_mib=peak,
        reopen_cpu_s=reopened,
        lengths_mib=lengths.nbytes / 2**20,
        steps_per_epoch=plan.steps_per_epoch,
        padding_efficiency=sum(plan.padding_efficiency()) / 2,
    )


def peak_mib() -> float:
    """The most memory this process has held, the pages of memory-mapped files included."""
    # Not ru_maxrss: it begins with the peak of whoever started the process.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def made_up_lengths(manifest: Manifest, file: Path, num_pairs: int) -> None:
    """Lengths of the corpus, drawn with replacement and one to three times as long."""
    generator = np.random.default_rng(0)
    num_pairs -= num_pairs % 1024
    lengths = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint16, shape=(num_pairs, 2))
    for start in range(0, num_pairs, 1 << 20):
        part = lengths[start : start + (1 << 20)]
        rows = manifest.lengths[generator.integers(0, manifest.num_pairs, len(part))]
        part[:] = rows * generator.integers(1, 4, (len(part), 1), dtype=np.uint16)
    lengths.flush()


def measure_plans(manifest: Manifest, folder: Path, num_pairs: int) -> list[dict[str, object]]:
    """Each in a process of its own, so that its peak memory is its own."""
    file = folder / "lengths.npy"
    made_up_lengths(manifest, file, num_pairs)
    results = []
    for lanes, tokens in ((8, 25_000), (64, 200_000)):
        command = [sys.executable, __file__, "--plan", str(file), str(lanes), str(tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output))
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "stream.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", type=int, default=3, help="passes over the corpus a repeat")
    parser.add_argument(
        "--pairs", type=int, default=PLANNED_PAIRS, help="size of the made-up corpus"
    )
    parser.add_argument("--plan", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        file, lanes, tokens = arguments.plan
        print(json.dumps(asdict(measure_plan(Path(file), int(lanes), int(tokens)))))
        return

    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        config = corpus_config(arguments.corpora, Path(folder), vocabulary_size=8000)
        manifest = Manifest.load(prepare(config))
        print(f"stream, one core: {config.corpus}, {manifest.num_pairs:,} pairs")
        print(f"{'':32}{'tokens/s':>12}{'tokens/CPU s':>14}{'first step':>12}{'unpadded':>10}")
        streams, others = [], []
        for case in CASES:
            result = measure_stream(manifest, case, arguments.repeats, arguments.passes)
            streams.append(result)
            others.append(measure_webdataset(manifest))  # in turns
            print(
                f"{case.name:32}{result.tokens_per_s:12,.0f}{result.tokens_per_cpu_s:14,.0f}"
                f"{result.first_step_s:10.2f} s{result.padding_efficiency:10.3f}"
            )
        webdataset, webdataset_cpu = (Spread.of(values) for values in zip(*others, strict=True))
        print(f"{'webdataset':32}{webdataset.median:12,.0f}{webdataset_cpu.median:14,.0f}")
        print(f"plan, one core: {arguments.pairs:,} made-up pairs")
        plans = measure_plans(manifest, Path(folder), arguments.pairs)
        for plan in plans:
            print(
                f"  {plan['lanes']} lanes: built in {plan['build_s']:.1f} s "
                f"({plan['build_cpu_s']:.1f} CPU s) with "
                f"{plan['peak_mib']:.0f} MiB (lengths {plan['lengths_mib']:.0f}); an epoch's order "
                f"{plan['epoch_s'] * 1e3:.0f} ms; first step {plan['first_step_s'] * 1e3:.0f} ms, "
                f"then {plan['step_s'] * 1e6:.0f} us a step; kept in a file and opened again "
                f"{plan['reopen_cpu_s'] * 1e3:.0f} CPU ms"
            )
        corpus = {"name": config.corpus, "pairs": manifest.num_pairs}
        corpus["tokens"] = manifest.data.source_tokens + manifest.data.target_tokens
    by_clock = min(result.tokens_per_s for result in streams)
    by_cpu = min(result.tokens_per_cpu_s for result in streams)
    print(
        f"goal {GOAL_TOKENS_PER_S:,} tokens/s, slowest case: {by_clock / GOAL_TOKENS_PER_S:.2f} of "
        f"it by the clock, {by_cpu / GOAL_TOKENS_PER_S:.2f} by processor time "
        f"(load {before['load_average']:.1f} to {os.getloadavg()[0]:.1f})"
    )
    content = {
        "corpus": corpus,
        "goal_tokens_per_s": GOAL_TOKENS_PER_S,
        "stream": [asdict(result) for result in streams],
        "webdataset": {
            "tokens_per_s": asdict(webdataset),
            "tokens_per_cpu_s": asdict(webdataset_cpu),
        },
        "plan": plans,
        "summary": [
            row("WebDataset's loader, pair by pair", webdataset, "tokens/s"),
            *(
                row(
                    result.case.name,
                    Spread(
                        result.tokens_per_s,
                        result.tokens_per_s_lowest,
                        result.tokens_per_s_highest,
                    ),
                    "tokens/s",
                    goal=GOAL_TOKENS_PER_S,
                )
                for result in streams
            ),
            *(
                row(
                    f"plan of {arguments.pairs:,} pairs, {plan['lanes']} lanes: {what}",
                    float(str(plan[value])),
                    unit,
                    goal=goal,
                    higher_is_better=False,
                )
                for plan in plans
                for what, value, unit, goal in (
                    ("made", "build_cpu_s", "CPU s", None),
                    ("memory", "peak_mib", "MiB", 1024),
                )
            ),
        ],
    }
    write_result(arguments.output, before, content)


if __name__ == "__main__":
    main()
