"""What ranks send and what it costs: bytes a step, rates of the collectives, 1 to 2 workers.

    python benchmarks/communication.py [--quick] [--parts traffic collectives scaling bleu]

- *traffic*: bytes a rank sends at a step by ZeRO stage, precision and number of ranks: reckoned by
  the formula of scaling_model.py, counted in the collectives, and counted by the kernel on the
  loopback interface of a network namespace of its own (where the system allows one).
- *collectives*: how fast gloo moves numbers between processes of this machine, against a copy.
- *scaling*: one worker, two workers that know nothing of each other side by side, and two joined
  ones, in turns. Side by side is the bound: what is lost there, memory and caches took.
- *bleu* (not in --quick): what gradients rounded to bf16 on their way cost in quality.

Parts that are not asked for stay as the output has them, with the load that they were taken at.

All ranks are processes that run the trainer's own loop, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Spread,
    corpus_config,
    default_corpora,
    machine,
    row,
    write_result,
)
from communication_groups import Group, own_network, write_config

from data_shards.config import DataConfig
from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig, TrainerConfig

ENDLESS = 1_000_000_000
PARTS = ("traffic", "collectives", "scaling", "bleu")


def run_config(data: DataConfig, preset: str, **trainer: Any) -> RunConfig:
    """A training that only these benchmarks end."""
    return RunConfig(
        model=ModelConfig(preset=preset),
        data=data,
        trainer=TrainerConfig(
            threads=1,
            max_steps=ENDLESS,
            validate_every=ENDLESS,
            checkpoint_every=ENDLESS,
            **trainer,
        ),
    )


# Bytes.


@dataclass(frozen=True)
class Case:
    """What is sent is reckoned and counted for one of these."""

    stage: int
    precision: str
    gradient_dtype: str | None = None

    @property
    def name(self) -> str:
        """For the table."""
        compressed = f", {self.gradient_dtype} gradients" if self.gradient_dtype else ""
        return f"ZeRO {self.stage}, {self.precision}{compressed}"


CASES = (
    *(Case(stage, precision) for precision in ("fp32", "bf16") for stage in range(4)),
    Case(0, "fp32", "bf16"),
    Case(1, "fp32", "bf16"),
)


def traffic(data: DataConfig, folder: Path, worlds: list[int], seen: bool) -> list[dict[str, Any]]:
    """A row for each number of ranks and each case."""
    from scaling_model import sent_bytes

    rows = []
    for ranks in worlds:
        place = folder / f"traffic{ranks}"
        place.mkdir()
        folders = []
        for case in CASES:
            extra = {"gradient_dtype": case.gradient_dtype} if case.gradient_dtype else {}
            config = run_config(
                data, "tiny", precision=case.precision, zero_stage=case.stage, **extra
            )
            folders.append(str(write_config(place, case.name, config)))
        group = Group(ranks, place, {"what": "traffic", "folders": folders, "steps": 2})
        found = group.read()
        group.close()
        lanes = data.lanes // ranks
        for case, measured in zip(CASES, found, strict=True):
            size = 4 if case.precision == "fp32" else 2
            gradient = {"fp32": 4, "bf16": 2, None: size}[case.gradient_dtype]
            reckoned = sent_bytes(
                measured["parameters"],
                ranks,
                stage=case.stage,
                lanes=lanes,
                size=size,
                gradient_size=gradient,
            )
            interface = measured["interface_bytes"] if seen else None
            rows.append(
                {
                    "ranks": ranks,
                    "lanes_per_rank": lanes,
                    **asdict(case),
                    "reckoned_bytes": reckoned,
                    **measured,
                    "interface_bytes": interface,
                }
            )
            told = "" if interface is None else f"{interface / 1e6:12.3f}"
            print(
                f"  {ranks} ranks, {lanes} lanes each, {case.name:32}"
                f"{reckoned / 1e6:10.3f}{measured['counted_bytes'] / 1e6:10.3f}{told}"
            )
    return rows


# Rates.


def collectives(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Of two ranks."""
    place = folder / "collectives"
    place.mkdir()
    sizes = [1 << power for power in ((16, 20, 24) if quick else (12, 16, 18, 20, 22, 24, 26, 27))]
    work = {"what": "collectives", "sizes": sizes, "rounds": 5 if quick else 15}
    group = Group(2, place, work)
    rows: list[dict[str, Any]] = group.read()
    group.close()
    print(f"  {'':24}{'':10}{'MB':>8}{'ms':>9}{'CPU ms a rank':>15}{'MB/s':>8}")
    for found in rows:
        cpu_ms = f"{found['cpu_s'] * 1e3:15.2f}" if "cpu_s" in found else " " * 15
        print(
            f"  {found['collective']:24}{found['dtype']:10}{found['bytes'] / 1e6:8.3f}"
            f"{found['wall_s'] * 1e3:9.2f}{cpu_ms}{found['bytes'] / found['wall_s'] / 1e6:8.0f}"
        )
    return rows


# One and two workers.

ALONE, SIDE_BY_SIDE, JOINED = "one worker", "two, each for itself", "two, joined"


def scaling(
    data: DataConfig, folder: Path, preset: str, stage: int, *, rounds: int, seconds: float
) -> dict[str, Any]:
    """All in turns; prints and returns what became of it."""

    def group(name: str, ranks: int) -> Group:
        config = run_config(data, preset, precision="bf16", zero_stage=stage)
        run_dir = write_config(folder, f"{preset}-{stage}-{name}", config)
        made = Group(ranks, run_dir, {"what": "turns", "folder": str(run_dir)})
        made.read()  # until it is set up
        return made

    first, second, both = group("first", 1), group("second", 1), group("both", 2)
    contestants = {ALONE: [first], SIDE_BY_SIDE: [first, second], JOINED: [both]}
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in contestants}
    try:
        with ThreadPoolExecutor(2) as pool:
            for number in range(-1, rounds):
                order = list(contestants)
                for name in order if number % 2 else reversed(order):
                    took = list(pool.map(lambda group: group.turn(seconds), contestants[name]))
                    if number >= 0:  # the first is for warming up
                        turns[name].append(took)
                if number >= 0:
                    told = (f"{name} {_rate(took[-1]):,.0f}" for name, took in turns.items())
                    print(f"  {preset}, ZeRO {stage}, round {number + 1}: " + "; ".join(told))
    finally:
        for one in (first, second, both):
            one.close()
    load = os.getloadavg()[0]
    rows = _summary(turns)
    return {"shape": preset, "zero_stage": stage, "load_average": load, "contestants": rows}


def _rate(took: list[dict[str, Any]]) -> float:
    """Tokens a second of the clock, of all that work at once."""
    return float(sum(turn["tokens"] / turn["wall_s"] for turn in took))


def _cpu_rate(took: list[dict[str, Any]]) -> float:
    """Tokens a CPU-second."""
    return float(sum(turn["tokens"] for turn in took) / sum(turn["cpu_s"] for turn in took))


def _summary(turns: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    rows = []
    print(
        f"  {'':24}{'tokens/s':>10}{'times one':>11}{'of the bound':>14}{'tokens/CPU s':>14}"
        f"{'times one':>11}{'of the bound':>14}{'collectives, CPU':>18}"
    )
    for name, own in turns.items():
        numbers: dict[str, Spread] = {}
        for kind, rate in (("wall", _rate), ("cpu", _cpu_rate)):
            numbers[kind] = Spread.of([rate(took) for took in own])
            for what, other in (("one", ALONE), ("bound", SIDE_BY_SIDE)):
                pairs = zip(own, turns[other], strict=True)
                numbers[f"{kind}_{what}"] = Spread.of([rate(a) / rate(b) for a, b in pairs])
        all_turns = [turn for took in own for turn in took]
        collective = sum(t["collective_cpu_s"] for t in all_turns)
        share = collective / sum(t["cpu_s"] for t in all_turns)
        steps = sum(t["steps"] for t in all_turns)
        phases = {
            phase: sum(t["phases"].get(phase, 0.0) for t in all_turns) / steps
            for phase in all_turns[0]["phases"]
        }
        rows.append(
            {
                "name": name,
                **{kind: asdict(spread) for kind, spread in numbers.items()},
                "collective_cpu_share": share,
                "phases_s_per_step": phases,
                "turns": own,
            }
        )
        print(
            f"  {name:24}{numbers['wall'].median:10,.0f}{numbers['wall_one'].median:11.2f}"
            f"{numbers['wall_bound'].median:14.2f}{numbers['cpu'].median:14,.0f}"
            f"{numbers['cpu_one'].median:11.2f}{numbers['cpu_bound'].median:14.2f}{share:18.1%}"
        )
    return rows


def quality(folder: Path, seeds: int) -> dict[str, Any]:
    """BLEU with gradients in float32 and in bf16."""
    import communication_bleu

    from trainer.run import read_events

    place = folder / "bleu"
    place.mkdir()
    configs = communication_bleu.configs(folder, seeds)
    prepare(configs[0].data)
    runs = [write_config(place, str(number), config) for number, config in enumerate(configs)]
    group = Group(2, place, {"what": "trainings", "folders": [str(run) for run in runs]})
    group.read()
    group.close()
    return communication_bleu.compare(runs, [read_events(run) for run in runs])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "communication.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="of the traffic")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "base"], help="of the scaling")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1], help="of the scaling")
    parser.add_argument("--rounds", type=int, help="turns of each, of the scaling")
    parser.add_argument("--seconds", type=float, help="a turn, by the clock")
    parser.add_argument("--seeds", type=int, default=3, help="of the trainings")
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import communication_ranks

        rank, ranks, work = arguments.worker
        communication_ranks.main(int(rank), int(ranks), json.loads(work))
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    seen = own_network()
    if not seen:
        print("no network namespace of our own is allowed: nothing is counted on an interface")
    content = _kept(arguments.output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in arguments.parts:
            if part == "bleu" and arguments.quick:
                continue
            found = _PARTS[part](arguments, folder, seen)
            if part == "scaling":
                done = {(one["shape"], one["zero_stage"]) for one in found}
                for one in content.get(part, {}).get("found", []):
                    if (one["shape"], one["zero_stage"]) not in done:
                        found.append(one)
            content[part] = {"load_average": os.getloadavg()[0], "found": found}
    write_result(arguments.output, before, {**content, "summary": summary(content)})


def _kept(output: Path) -> dict[str, Any]:
    """The parts of an earlier result."""
    if not output.is_file():
        return {}
    before = json.loads(output.read_text())
    return {part: before[part] for part in PARTS if part in before}


def _corpus(arguments: argparse.Namespace, folder: Path, **values: int) -> DataConfig:
    data = corpus_config(arguments.corpora, folder, vocabulary_size=8000, max_length=128, **values)
    prepare(data)
    return data


def _traffic(arguments: argparse.Namespace, folder: Path, seen: bool) -> list[dict[str, Any]]:
    print(f"MB a rank sends at a step, tiny\n{'':54}reckoned   counted   interface")
    data = _corpus(arguments, folder, tokens_per_step=1024, lanes=4)
    return traffic(data, folder, [2] if arguments.quick else arguments.ranks, seen)


def _collectives(arguments: argparse.Namespace, folder: Path, _: bool) -> list[dict[str, Any]]:
    print("collectives of two ranks on this machine")
    return collectives(folder, quick=arguments.quick)


def _scaling(arguments: argparse.Namespace, folder: Path, _: bool) -> list[dict[str, Any]]:
    data = _corpus(arguments, folder, tokens_per_step=4096, lanes=2)
    quick = arguments.quick
    return [
        scaling(
            data,
            folder,
            preset,
            stage,
            rounds=arguments.rounds or (2 if quick else 5),
            seconds=arguments.seconds or (3 if quick else {"tiny": 5, "base": 9}.get(preset, 20)),
        )
        for preset in (arguments.shapes[:1] if quick else arguments.shapes)
        for stage in arguments.stages
    ]


def _quality(arguments: argparse.Namespace, folder: Path, _: bool) -> dict[str, Any]:
    print("BLEU of the generated corpus, float32, two ranks")
    return quality(folder, arguments.seeds)


_PARTS = {
    "traffic": _traffic,
    "collectives": _collectives,
    "scaling": _scaling,
    "bleu": _quality,
}


def summary(content: dict[str, Any]) -> list[dict[str, object]]:
    """Rows of the table of all benchmarks."""
    rows = []
    for found in content.get("traffic", {}).get("found", []):
        seen = found["interface_bytes"]
        sent = found["counted_bytes"] if seen is None else seen
        case = Case(found["stage"], found["precision"], found["gradient_dtype"])
        rows.append(
            row(
                f"sent a step, {found['ranks']} ranks, {case.name}",
                sent / 1e6,
                "MB a rank",
                ratio=sent / found["reckoned_bytes"],
                against="reckoned",
                higher_is_better=False,
            )
        )
    for found in content.get("scaling", {}).get("found", []):
        own = found["contestants"][-1]
        rows.append(
            row(
                f"{found['shape']}, two workers, ZeRO {found['zero_stage']}",
                own["cpu"]["median"],
                "tokens/CPU s",
                ratio=Spread(**own["cpu_bound"]),
                against=SIDE_BY_SIDE,
            )
        )
    return rows


if __name__ == "__main__":
    main()
