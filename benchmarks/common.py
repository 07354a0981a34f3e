"""What the benchmarks share: the corpus, the machine's description, results, and taking turns.

Contestants are measured interleaved: each lives in a process of its own and waits until it is its
turn, so that all meet the same moods of a shared machine and none disturbs another.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT))

from meter import Meter, Turn  # noqa: E402

from cluster import allocator  # noqa: E402
from data_shards.config import DataConfig  # noqa: E402
from trainer.config import TrainerConfig  # noqa: E402

__all__ = ["Meter", "Turn"]  # passed on to the benchmarks

# What `babelray train` gives the processes that train.
ALLOCATOR = allocator.environment()

# Options that say where things are, not what is measured.
_FOLDERS = ("--output", "--corpora", "--venvs")

_PACKAGES = ("torch", "numpy", "deepspeed", "ray", "webdataset")

# Enough for a model that ends its sentences.
_QUICK_STEPS = 400


def default_corpora() -> Path:
    """Where raw corpora are looked for, as the tests do."""
    given = os.environ.get("BABELRAY_TEST_CORPORA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


def corpus_config(corpora: Path, root: Path, **values: Any) -> DataConfig:
    """Multi30k where it is at hand, else the generated corpus; ``values`` are DataConfig's."""
    if (corpora / "multi30k" / "train.en.gz").is_file():
        values = {"corpus": "multi30k", "mirror": str(corpora / "multi30k"), **values}
    else:
        values = {**values, "corpus": "embedded", "vocabulary_size": 512}
    return DataConfig(root=root, **values)


def chosen_corpus(arguments: argparse.Namespace, root: Path) -> DataConfig:
    """The corpus and its batches as the options of a benchmark of training say."""
    return corpus_config(
        arguments.corpora,
        root,
        vocabulary_size=arguments.vocabulary_size,
        tokens_per_step=arguments.tokens_per_step,
        lanes=arguments.lanes,
        max_length=128,
    )


def uninterrupted(**values: Any) -> TrainerConfig:
    """Settings of one thread that trains without end, validation or checkpoint; or as given."""
    endless = dict.fromkeys(("max_steps", "validate_every", "checkpoint_every"), 1_000_000_000)
    return TrainerConfig.model_validate({"threads": 1, "log_every": 1, **endless, **values})


def train_quickly(corpora: Path, folder: Path) -> Path:
    """A model that ends its sentences, though it translates badly; minutes."""
    data = corpus_config(corpora, folder / "data", max_length=128, vocabulary_size=6000)
    values = {name: getattr(data, name) for name in ("corpus", "mirror", "root", "vocabulary_size")}
    settings = [f"data.{name}={value}" for name, value in values.items() if value is not None]
    settings += [f"trainer.max_steps={_QUICK_STEPS}", "trainer.max_minutes=null"]
    command = [sys.executable, "-m", "cluster.cli", "train", "--name", "quick"]
    command += ["--config", str(ROOT / "configs" / "multi30k.yaml"), "--runs", str(folder / "runs")]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder / "runs" / "quick"


def machine() -> dict[str, object]:
    """What the numbers are taken on, now."""
    from trainer.machine import cpu_name  # imports torch, which not all benchmarks need

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def write_result(file: Path, before: Mapping[str, object], content: Mapping[str, object]) -> None:
    """Write a result with where and when it was taken; ``before`` is ``machine()`` at the start."""
    head = {
        "command": shlex.join(["python", *_command()]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": {**before, "load_average_after": os.getloadavg()[0]},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, **content}, indent=2) + "\n")


def _command() -> list[str]:
    """This script from the project's folder, without what only this machine has."""
    script = Path(sys.argv[0]).resolve()
    words = [str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name]
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in _FOLDERS:
            next(arguments, None)
        else:
            words.append(argument)
    return words


# What benchmarks write themselves, one after the other.
_WRITTEN = (":!benchmarks/results", ":!docs/images")


def _commit() -> str | None:
    """The code's, "-dirty" if it was changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Contestant(Protocol):
    """Something that trains when told to, and stands still otherwise."""

    name: str

    def turn(self, seconds: float) -> Turn:
        """Train for about ``seconds`` of processor time, whole steps, at least one."""

    def close(self) -> None:
        """End it."""


class Worker:
    """The coordinator's side of a contestant: this very script, run again as a process.

    The script is called with ``--worker KIND RUN_DIR`` and one thread; it uses a ``Meter``.
    ``environment`` is beside this one's, such as ``ALLOCATOR``.
    A ``command`` is run in place of the script, without this project on its path.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        run_dir: Path,
        *,
        environment: Mapping[str, str],
        command: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        variables = {
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(ROOT),
        }
        if command:
            del variables["PYTHONPATH"]
        self._log = run_dir / "stderr.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command or [sys.executable, sys.argv[0], "--worker", kind, str(run_dir)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                text=True,
            )
        self._read()  # until it is set up: set-ups do not overlap with turns

    def turn(self, seconds: float) -> Turn:
        """See ``Contestant``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return Turn(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, which waits for a turn."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)


def take_turns(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
    warm_up_s: float | None = None,
) -> list[list[Turn]]:
    """Every contestant's turns: a warm-up each, then rounds in which each has one.

    Every other round goes backwards, so that nobody always follows the same neighbour.

    Args:
        seconds: of processor time, of a turn.
        warm_up_s: of the warm-up; by default a third of a turn.
    """
    for contestant in contestants:
        contestant.turn(seconds / 3 if warm_up_s is None else warm_up_s)
    turns: list[list[Turn]] = [[] for _ in contestants]
    for number in range(rounds):
        order = range(len(contestants))
        for index in order if number % 2 == 0 else reversed(order):
            turns[index].append(contestants[index].turn(seconds))
        rates = "  ".join(
            f"{contestant.name} {own[-1].tokens_per_cpu_s:,.0f}"
            for contestant, own in zip(contestants, turns, strict=True)
        )
        say(f"  round {number + 1} of {rounds}: {rates}")
    return turns


@dataclass(frozen=True)
class Spread:
    """A median and what it lies between."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of a few measurements."""
        return cls(statistics.median(values), min(values), max(values))


def rates(turns: Sequence[Turn]) -> Spread:
    """Tokens per CPU-second."""
    return Spread.of([turn.tokens_per_cpu_s for turn in turns])


def ratios(turns: Sequence[Turn], others: Sequence[Turn]) -> Spread:
    """How many times as fast as ``others``, round by round."""
    pairs = zip(turns, others, strict=True)
    return Spread.of([one.tokens_per_cpu_s / other.tokens_per_cpu_s for one, other in pairs])


def row(
    what: str,
    value: Spread | float,
    unit: str,
    *,
    ratio: Spread | float | None = None,
    against: str | None = None,
    goal: float | None = None,
    higher_is_better: bool = True,
) -> dict[str, object]:
    """A line of the table that ``bench.py`` prints, for the ``summary`` of a result.

    ``what`` names it within its benchmark, the same in every run, so that two runs can be compared.
    ``ratio`` is taken in the same run to what ``against`` names. ``goal`` and ``higher_is_better``
    speak of the ratio if there is one, else of the value.
    """
    return {
        "what": what,
        "value": value.median if isinstance(value, Spread) else value,
        "spread": [value.lowest, value.highest] if isinstance(value, Spread) else None,
        "unit": unit,
        "ratio": ratio.median if isinstance(ratio, Spread) else ratio,
        "ratio_spread": [ratio.lowest, ratio.highest] if isinstance(ratio, Spread) else None,
        "against": against,
        "goal": goal,
        "higher_is_better": higher_is_better,
    }


def one_rank(run_dir: Path) -> None:
    """Make this process the only rank of a gloo group with one thread."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{run_dir.absolute()}/rendezvous", rank=0, world_size=1
    )
