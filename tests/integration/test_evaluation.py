"""Evaluation through Ray Data as users run it: any number of actors, kills, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cluster import session
from cluster.evaluate import _decode
from data_shards.errors import RunFailedError
from tests.runs import make_run, pairs, write_lines
from trainer.config import EvaluationConfig
from trainer.decoding_job import Batch, System, decode_here
from trainer.evaluate import evaluate_systems, find_test_sets

pytestmark = pytest.mark.timeout(300)

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 150


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"), steps=(60, 120))


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "demo"))


# Ray Data warns of its own settings when they are sent to workers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")
def test_any_number_of_actors_gives_the_same(run_dir: Path) -> None:
    evaluation = EvaluationConfig(max_extra_length=10, batch_tokens=24)
    systems = [System(run_dir, name, evaluation) for name in ("last", "60")]
    test_sets = find_test_sets(run_dir, ["test", "valid"])

    def outcome(decode):
        found = evaluate_systems(systems, test_sets, decode=decode)
        return [(item.result.bleu, item.result.chrf, item.hypotheses) for item in found]

    here = outcome(decode_here)
    assert len(here) == 4
    assert here[0] != here[2]
    with session.connect(min_cpus=4, threads=1, dashboard_port=None):
        for num_actors in (1, 2, 4):
            found = outcome(
                lambda systems, batches, num=num_actors: _decode(
                    systems, batches, num, num, has_gpu=False
                )
            )
            assert found == here, f"{num_actors} actors"
        # What an actor meets comes out as it was raised there.
        batches = [Batch(0, 0, 0, [0], ["one dog"])]
        changed = replace(systems[0], identity="of other weights")
        with pytest.raises(RunFailedError, match="demo went on training, and its checkpoint last"):
            list(_decode([changed], batches, 1, 1, has_gpu=False))

        # Whatever decodes it dies, as for want of memory.
        class Deadly(System):
            def load(self, device):
                os._exit(1)

        deadly = Deadly(run_dir, "last", evaluation)
        with pytest.raises(
            RunFailedError, match=r"^decoding failed: .*What was translated is kept"
        ):
            list(_decode([deadly], batches, 1, 1, has_gpu=False))


def num_kept(run_dir: Path) -> int:
    """Batches in the run's only partial file."""
    files = list((run_dir / "evaluation").glob("*.partial.jsonl"))
    return files[0].read_bytes().count(b"\n") - 1 if files else 0


class Command:
    """``babelray evaluate`` in a process group of its own, as a terminal would start it."""

    def __init__(self, run_dir: Path, *arguments: object) -> None:
        self.run_dir = run_dir
        self.output = run_dir.parent / f"output-{time.monotonic_ns()}.txt"
        words = ["evaluate", "demo", "--runs", run_dir.parent, *arguments]
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *map(str, words)],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def end(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)

    def kill(self) -> None:
        """With all that it has started, whatever became of the test."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_for_batches(self, num: int, *, beyond: int = 0) -> int:
        """Wait until the partial file holds so many; how many it holds."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            found = num_kept(self.run_dir)
            if found >= beyond + num:
                return found
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"no batch after {PATIENCE_S} s: {self.text}")


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def start(*arguments: object) -> Command:
        commands.append(Command(run_dir, *arguments))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()


def test_killed_and_interrupted_evaluations_go_on(
    run_dir: Path, tmp_path: Path, start: Callable[..., Command]
) -> None:
    chosen = pairs(800, seed=8)
    files = (
        write_lines(tmp_path / "long.en", [source for source, _ in chosen]),
        write_lines(tmp_path / "long.de", [target for _, target in chosen]),
    )
    arguments = (
        "--source",
        files[0],
        "--reference",
        files[1],
        "--set",
        "evaluation.batch_tokens=40",
    )

    # A real kill -9, in this process.
    command = start(*arguments, "--actors", 0)
    command.wait_for_batches(5)
    command.process.kill()
    command.end()
    assert not list((run_dir / "evaluation").glob("*.json"))

    # Ctrl-C in a terminal reaches every process of the group.
    command = start(*arguments, "--actors", 1)
    kept = num_kept(run_dir)
    assert kept >= 5
    found = command.wait_for_batches(5, beyond=kept)
    processes = psutil.Process(command.process.pid).children(recursive=True)
    assert any("ray::" in " ".join(process.cmdline()) for process in processes)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.end() == 130, command.text
    said = command.text.splitlines()
    assert sum("going on after an interruption" in line for line in said) == 1
    assert said[-1] == (
        "interrupted; what was translated is kept, and the same command goes on from there"
    )
    assert len(said) <= 6, command.text
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []

    # The same again, to the end, wherever it is decoded.
    command = start(*arguments, "--actors", 0, "--json")
    assert command.end() == 0, command.text
    assert "going on after an interruption" in command.text
    result = json.loads((run_dir / "evaluation" / "long.en-best.json").read_text())
    assert not list((run_dir / "evaluation").glob("*.partial.jsonl"))
    assert found >= kept + 5

    # What was put together is what one go gives.
    hypotheses = (run_dir / "evaluation" / result["hypotheses"]).read_text()
    command = start(*arguments, "--actors", 0)
    assert command.end() == 0, command.text
    again = json.loads((run_dir / "evaluation" / "long.en-best.json").read_text())
    assert again["bleu"] == result["bleu"]
    assert (run_dir / "evaluation" / result["hypotheses"]).read_text() == hypotheses
