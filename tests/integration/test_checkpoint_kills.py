"""Ranks of a real run are killed while it saves; the run comes back each time, exact.

One run lives many lives. In each, one rank sends itself SIGKILL at a random system call of its
saver, also in the middle of a write; the next life must go on from the newest checkpoint that was
committed. Whatever any life computed must be bitwise what an undisturbed run computes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.shards import prepare
from tests.ranks import free_port
from trainer.checkpoint import COMMIT, MANIFEST, Checkpoints
from trainer.config import RecoveryConfig, RunConfig, parse_config
from trainer.parts import EMA, MOMENTS

pytestmark = pytest.mark.timeout(1500)

WORLD_SIZE = 2
LIFE_TIMEOUT_S = 120
# System calls of a save: about 60 of rank 0 and 20 of rank 1. So a life ends in its first saves.
MOST_CALLS = (150, 50)


@dataclass(frozen=True)
class Death:
    """A rank dies at its saver's k-th system call; the others a moment later."""

    rank: int
    call: int
    others_after_s: float


def make_config(data_root: Path, **trainer: Any) -> RunConfig:
    recovery = trainer.pop("recovery", {})
    return parse_config(
        {
            "model": {
                "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
                "decoder_layers": 1, "dropout": 0.1, "norm": "pre",
            },
            "data": {
                "corpus": "embedded", "embedded_pairs": 1000, "vocabulary_size": 300,
                "max_length": 64, "root": data_root, "lanes": 4, "tokens_per_step": 512,
            },
            "trainer": {
                "max_steps": 100_000, "warmup_steps": 50, "peak_learning_rate": 3e-3,
                "log_every": 1, "validate_every": 100_000, "checkpoint_every": 1,
                "keep_checkpoints": 2, "ema_decay": 0.9, "metrics_port": 0, "threads": 1,
                **trainer,
            },
            "recovery": recovery,
        },
        where="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    prepare(make_config(root).data)
    return root


def die_at(call: int, note: Path) -> None:
    """Send this process SIGKILL at the k-th system call of its saver (or of its first clean-up)."""
    write, lock, count = os.write, threading.Lock(), 0
    cleaning = threading.local()
    begin_attempt = Checkpoints.begin_attempt

    def begin(self: Checkpoints, token: str) -> None:
        cleaning.now = True
        begin_attempt(self, token)
        cleaning.now = False

    Checkpoints.begin_attempt = begin  # type: ignore[method-assign]

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            is_saver = threading.current_thread().name == "babelray-save"
            if is_saver or getattr(cleaning, "now", False):
                with lock:
                    count += 1
                    if count == call:
                        if name == "write":
                            write(args[0], args[1][: len(args[1]) // 2])
                        where = args[0]
                        where = os.readlink(f"/proc/self/fd/{where}") if name in (
                            "write", "fsync",
                        ) else os.fspath(where)  # fmt: skip
                        note.write_text(json.dumps([name, where, is_saver]))
                        os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return replacement

    for name in ("write", "fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(name, getattr(os, name)))


def rank_of_a_life(
    rank: int, port: int, config: RunConfig, run_dir: Path, death: Death | None
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from trainer.attempt import train

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    if death is not None and death.rank == rank:
        die_at(death.call, run_dir.parent / "death.json")
    train(config, run_dir, rank=rank, world_size=WORLD_SIZE, resume=True)


def live(config: RunConfig, run_dir: Path, death: Death | None = None) -> None:
    """One life of the run: to its end, or to a death."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    port = free_port()
    ranks = [
        context.Process(
            target=rank_of_a_life, args=(rank, port, config, run_dir, death), daemon=True
        )
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    try:
        deadline = time.monotonic() + LIFE_TIMEOUT_S
        if death is None:
            for process in ranks:
                process.join(timeout=deadline - time.monotonic())
            assert [process.exitcode for process in ranks] == [0, 0]
        else:
            assert wait([ranks[death.rank].sentinel], timeout=LIFE_TIMEOUT_S), "nobody died"
            assert ranks[death.rank].exitcode == -signal.SIGKILL
            time.sleep(death.others_after_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def rows(run_dir: Path) -> list[tuple[Any, ...]]:
    """What was computed, of all lives: the step, its loss, its gradient norm, its data."""
    return [
        (event["step"], event["loss"], event["grad_norm"], event["data_hash"])
        for event in events(run_dir, "step")
    ]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    found = []
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # half a line of a killed rank
    return [event for event in found if event["event"] == kind]


def state_of(checkpoints: Checkpoints, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All that a checkpoint holds, the clock aside."""
    from safetensors.torch import load_file

    tensors = load_file(checkpoints.weights(step))
    with checkpoints.open(step) as reader:
        for name, tensor in list(tensors.items()):
            for kind in (*MOMENTS, EMA):
                tensors[f"{kind}/{name}"] = reader.read(kind, name, 0, tensor.numel())
        state = {name: value for name, value in reader.state.items() if name != "elapsed_s"}
    return state, tensors


def survive(num_kills: int, seed: int, data_root: Path, folder: Path) -> str:
    """Kill a run so many times while it saves, then compare it with one that nobody touched.

    Returns:
        A summary in one line.
    """
    rng = random.Random(seed)
    run_dir = folder / "killed" / "run"
    checkpoints = Checkpoints.of(run_dir, RecoveryConfig())
    live(make_config(data_root, max_steps=1), run_dir)  # so that there is something to lose
    newest, resumes, unfinished = 1, 0, 0
    calls: Counter[str] = Counter()
    victims: Counter[int] = Counter()
    while victims.total() < num_kills:
        rank = rng.randrange(WORLD_SIZE)
        death = Death(rank, rng.randint(1, MOST_CALLS[rank]), rng.choice([0.0, rng.random() / 4]))
        live(make_config(data_root), run_dir, death)
        call, where, is_saving = json.loads((run_dir.parent / "death.json").read_text())
        what = f"kill {victims.total()}: rank {rank} in {call} of {where}"
        resumed = events(run_dir, "resumed")[resumes:]
        if is_saving:
            [event] = resumed
            assert (event["step"], event.get("passed_over")) == (newest, None), what
            resumes += 1
            calls[call] += 1
            victims[rank] += 1
        else:  # at the start of an attempt, while it cleared up what the one before had left
            assert resumed == [], what
        before, (newest, passed_over) = newest, checkpoints.find_trusted()
        assert passed_over == {}, what
        committed = checkpoints.committed()
        assert newest == committed[-1] >= before, what
        assert all(checkpoints.problems(step) == [] for step in committed), what
        unfinished += max(_begun(run_dir)) > newest
    end = max(row[0] for row in rows(run_dir)) + 1
    last = make_config(data_root, max_steps=end)
    live(last, run_dir)
    [event] = events(run_dir, "resumed")[resumes:]
    assert event["step"] == newest

    whole = folder / "whole" / "run"
    live(last, whole)
    undisturbed = {row[0]: row for row in rows(whole)}
    computed = rows(run_dir)
    assert computed == [undisturbed[row[0]] for row in computed]
    (state, tensors), (expected_state, expected) = (
        state_of(Checkpoints.of(folder, RecoveryConfig()), end) for folder in (run_dir, whole)
    )
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    # Nothing is left of any of them.
    for step in _begun(run_dir):
        names = {path.name for path in (run_dir / checkpoints.folder(step)).iterdir()}
        assert names == {*checkpoints.manifest(step)["files"], MANIFEST, COMMIT}
    return (
        f"{num_kills} kills while saving (seed {seed}; rank 0: {victims[0]}, rank 1: {victims[1]}; "
        + ", ".join(f"{call}: {count}" for call, count in calls.most_common())
        + f"; {unfinished} times a part of a checkpoint was left): {num_kills} resumes, each from "
        f"the newest committed one; all {len(computed)} steps computed in {num_kills + 2} lives "
        f"and the state after step {end} bitwise as undisturbed"
    )


def _begun(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")]


def test_a_run_killed_while_it_saves_comes_back_exact(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = survive(8, 1, data_root, tmp_path)
    with capsys.disabled():
        print(f"\n{summary}")


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_comes_back_exact(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = survive(100, 2, data_root, tmp_path)
    with capsys.disabled():
        print(f"\n{summary}")


def test_damaged_checkpoints_are_passed_over_by_name(data_root: Path, tmp_path: Path) -> None:
    """The three newest are damaged, each in its own way: the fourth is used."""
    run_dir = tmp_path / "run"
    live(make_config(data_root, max_steps=12, checkpoint_every=3, keep_checkpoints=9), run_dir)
    checkpoints = Checkpoints.of(run_dir, RecoveryConfig())
    good, *damaged = checkpoints.committed()[-4:]
    weights = checkpoints.weights(damaged[0])
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    folder = run_dir / checkpoints.folder(damaged[1])
    missing = next(folder.glob("optimizer-*-00001-of-00002.safetensors"))
    missing.unlink()
    state = checkpoints.local(damaged[2], "state.json")
    os.truncate(state, 100)
    live(make_config(data_root, max_steps=14, keep_checkpoints=9), run_dir)
    [resumed] = events(run_dir, "resumed")
    assert resumed["step"] == good
    found = [resumed["passed_over"][str(step)] for step in damaged]
    assert found[0] == [f"{weights} differs from what was written (sha256)"]
    assert found[1] == [f"{missing} is missing"]
    assert found[2][0].startswith(f"{state} has 100 bytes, ")
    assert checkpoints.find_trusted() == (14, {})
    first = {row[0]: row for row in rows(run_dir)[:12]}
    assert [row for row in rows(run_dir)[12:] if row[0] <= 12] == [
        first[step] for step in range(good + 1, 13)
    ]
