"""How fast one thread trains: this trainer against a plain PyTorch loop, taking turns.

    python benchmarks/train.py             # prints a table, writes benchmarks/results/train.json

The plain loop is float32 around ``torch.nn.Transformer``: the same shape, tied embeddings, batches
of sentences sorted by length under the same token budget, the same data. ``nn.Transformer`` also
drops attention weights and activations inside the feed-forward, which the paper and this project's
presets do not; a second plain loop, "tuned", leaves that out and also has the allocator settings
that ``babelray train`` gives its workers. Rates are real source and target tokens
(padding left out) per second of processor time, of all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import (
    ALLOCATOR,
    RESULTS,
    Meter,
    Spread,
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

from data_shards.config import BOS_ID, PAD_ID
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig, parse_config

if TYPE_CHECKING:
    from torch import Tensor, nn

GOALS = {"tiny": 3.0, "base": 2.3}
GOAL_UNPADDED = 0.97


@dataclass(frozen=True)
class Shape:
    """A model of the paper's presets, and how long it is measured.

    The warm-up is what a run has behind it after its first minute: in bfloat16 oneDNN compiles each
    product of matrices when it first meets its shape, and an epoch's shapes come again.
    """

    preset: str
    rounds: int
    seconds: float
    warm_up_s: float


SHAPES = (
    Shape("tiny", rounds=5, seconds=6, warm_up_s=50),
    Shape("base", rounds=3, seconds=20, warm_up_s=20),
)
CONTESTANTS = {
    "babelray bf16": ("ours", "bf16"),
    "babelray fp32": ("ours", "fp32"),
    "plain fp32, tuned": ("plain-tuned", "fp32"),
    "plain fp32": ("plain", "fp32"),
}


def run_config(run_dir: Path) -> RunConfig:
    """The configuration that lies in a contestant's folder."""
    file = run_dir / "config.json"
    return parse_config(json.loads(file.read_text()), where=str(file))


# This project's trainer.


def train_ours(run_dir: Path, meter: Meter) -> None:
    """The trainer's own loop (plan, stream, DeepSpeed, events, metrics), stopped between turns."""
    from trainer.events import EventLog
    from trainer.loop import Loop
    from trainer.metrics import RankMetrics, RunMetrics
    from trainer.rank import Rank
    from trainer.reporter import Voices

    class Events(EventLog):
        """Logs every step; the loop stands still while the meter waits for a turn."""

        tokens = 0

        def write(self, event: str, **values: Any) -> None:
            super().write(event, **values)
            if event == "step":
                tokens = values["source_tokens"] + values["target_tokens"]
                self.tokens, new = tokens, tokens - self.tokens
                meter.stepped(new)

    one_rank(run_dir)
    config = run_config(run_dir)
    rank = Rank(config, run_dir, rank=0, world_size=1, local_rank=0)
    rank.prepare()
    meter.start()
    voices = Voices(
        Events(run_dir / "events.jsonl"), RunMetrics("benchmark"), RankMetrics("benchmark", 0)
    )
    Loop(rank, voices).run()


# The plain loop. It shares no code with the trainer, except for what reads the corpus.


def plain_batches(
    lengths: np.ndarray, budget: int, generator: np.random.Generator
) -> list[list[int]]:
    """Pairs sorted by length (ties at random), cut where the padded batch would exceed the budget;
    the batches shuffled.
    """
    order = np.lexsort((generator.random(len(lengths)), lengths[:, 0], lengths[:, 1]))
    batches: list[list[int]] = [[]]
    longest = 0
    for pair in order.tolist():
        longest = max(longest, int(lengths[pair].max()))
        if longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = int(lengths[pair].max())
        batches[-1].append(pair)
    generator.shuffle(batches)
    return batches


def read_pairs(manifest: Manifest) -> list[tuple[Tensor, Tensor]]:
    """All pairs of the corpus in memory, end signs included."""
    import torch

    from data_shards.blocks import decode_block

    pairs = []
    for block in manifest.blocks:
        with Path(manifest.shard_path(int(block["shard"]))).open("rb") as shard:
            shard.seek(int(block["offset"]))
            content = decode_block(shard.read(int(block["bytes"])))
        sides = []
        for ids, lengths in zip(
            (content.source_ids, content.target_ids), content.lengths.T, strict=True
        ):
            tensor = torch.from_numpy(ids.astype(np.int64))
            sides.append(tensor.split(lengths.astype(np.int64).tolist()))
        pairs += zip(*sides, strict=True)
    return pairs


def plain_model(config: ModelConfig, vocab_size: int) -> nn.Module:
    """``torch.nn.Transformer`` with one embedding for source, target and softmax."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = config.d_model
            self.embedding = nn.Embedding(vocab_size, width, padding_idx=PAD_ID)
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            position = torch.arange(config.max_positions)[:, None]
            angle = position * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
            table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
            self.register_buffer("positions", table)
            self.dropout = nn.Dropout(config.dropout)
            self.transformer = nn.Transformer(
                d_model=width,
                nhead=config.num_heads,
                num_encoder_layers=config.encoder_layers,
                num_decoder_layers=config.decoder_layers,
                dim_feedforward=config.d_ff,
                dropout=config.dropout,
                batch_first=True,
                norm_first=config.norm == "pre",
            )
            self.scale = width**0.5

        def embed(self, ids: Tensor) -> Tensor:
            return self.dropout(self.embedding(ids) * self.scale + self.positions[: ids.size(1)])

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(
                target.size(1), dtype=torch.bool
            )
            padding = source == PAD_ID
            states = self.transformer(
                self.embed(source),
                self.embed(target),
                tgt_mask=causal,
                tgt_is_causal=True,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
                tgt_key_padding_mask=target == PAD_ID,
            )
            return nn.functional.linear(states, self.embedding.weight)

    return Model()


def drop_less(model: nn.Module) -> None:
    """Leave dropout to the embeddings and to what the sub-layers give."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            module.dropout = nn.Identity()


PlainStep = tuple[list[tuple["Tensor", "Tensor", "Tensor"]], int, int]


def plain_steps(config: RunConfig, manifest: Manifest) -> Iterator[PlainStep]:
    """Endless steps, as many batches each as the trainer has lanes.

    Each is its batches (source, decoder's input and reference, padded), and how many source and how
    many target tokens they hold.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    pairs, lengths = read_pairs(manifest), np.asarray(manifest.lengths)
    generator = np.random.default_rng(config.trainer.seed)
    begin = torch.tensor([BOS_ID])

    def batches() -> Iterator[list[int]]:
        while True:
            budget = config.data.tokens_per_step // config.data.lanes
            yield from plain_batches(lengths, budget, generator)

    def padded(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        sources, targets = zip(*(pairs[pair] for pair in batch), strict=True)
        source = pad_sequence(sources, batch_first=True, padding_value=PAD_ID)
        target = pad_sequence(targets, batch_first=True, padding_value=PAD_ID)
        shifted = [torch.cat([begin, ids[:-1]]) for ids in targets]
        return source, pad_sequence(shifted, batch_first=True, padding_value=PAD_ID), target

    stream = batches()
    while True:
        step = [next(stream) for _ in range(config.data.lanes)]
        source_tokens, target_tokens = (int(lengths[np.concatenate(step), i].sum()) for i in (0, 1))
        yield [padded(batch) for batch in step], source_tokens, target_tokens


def plain_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], smoothing: float = 0.0
) -> Tensor:
    """Smoothed cross-entropy, summed over the batch's targets."""
    from torch.nn.functional import cross_entropy

    source, target_in, target = batch
    return cross_entropy(
        model(source, target_in).flatten(0, 1),
        target.flatten(),
        ignore_index=PAD_ID,
        label_smoothing=smoothing,
        reduction="sum",
    )


def train_plain(run_dir: Path, meter: Meter, *, less_dropout: bool = False) -> None:
    """The loop that one would write by hand; as many batches a step as the trainer has lanes."""
    import torch

    torch.set_num_threads(1)
    config = run_config(run_dir)
    manifest = Manifest.load(config.data.folder())
    torch.manual_seed(config.trainer.seed)
    model = plain_model(config.model, manifest.vocabulary_size).train()
    if less_dropout:
        drop_less(model)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True
    )
    steps = plain_steps(config, manifest)
    meter.start()
    for batches, source_tokens, target_tokens in steps:
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            loss = plain_loss(model, batch, config.trainer.label_smoothing)
            (loss / target_tokens).backward()
        optimizer.step()
        meter.stepped(source_tokens + target_tokens)


WORKERS: dict[str, Callable[[Path, Meter], None]] = {
    "ours": train_ours,
    "plain": train_plain,
    "plain-tuned": partial(train_plain, less_dropout=True),
}


# The comparison.


def padding_efficiencies(manifest: Manifest, config: RunConfig) -> dict[str, float]:
    """Real tokens as part of all, both sides together, over an epoch of each."""
    data = config.data
    lengths = np.asarray(manifest.lengths, dtype=np.int64)
    generator = np.random.default_rng(config.trainer.seed)
    plan = Plan.of(manifest, data, config.trainer.seed)
    ours = [
        (len(batch.rows), batch.source_length + batch.target_length)
        for step in plan.steps(0, plan.steps_per_epoch)
        for batch in step
    ]
    plain = [
        (len(batch), int(lengths[batch].max(axis=0).sum()))
        for batch in plain_batches(lengths, data.tokens_per_step // data.lanes, generator)
    ]
    real = int(lengths.sum())
    return {
        kind: real / sum(num * width for num, width in batches)
        for kind, batches in (("ours", ours), ("plain", plain))
    }


def compare(shape: Shape, arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One shape, all contestants in turns; prints and returns the rows of its table."""
    data = chosen_corpus(arguments, folder)
    manifest = Manifest.load(prepare(data))
    model = ModelConfig(preset=shape.preset)
    workers = []
    for name, (kind, precision) in CONTESTANTS.items():
        trainer = uninterrupted(precision=precision)
        config = RunConfig(model=model, data=data, trainer=trainer)
        run_dir = folder / f"{shape.preset} {name}"
        run_dir.mkdir()
        (run_dir / "config.json").write_text(config.to_json())
        workers.append(
            Worker(name, kind, run_dir, environment={} if kind == "plain" else ALLOCATOR)
        )
    print(
        f"{shape.preset}: {data.corpus}, {manifest.num_pairs:,} pairs, vocabulary "
        f"{manifest.vocabulary_size:,}, {data.tokens_per_step} tokens a side and step in "
        f"{data.lanes} batches"
    )
    try:
        turns = take_turns(
            workers,
            rounds=shape.rounds,
            seconds=shape.seconds,
            warm_up_s=shape.warm_up_s,
            say=print,
        )
    finally:
        for worker in workers:
            worker.close()
    unpadded = padding_efficiencies(manifest, config)
    print(f"  {'':26}{'tokens/CPU s':>14}{'lowest':>9}{'highest':>9}{'ratio':>8}{'unpadded':>10}")
    rows = []
    for (name, (kind, _)), own in zip(CONTESTANTS.items(), turns, strict=True):
        rate, ratio = rates(own), ratios(own, turns[-1])
        rows.append(
            {
                "name": name,
                "tokens_per_cpu_s": asdict(rate),
                "ratio": asdict(ratio),
                "padding_efficiency": unpadded[kind.partition("-")[0]],
                "turns": [asdict(turn) for turn in own],
            }
        )
        print(
            f"  {name:26}{rate.median:14,.0f}{rate.lowest:9,.0f}{rate.highest:9,.0f}"
            f"{ratio.median:8.2f}{unpadded[kind.partition('-')[0]]:10.3f}"
        )
    return {
        "shape": shape.preset,
        "corpus": data.corpus,
        "pairs": manifest.num_pairs,
        "vocabulary_size": manifest.vocabulary_size,
        "tokens_per_step": data.tokens_per_step,
        "lanes": data.lanes,
        "rounds": shape.rounds,
        "seconds": shape.seconds,
        "warm_up_s": shape.warm_up_s,
        "contestants": rows,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "train.json")
    parser.add_argument("--shapes", nargs="+", default=[shape.preset for shape in SHAPES])
    parser.add_argument("--vocabulary-size", type=int, default=8000)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=2, help="batches a step, of every contestant")
    parser.add_argument("--rounds", type=int, help="turns of each; by default the shape's own")
    parser.add_argument("--seconds", type=float, help="CPU seconds a turn; likewise")
    parser.add_argument("--warm-up", type=float, help="CPU seconds before the turns; likewise")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, run_dir = arguments.worker
        WORKERS[kind](Path(run_dir), Meter())
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    shapes = [
        Shape(
            shape.preset,
            arguments.rounds or shape.rounds,
            arguments.seconds or shape.seconds,
            shape.warm_up_s if arguments.warm_up is None else arguments.warm_up,
        )
        for shape in SHAPES
        if shape.preset in arguments.shapes
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(shape, arguments, Path(folder)) for shape in shapes]
    best = {
        str(result["shape"]): result["contestants"][0]["ratio"]["median"]  # type: ignore[index]
        for result in results
    }
    print(
        "times the plain loop: "
        + ", ".join(f"{shape} {ratio:.2f} (goal {GOALS[shape]})" for shape, ratio in best.items())
        + f" (load {before['load_average']:.1f})"
    )
    content = {"goal_ratios": GOALS, "results": results, "summary": summarize(results)}
    write_result(arguments.output, before, content)


def summarize(results: list[dict[str, Any]]) -> list[dict[str, object]]:
    """The rows of the table of all benchmarks."""
    rows = []
    for result in results:
        shape, contestants = result["shape"], result["contestants"]
        for contestant in contestants[:2]:
            name = contestant["name"].removeprefix("babelray ")
            rows.append(
                row(
                    f"{shape}, {name}",
                    Spread(**contestant["tokens_per_cpu_s"]),
                    "tokens/CPU s",
                    ratio=Spread(**contestant["ratio"]),
                    against="plain fp32 loop",
                    goal=GOALS[shape] if name == "bf16" else None,
                )
            )
    efficiency = results[0]["contestants"][0]["padding_efficiency"]
    return [*rows, row("part not padding", efficiency, "of all", goal=GOAL_UNPADDED)]


if __name__ == "__main__":
    main()
