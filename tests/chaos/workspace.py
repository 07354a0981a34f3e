"""Where disturbed runs live: scratch folder, corpus, configuration; and nothing of it left over."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.reader import BlockReader
from data_shards.shards import prepare
from data_shards.store import ShardStore
from tests.chaos.recorder import pair_key

REPOSITORY = Path(__file__).resolve().parents[2]

NUM_STEPS = 400  # not quite four epochs, so that the last one is not whole
CHECKPOINT_EVERY = 20
LANES = 4
# A step computes for some 15 ms; to a fixed pace, a random moment falls anywhere in a run.
PACE_S = 0.04

# Adam's epsilon is above the rounding errors of gradients that are zero but for those. Below it,
# they become whole updates, and losses that another order of summation moved by 1e-7 are 5e-4 apart
# in the end.
_CONFIG: dict[str, Any] = {
    "model": {
        "d_model": 32, "d_ff": 64, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1,
        "dropout": 0.0,
    },
    "data": {
        "corpus": "embedded", "embedded_pairs": 2000, "vocabulary_size": 300, "max_length": 64,
        "lanes": LANES, "tokens_per_step": 512, "window_pairs": 256,
    },
    "trainer": {
        "seed": 1, "precision": "fp32", "zero_stage": 1, "max_steps": NUM_STEPS,
        "peak_learning_rate": 1e-3, "warmup_steps": 100, "adam_epsilon": 1e-6, "log_every": 1,
        "validate_every": 10 * NUM_STEPS, "checkpoint_every": CHECKPOINT_EVERY,
        "keep_checkpoints": 3, "threads": 1, "metrics_port": 0,
    },
    "recovery": {"hang_timeout_s": 60.0, "save_backoff_s": 0.5, "resize_interval_s": 2.0},
}  # fmt: skip

_PR_SET_CHILD_SUBREAPER = 36


class Workspace:
    """A scratch folder with the corpus of all runs.

    Args:
        folder: empty; its path must be short, for Ray puts sockets below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        # Read where no configuration of another machine or user can interfere.
        self._data = DataConfig(root=folder / "data", **_CONFIG["data"])
        self.manifest = Manifest.load(prepare(self._data))
        plan = Plan.of(self.manifest, self._data, seed=_CONFIG["trainer"]["seed"])
        self.steps_per_epoch = plan.steps_per_epoch
        self.pair_keys = _pair_keys(self.manifest)

    def write_config(self, name: str, recovery: Mapping[str, Any]) -> Path:
        """The configuration of a run, with what it has of its own under ``recovery``."""
        config = {
            **_CONFIG,
            "data": {**_CONFIG["data"], "root": str(self.folder / "data")},
            "recovery": {**_CONFIG["recovery"], **recovery},
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    def environment(self) -> dict[str, str]:
        """For a command of ours: a Ray of its own, and this repository's code."""
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return {
            **kept,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }


def _pair_keys(manifest: Manifest) -> list[str]:
    """The key of every pair of the corpus, by pair id, read from the shards themselves."""
    reader = BlockReader(manifest, ShardStore(manifest, None))
    keys = []
    for number in range(len(manifest.blocks)):
        block = reader.read(number)
        sides = [
            np.split(ids, np.cumsum(lengths)[:-1])
            for ids, lengths in zip(
                (block.source_ids, block.target_ids), block.lengths.T.astype(np.int64), strict=True
            )
        ]
        keys += [pair_key(*(ids.tolist() for ids in pair)) for pair in zip(*sides, strict=True)]
    assert len(set(keys)) == len(keys), "two pairs of the corpus are the same"
    return keys


@contextmanager
def scratch(*, keep: bool) -> Iterator[Path]:
    """A new folder, removed afterwards unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def adopt_orphans() -> None:
    """Become the parent of whatever the commands started here leave behind, to end it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants() -> list[psutil.Process]:
    """All processes that come from this one, however far they have moved away from it."""
    return psutil.Process().children(recursive=True)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs, or is stopped; a zombie waits only for its parent to look."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_descendants() -> list[str]:
    """Kill whatever is left of what was started here; returns the command lines."""
    found: list[str] = []
    while left := [process for process in descendants() if not _reaped(process)]:
        for process in left:
            try:
                found.append(" ".join(process.cmdline())[:120] or process.name())
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    return found


def _reaped(process: psutil.Process) -> bool:
    """Whether it has ended; a zombie of ours is taken off the list."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        if process.ppid() == os.getpid():
            os.waitpid(process.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return True


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system in memory that is soon full; needs root."""
    folder.mkdir()
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "babelray-chaos", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
