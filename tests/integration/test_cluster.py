"""``babelray train`` as a user runs it: Ray, DeepSpeed, signals, deaths and what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from tests.workplace import Workplace, alive, descendants, worker_pid

pytestmark = pytest.mark.timeout(400)


def test_a_run_survives_a_killed_worker_stops_on_request_and_resumes(workplace: Workplace) -> None:
    command = workplace.train("--config", "toy.yaml", "--name", "one", "--workers", 2)
    command.wait_for(lambda: workplace.events("one", "checkpoint"))

    # A worker dies: the group begins again from the last checkpoint, without anyone's help.
    os.kill(worker_pid(workplace, "one", 1), signal.SIGKILL)
    resumed = command.wait_for(lambda: workplace.events("one", "resumed"))
    assert resumed[0]["step"] % 20 == 0
    assert resumed[0]["step"] >= 20
    command.wait_for(lambda: workplace.events("one", "step")[-1]["step"] > resumed[0]["step"] + 5)

    # Ctrl-C in a terminal reaches every process of the group.
    processes = descendants(command.process.pid)
    assert any("RayTrainWorker" in process.name() for process in processes)
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.end() == 130
    text = command.text()
    assert "rank 1 ended unexpectedly" in text
    assert "restarting from the last checkpoint" in text
    assert "saving a checkpoint and stopping; press again to stop at once" in text
    assert "babelray train --name one --resume" in text
    assert "Traceback" not in text
    assert "http://127.0.0.1:" in text
    assert alive(processes) == []
    run = workplace.folder / "runs" / "one"
    stopped_at = workplace.events("one", "checkpoint")[-1]["step"]
    assert workplace.events("one", "finished")[-1]["reason"] == "stopped"
    assert (run / "checkpoints" / f"step-{stopped_at:08d}" / "COMMIT").is_file()
    assert not (run / "stop").exists()

    # The resume goes on where the checkpoint was saved, to a new end.
    last = stopped_at + 10
    command = workplace.train(
        "--name", "one", "--resume", "--workers", 2, "--set", f"trainer.max_steps={last}"
    )
    assert command.end() == 0, command.text()
    assert f"resumed from step {stopped_at}" in command.text()
    assert f"step {last:>6}  finished: max_steps" in command.text()
    assert workplace.events("one", "resumed")[-1]["step"] == stopped_at
    assert json.loads((run / "config.json").read_text())["trainer"]["max_steps"] == last


def test_a_damaged_shard_ends_the_run_with_its_name(
    workplace: Workplace, prepared: tuple[DataConfig, Manifest]
) -> None:
    copy = workplace.folder / "damaged"
    shutil.copytree(prepared[1].folder, copy)
    for shard in (copy / "shards").iterdir():
        os.truncate(shard, 3000)
    # Four workers, also where there are fewer cores.
    command = workplace.train(
        "--config", "toy.yaml", "--name", "two", "--workers", 4, "--set", f"data.dir={copy}"
    )
    assert command.end() == 1
    text = command.text()
    assert "on 4 workers" in text
    assert re.search(r"babelray: error: the run two failed: .*train-00000\d\.tar", text)
    assert "babelray train --name two --resume" in text
    assert "restarting" not in text
    assert "Traceback" not in text
    log = workplace.folder / "runs" / "two" / "logs" / "driver.log"
    assert str(log.parent) in text
    assert "Traceback" in log.read_text()


def test_bleu_is_computed_beside_the_training_decides_the_best_and_stops_it(
    workplace: Workplace,
) -> None:
    """With a rate of nearly nothing the first score cannot be beaten."""
    training = workplace.train(
        "--config", "toy.yaml", "--name", "flat",
        "--set", "trainer.peak_learning_rate=1e-12", "--set", "trainer.bleu_every=40",
        "--set", "trainer.best_by=bleu", "--set", "trainer.patience=1",
        "--set", "trainer.keep_checkpoints=1", "--set", "trainer.validate_every=30",
        "--set", "evaluation.beam=1", "--set", "evaluation.max_extra_length=2",
    )  # fmt: skip
    assert training.end() == 0, training.text()
    assert "finished (early_stopping)" in training.text()
    scored = workplace.events("flat", "evaluated")
    assert len(scored) >= 2
    assert [event["best"] for event in scored] == [True] + [False] * (len(scored) - 1)
    assert {event["test_set"] for event in scored} == {"valid"}
    run_dir = workplace.folder / "runs" / "flat"
    best = json.loads((run_dir / "best.json").read_text())
    assert best == {name: scored[0][name] for name in ("step", "bleu", "search")}
    # The best one stays, though only the newest is kept besides, and what was then being scored.
    last = max(event["step"] for event in workplace.events("flat", "checkpoint"))
    steps = {int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")}
    assert {scored[0]["step"], last} <= steps <= {event["step"] for event in scored}
    assert len(steps) <= 3
    assert scored[-1]["step"] == last, "the last checkpoint is scored after the training"
    assert not (run_dir / "early_stop").exists()
