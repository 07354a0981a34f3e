"""What the scaling model takes from this code, measured here: see docs/scaling.md.

    python benchmarks/scaling_parts.py   # two minutes; writes benchmarks/results/scaling_parts.json

Of the plan: padding, and how much longer the fullest lane of a step computes than the mean lane, on
made-up corpora of the size of WMT14. Of the model: how long the CPU alone is busy with a lane's
forward and backward pass whatever its width (what a GPU waits for when batches are small), and how
many bytes autograd keeps a token, and how many whatever the tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, write_result
from numpy.typing import NDArray

from data_shards.plan import Plan
from model.config import ModelConfig
from model.cost import Work, forward_flops

VOCABULARY = 37_000
EN_DE_PAIRS = 4_500_000
EN_FR_PAIRS = 36_000_000
MAX_LENGTH = 256
# Of the made-up lengths. MLPerf's 8 A100 had 1,213 steps of 100,937 target tokens an epoch of
# 4,590,101 pairs (docs/scaling.md): 26.7 a pair.
_MEDIAN, _SIGMA, _RATIO_SIGMA = 22.0, 0.62, 0.2

# Source tokens a lane: what a GPU is given of 25,000 and of 400,000 a step, and more.
TOKENS_PER_LANE = (512, 781, 1562, 3125, 6250, 12_500, 25_000, 50_000)
LANES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SAMPLED_STEPS = 2000


def made_up_lengths(num_pairs: int) -> NDArray[np.uint16]:
    """Lengths [pairs, 2] with a long tail, cut at MAX_LENGTH; a whole number of blocks of 1,024."""
    generator = np.random.default_rng(0)
    num_pairs -= num_pairs % 1024
    source = generator.lognormal(np.log(_MEDIAN), _SIGMA, num_pairs)
    target = source * generator.lognormal(0.0, _RATIO_SIGMA, num_pairs)
    both = np.stack([source, target], axis=1) + 1  # the end sign
    lengths: NDArray[np.uint16] = np.clip(both.round(), 2, MAX_LENGTH).astype(np.uint16)
    return lengths


def pair_moments(lengths: NDArray[np.uint16]) -> dict[str, float]:
    """Means over pairs of what ``model.cost.Work`` sums."""
    s, t = lengths.astype(np.float64).T
    means = {"source": s, "target": t, "source_source": s * s, "source_target": s * t}
    return {name: float(v.mean()) for name, v in {**means, "target_target": t * t}.items()}


def plan_of(lengths: NDArray[np.uint16], lanes: int, tokens_per_lane: int) -> Plan:
    """As a run would make it."""
    return Plan(
        lengths,
        np.full(len(lengths) // 1024, 1024),
        lanes=lanes,
        tokens_per_step=lanes * tokens_per_lane,
        window_pairs=65_536,
        seed=1,
    )


def balance(plan: Plan, config: ModelConfig) -> dict[str, float]:
    """How evenly one lane a rank is loaded: means over steps of an epoch.

    ``imbalance`` is what the fullest lane computes over what the mean lane does, padding included:
    all wait for the fullest.
    """
    # The plan's own table: batch by batch this would take minutes.
    table, schedule = plan._batches, plan._epoch(0).schedule
    chosen = np.linspace(0, len(schedule) - 1, min(_SAMPLED_STEPS, len(schedule))).astype(int)
    index = schedule[chosen]  # [steps, lanes]; -1 is an empty batch
    num, s, t = (
        column[index].astype(np.float64)
        for column in (table.num, table.source_length, table.target_length)
    )
    padded = forward_flops(
        config,
        Work(num * s, num * t, num * s * s, num * s * t, num * t * t),  # type: ignore[arg-type]
        vocab_size=VOCABULARY,
    )
    flops: NDArray[np.float64] = np.asarray(padded)
    return {
        "lanes": plan.lanes,
        "tokens_per_lane": plan.tokens_per_batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "source_tokens_per_step": float(table.num_source_tokens[index].sum(axis=1).mean()),
        "target_tokens_per_step": float(table.num_target_tokens[index].sum(axis=1).mean()),
        "padding_efficiency": sum(plan.padding_efficiency()) / 2,
        "imbalance": float(flops.max(axis=1).mean() / flops.mean()),
        "empty_share": float((index < 0).mean()),
    }


def balances(num_pairs: int, say: Any) -> list[dict[str, float]]:
    """Of all sensible sizes; a lane must hold the longest pair, an epoch some steps."""
    lengths = made_up_lengths(num_pairs)
    config = ModelConfig(preset="big")
    rows = []
    for tokens_per_lane in TOKENS_PER_LANE:
        for lanes in LANES:
            if len(lengths) * lengths.mean() / (lanes * tokens_per_lane) < 100:
                continue
            row = balance(plan_of(lengths, lanes, tokens_per_lane), config)
            rows.append(row)
            say(
                f"  {lanes:4} lanes of {tokens_per_lane:6,} tokens: imbalance "
                f"{row['imbalance']:.3f}, unpadded {row['padding_efficiency']:.3f}, empty "
                f"{row['empty_share']:.4f}"
            )
    return rows


def dispatch(repeats: int) -> dict[str, float]:
    """CPU seconds of a lane's forward and backward pass, by the layers alone.

    The paper's twelve layers, so narrow and the batch so small that the arithmetic is nothing:
    Python, PyTorch's dispatcher and autograd are left. Launching CUDA's kernels comes on top.
    """
    import torch

    from model.build import build

    torch.set_num_threads(1)
    config = ModelConfig(preset="base", d_model=16, d_ff=16, num_heads=2)
    model = build(config, 32).train()
    source = torch.randint(4, 32, (1, 4))
    target = torch.randint(4, 32, (1, 4))
    operations = _counter()
    with operations:
        loss, _ = model.training_loss(source, target, target, 0.1)
        loss.backward()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        loss, _ = model.training_loss(source, target, target, 0.1)
        loss.backward()
        times.append(time.process_time() - began)
    # The least: a floor is asked for, and other work on the machine only adds.
    return {"operations": operations.number, "seconds": min(times)}


def _counter() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            # Views launch nothing.
            if not func.is_view:
                self.number += 1
            return func(*args, **(kwargs or {}))

    return Counter()


def host_reduction(ranks: int, repeats: int) -> float:
    """CPU seconds a step for what the ranks tell each other: packed, summed by one rank, unpacked.

    The longer the more ranks: two numbers a rank and one a lane (trainer/loop.py).
    """
    import torch

    from trainer.measures import Measured, Measures

    measures = Measures(
        ModelConfig(preset="big"),
        vocab_size=VOCABULARY,
        rank=0,
        world_size=ranks,
        energy=None,  # type: ignore[arg-type]  # not read at this step
        energy_every=1 << 30,
        stragglers=True,
    )
    since, bad_lanes = Measured(), torch.zeros(ranks)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        numbers = torch.tensor([0.0] * 14 + measures.pack(1, [], None), dtype=torch.float64)
        values = torch.cat([numbers, bad_lanes.double()]).tolist()
        since += measures.unpack(values[14 : 14 + measures.size])
        times.append(time.process_time() - began)
    return statistics.median(times)


def kept_bytes(preset: str) -> tuple[float, float]:
    """Bytes that autograd keeps for the backward pass: a target token with its source token, once.

    Once there is the softmax matrix' gradient, which the loss has before the backward pass asks.
    """
    import torch

    from model.build import build

    model = build(ModelConfig(preset=preset), VOCABULARY).to(torch.bfloat16).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    length, few, many = 32, 4, 8

    def kept(num_pairs: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        source = torch.randint(4, VOCABULARY, (num_pairs, length))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model.training_loss(source, source, source, 0.1)
        del loss
        return sum(storages.values())

    of_few, of_many = kept(few), kept(many)
    per_token = (of_many - of_few) / ((many - few) * length)
    return per_token, of_many - many * length * per_token


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_parts.json")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    before = machine()
    content: dict[str, Any] = {"dispatch": dispatch(arguments.repeats)}
    print(
        f"a lane's forward and backward: {content['dispatch']['operations']} operations, "
        f"{content['dispatch']['seconds'] * 1e3:.1f} CPU ms"
    )
    content["host_reduction_s"] = {n: host_reduction(n, arguments.repeats) for n in (8, 512)}
    print(f"the step's own sum, CPU ms: {content['host_reduction_s']}")
    content["corpus"] = pair_moments(made_up_lengths(EN_DE_PAIRS))
    kept = {name: kept_bytes(name) for name in ("base", "big")}
    content["kept_bytes_per_token"] = {name: found[0] for name, found in kept.items()}
    content["kept_bytes_once"] = {name: found[1] for name, found in kept.items()}
    print(f"kept for backward, bytes a token and once: {kept}")
    for name, pairs in (("en_de", EN_DE_PAIRS), ("en_fr", EN_FR_PAIRS)):
        print(f"{name}: {pairs:,} made-up pairs")
        if name == "en_fr":
            # As for the small corpus, but for these: what a hundred times the windows change.
            lengths, config = made_up_lengths(pairs), ModelConfig(preset="big")
            rows = [
                balance(plan_of(lengths, lanes, tokens), config)
                for lanes, tokens in ((8, 3125), (64, 781), (128, 3125), (512, 781))
            ]
        else:
            rows = balances(pairs, print)
        content[f"balance_{name}"] = rows
    write_result(arguments.output, before, content)


if __name__ == "__main__":
    main()
