"""How fast one thread trains: this trainer against other toolkits, taking turns.

    python benchmarks/peers/compare.py     # prints a table, writes benchmarks/results/peers.json

Every peer trains the same shape on the same pieces of the same corpus, with the same budget of
tokens a batch and as many batches an optimizer step, by its own training loop, in an environment of
its own (made here, see ``environments.py``); what does not install is left out, and said. Rates are
real source and target pieces with an end sign each (padding left out) per second of processor time
of all threads of the process, start-up and a warm-up left out. Where a peer offers bfloat16 on
processors, both precisions are measured. How each is called is in its script beside this one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from environments import DEFAULT, NotInstalled, python_of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from common import (  # noqa: E402
    ALLOCATOR,
    RESULTS,
    Turn,
    Worker,
    chosen_corpus,
    default_corpora,
    machine,
    rates,
    ratios,
    row,
    take_turns,
    uninterrupted,
    write_result,
)
from train import read_pairs  # noqa: E402

from data_shards.manifest import Manifest  # noqa: E402
from data_shards.shards import prepare  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from trainer.config import RunConfig  # noqa: E402

OURS = "babelray"


@dataclass(frozen=True)
class Peer:
    """Another toolkit; ``name`` is its script's, its requirements' and its environment's."""

    name: str
    title: str
    package: str
    precisions: tuple[str, ...] = ("fp32",)


# Not fairseq: 0.12.2, the last release, has no wheel for Python 3.11, whose dataclasses refuse its
# configuration.
PEERS = (
    Peer("huggingface", "Hugging Face Trainer", "transformers", ("bf16", "fp32")),
    Peer("opennmt", "OpenNMT-py", "OpenNMT-py"),
    Peer("joeynmt", "JoeyNMT", "joeynmt"),
    Peer("sockeye", "Sockeye", "sockeye"),
    Peer("marian", "Marian", "pymarian"),
)


@dataclass(frozen=True)
class Shape:
    """A model of the paper's presets, and how long it is measured."""

    preset: str
    rounds: int
    seconds: float


SHAPES = (Shape("tiny", rounds=5, seconds=6), Shape("base", rounds=3, seconds=20))


def export(manifest: Manifest, folder: Path) -> dict[str, object]:
    """The corpus' pieces as words, one sentence a line; what a job says of them."""
    files = {side: folder / f"{side}.txt" for side in ("source", "target")}
    # The end sign is the toolkits' own affair.
    sides = zip(*read_pairs(manifest), strict=True)
    for file, sentences in zip(files.values(), sides, strict=True):
        with file.open("w") as lines:
            for ids in sentences:
                lines.write(" ".join(f"w{piece}" for piece in ids[:-1].tolist()) + "\n")
    words = folder / "words.txt"
    words.write_text("".join(f"w{piece}\n" for piece in range(4, manifest.vocabulary_size)))
    job: dict[str, object] = {side: str(file) for side, file in files.items()}
    return {**job, "words": str(words), "num_words": manifest.vocabulary_size}


def our_worker(config: RunConfig, folder: Path) -> Worker:
    """This trainer's whole loop, as ``train.py`` measures it."""
    precision = config.trainer.precision
    run_dir = folder / f"{OURS}-{precision}"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config.to_json())
    command = [sys.executable, str(HERE.parent / "train.py"), "--worker", "ours", str(run_dir)]
    return Worker(f"{OURS} {precision}", "ours", run_dir, environment=ALLOCATOR, command=command)


def peer_worker(
    peer: Peer, precision: str, python: Path, config: RunConfig, job: dict[str, object], root: Path
) -> Worker:
    """A peer's process; raises RuntimeError with its last words if it does not come to train."""
    folder = root / f"{peer.name}-{precision}"
    folder.mkdir()
    shape, data = config.model, config.data
    content = {
        **job,
        "precision": precision,
        "layers": shape.encoder_layers,
        "d_model": shape.d_model,
        "d_ff": shape.d_ff,
        "num_heads": shape.num_heads,
        "dropout": shape.dropout,
        "norm": shape.norm,
        "label_smoothing": config.trainer.label_smoothing,
        "tokens": data.tokens_per_step // data.lanes,
        "batches": data.lanes,
    }
    (folder / "job.json").write_text(json.dumps(content, indent=2))
    command = [str(python), str(HERE / f"train_{peer.name}.py"), str(folder)]
    name = f"{peer.title} {precision}"
    # The allocator's settings are no peer's own, but they help all alike.
    return Worker(name, peer.name, folder, environment=ALLOCATOR, command=command)


def compare(
    shape: Shape,
    arguments: argparse.Namespace,
    pythons: dict[Peer, Path],
    skipped: dict[str, str],
    folder: Path,
) -> dict[str, Any]:
    """One shape, this trainer and each other in turns; prints and returns the rows of its table.

    A peer that does not come to train, or stops, is put into ``skipped`` with its reason.
    """
    data = chosen_corpus(arguments, folder)
    manifest = Manifest.load(prepare(data))
    root = folder / shape.preset
    root.mkdir()
    job = export(manifest, root)
    lengths = np.asarray(manifest.lengths)
    print(
        f"{shape.preset}: {data.corpus}, {manifest.num_pairs:,} pairs ({int(lengths.sum()):,} "
        f"tokens), vocabulary {manifest.vocabulary_size:,}, {data.tokens_per_step} tokens a side "
        f"and step in {data.lanes} batches"
    )
    configs = {
        precision: RunConfig(
            model=ModelConfig(preset=shape.preset),
            data=data,
            trainer=uninterrupted(precision=precision),
        )
        for precision in ("bf16", "fp32")
    }
    # Two at a time: a process of base holds gigabytes.
    measured: dict[str, tuple[list[Turn], list[Turn]]] = {}
    ours = our_worker(configs["bf16"], root)
    try:
        ours.turn(2 * shape.seconds)
        for name, start in contestants(configs, pythons, job, root):
            try:
                other = start()
            except RuntimeError as error:
                skip(skipped, f"{name}, {shape.preset}", error)
                continue
            try:
                # Matrix products in bfloat16 are compiled for each shape of batch that comes.
                other.turn(2 * shape.seconds)
                pair = [ours, other]
                own, others = take_turns(
                    pair, rounds=shape.rounds, seconds=shape.seconds, say=print
                )
                measured[name] = own, others
            except RuntimeError as error:
                skip(skipped, f"{name}, {shape.preset}", error)
            finally:
                other.close()
    finally:
        ours.close()
    own = [turn for own, _ in measured.values() for turn in own]
    print(f"  {'':28}{'tokens/CPU s':>14}{'lowest':>9}{'highest':>9}{'ours is':>9}")
    rows: list[dict[str, object]] = []
    summary: list[dict[str, object]] = []
    for name, (mine, others) in {f"{OURS} bf16": (own, own), **measured}.items():
        rate, ratio = rates(others), ratios(mine, others)
        print(
            f"  {name:28}{rate.median:14,.0f}{rate.lowest:9,.0f}{rate.highest:9,.0f}"
            f"{ratio.median:9.2f}"
        )
        rows.append(
            {
                "name": name,
                "tokens_per_cpu_s": asdict(rate),
                "babelray_bf16_is_times_as_fast": asdict(ratio),
                "turns": [asdict(turn) for turn in others],
            }
        )
        if not name.startswith(OURS):
            what = f"{shape.preset}, {OURS} bf16"
            line = row(what, rates(mine), "tokens/CPU s", ratio=ratio, against=name, goal=1.0)
            summary.append(line)
    return {
        "shape": shape.preset,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average": os.getloadavg()[0],
        "corpus": data.corpus,
        "pairs": manifest.num_pairs,
        "vocabulary_size": manifest.vocabulary_size,
        "tokens_per_step": data.tokens_per_step,
        "lanes": data.lanes,
        "rounds": shape.rounds,
        "seconds": shape.seconds,
        "contestants": rows,
        "summary": summary,
    }


def contestants(
    configs: dict[str, RunConfig], pythons: dict[Peer, Path], job: dict[str, object], root: Path
) -> Iterator[tuple[str, Callable[[], Worker]]]:
    """Whom bfloat16 of this trainer is compared with: a name and what starts it."""
    yield f"{OURS} fp32", partial(our_worker, configs["fp32"], root)
    for peer, python in pythons.items():
        for precision in peer.precisions:
            start = partial(peer_worker, peer, precision, python, configs["fp32"], job, root)
            yield f"{peer.title} {precision}", start


def skip(skipped: dict[str, str], who: str, error: Exception) -> None:
    """Note and say, in a line, why someone is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    skipped[who] = (lines[-1] if lines else type(error).__name__)[:300]
    print(f"  without {who}: {skipped[who]}")


def main() -> None:
    """Install, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--venvs", type=Path, default=DEFAULT, help="the peers' environments")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS], metavar="NAME")
    parser.add_argument("--shapes", nargs="+", choices=[shape.preset for shape in SHAPES])
    parser.add_argument("--vocabulary-size", type=int, default=8000)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--lanes", type=int, default=2, help="batches a step, of every contestant")
    parser.add_argument("--rounds", type=int, help="turns of each; by default the shape's own")
    parser.add_argument("--seconds", type=float, help="CPU seconds a turn; likewise")
    parser.add_argument("--quick", action="store_true", help="tiny alone, two short turns each")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    skipped: dict[str, str] = {}
    pythons: dict[Peer, Path] = {}
    for peer in PEERS:
        if arguments.peers and peer.name not in arguments.peers:
            continue
        try:
            pythons[peer] = python_of(peer.name, arguments.venvs, print)
        except NotInstalled as error:
            skip(skipped, peer.title, error)
    wanted = arguments.shapes or (["tiny"] if arguments.quick else [s.preset for s in SHAPES])
    shapes = [
        Shape(
            shape.preset,
            arguments.rounds or (2 if arguments.quick else shape.rounds),
            arguments.seconds or (3 if arguments.quick else shape.seconds),
        )
        for shape in SHAPES
        if shape.preset in wanted
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(shape, arguments, pythons, skipped, Path(folder)) for shape in shapes]
    results = [*kept(arguments.output, wanted), *results]
    results.sort(key=lambda result: [shape.preset for shape in SHAPES].index(str(result["shape"])))
    content = {
        "versions": {peer.name: pinned(peer) for peer in PEERS},
        "skipped": skipped,
        "results": results,
        "summary": [line for result in results for line in result["summary"]],
    }
    write_result(arguments.output, before, content)


def kept(output: Path, wanted: list[str]) -> list[dict[str, Any]]:
    """Shapes that the file has from another run, with their own dates."""
    if not output.is_file():
        return []
    results: list[dict[str, Any]] = json.loads(output.read_text())["results"]
    return [result for result in results if result["shape"] not in wanted]


def pinned(peer: Peer) -> str:
    """The peer's version in its requirements."""
    for line in (HERE / f"{peer.name}.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name.lower() == peer.package.lower():
            return version.split()[0]
    raise AssertionError(f"{peer.name}.txt does not pin {peer.package}")


if __name__ == "__main__":
    main()
