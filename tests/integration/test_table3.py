"""Trials of Table 3 through Ray, as a user starts them: killed and begun again."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from tests.workplace import REPOSITORY, Command, Workplace, alive, descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60


def start(workplace: Workplace, runs: str, *arguments: object) -> Command:
    words = [sys.executable, "-m", "cluster.cli", "table3", "--config", "small.yaml",
             "--rows", "base:2,D-dropout-0", "--steps", str(STEPS), "--parallel", "1",
             "--runs", runs, *map(str, arguments)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return workplace.commands.start(words, cwd=workplace.folder, environment=environment)


def results(folder: Path) -> dict[str, Any]:
    """What was computed by each trial, without what a clock says."""
    found = {}
    for file in sorted(folder.glob("*/table3.json")):
        trial = json.loads(file.read_text())
        found[file.parent.name] = {name: trial[name] for name in ("steps", "nll", "counts")}
    return found


@pytest.fixture
def small(workplace: Workplace, prepared: tuple[DataConfig, Manifest]) -> Workplace:
    config = {
        "model": {
            "d_model": 32, "d_ff": 64, "num_heads": 8, "encoder_layers": 1, "decoder_layers": 1,
        },
        "data": prepared[0].model_dump(mode="json") | {"lanes": 1},
        "trainer": {"checkpoint_every": 10, "log_every": 5, "metrics_port": 0, "threads": 1},
    }  # fmt: skip
    (workplace.folder / "small.yaml").write_text(yaml.safe_dump(config))
    return workplace


def test_killed_and_begun_again_it_trains_what_is_missing_to_the_same_end(
    small: Workplace,
) -> None:
    undisturbed = start(small, "undisturbed")
    assert undisturbed.end() == 0, undisturbed.text()
    expected = results(small.folder / "undisturbed")
    assert sorted(expected) == ["table3-D-dropout-0-1", "table3-base-1", "table3-base-2"]

    killed = start(small, "killed")
    folder = small.folder / "killed"
    first, second = folder / "table3-base-1", folder / "table3-D-dropout-0-1"
    killed.wait_for(lambda: list(second.glob("checkpoints/*/COMMIT")))
    left = descendants(killed.process.pid)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert alive([process for process in left if _is_worker(process)]) == []
    done_before = (first / "table3.json").stat().st_mtime_ns
    assert not (second / "table3.json").exists()

    again = start(small, "killed", "--json")
    assert again.end() == 0, again.text()
    assert "training 2 of 3 trials" in again.text()
    assert (first / "table3.json").stat().st_mtime_ns == done_before
    assert any('"resumed"' in line for line in (second / "events.jsonl").read_text().splitlines())
    assert results(folder) == expected


def test_a_trial_that_fails_is_told_and_the_others_are_done(small: Workplace) -> None:
    broken = small.folder / "runs" / "table3-base-1"
    (broken / "table3.json").mkdir(parents=True)  # where the result should be written
    command = start(small, "runs")
    assert command.end() == 1, command.text()
    assert "1 of 3 trials failed" in command.text()
    assert sorted(results_of_files(small.folder / "runs")) == [
        "table3-D-dropout-0-1", "table3-base-2",
    ]  # fmt: skip


def results_of_files(folder: Path) -> list[str]:
    return [file.parent.name for file in folder.glob("*/table3.json") if file.is_file()]


def _is_worker(process: psutil.Process) -> bool:
    """Whether a trial may run in it; Ray's agents only follow their node, late when it is busy."""
    try:
        name = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return name.startswith("ray::") and not re.match(r"ray::(Dashboard|RuntimeEnv)Agent\b", name)
