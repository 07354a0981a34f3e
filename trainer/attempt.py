"""One attempt of a rank: from an initialised process group to a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from trainer import startup
from trainer.config import STOP_FILE, RunConfig
from trainer.control import EARLY_STOP_FILE, HELD_FILE, HOLD_FILE
from trainer.events import EventLog
from trainer.interruption import failures_seen, interruption
from trainer.loop import Loop
from trainer.machine import describe, versions
from trainer.metrics import RankMetrics, RunMetrics, Slot
from trainer.rank import Rank
from trainer.reporter import Voices

log = logging.getLogger(__name__)

_Family = TypeVar("_Family", RankMetrics, RunMetrics)


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    rank: int,
    world_size: int,
    local_rank: int = 0,
    resume: bool,
    slot: Slot | None = None,
) -> str:
    """Train as one rank of an initialised process group; all ranks call it alike.

    Args:
        resume: go on from the newest trusted checkpoint, if there is one.
        slot: where this process keeps its metrics; None keeps none.

    Returns:
        Why it ended: ``max_steps``, ``max_minutes``, ``early_stopping`` or ``stopped``.

    Raises:
        DataError: a shard is missing, cut short or altered.
        Handover: a checkpoint was asked for, to go on with another group of ranks.
        RunFailedError: the numbers stayed wrong, or no checkpoint could be read or written.
        UserError: the checkpoint belongs to another configuration.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    this = Rank(config, run_dir, rank=rank, world_size=world_size, local_rank=local_rank)
    with this.watchdog:
        this.prepare()
        passed_over = this.resume() if resume else None
        own = _opened(lambda slot: RankMetrics(run_dir.name, rank, slot), slot)
        if this.is_first:
            reason = _train_first(this, passed_over, own, slot)
        else:
            reason = Loop(this, Voices(rank=own)).run()
        if slot is not None:
            slot.end()
        return reason


def _opened(make: Callable[[Slot], _Family], slot: Slot | None) -> _Family | None:
    """Metrics, or None where they are not wanted or the disk has no room for them."""
    try:
        return None if slot is None else make(slot)
    except OSError as error:
        log.warning("no metrics: %s", error)
        return None


def _train_first(
    this: Rank,
    passed_over: dict[int, list[str]] | None,
    own: RankMetrics | None,
    slot: Slot | None,
) -> str:
    """Rank 0, which tells for all."""
    run_dir = this.run_dir
    _forget_requests(run_dir)
    before = interruption(run_dir)
    events = EventLog(run_dir / "events.jsonl")
    metrics = _opened(partial(RunMetrics, run_dir.name), slot)
    packages = versions()
    startup.mark("checkpoint")
    begun = startup.seconds()
    try:
        if metrics is not None:
            _describe(this, metrics, packages)
        events.write(
            "started" if passed_over is None else "resumed",
            step=this.state.step,
            **({"passed_over": passed_over} if passed_over else {}),
            attempt=this.token,
            failures_seen=failures_seen(run_dir),
            **({"start_s": begun} if begun else {}),
            world_size=this.world_size,
            parameters=this.num_parameters,
            steps_per_epoch=this.plan.steps_per_epoch,
            data_hash=f"{this.state.data_hash:016x}",
            elapsed_s=round(this.state.elapsed_s, 3),
            flops=this.state.flops,
            energy_joules=this.state.joules,
            peak_flops=this.rates.peak,
            peak_source=this.rates.source,
            sustained_flops=this.rates.sustained,
            device=str(this.device),
            device_step=this.how.described(),
            machine=describe(this.device),
            versions=packages,
            torch=torch.__version__,
        )
        reason = Loop(this, Voices(events, metrics, own), before).run()
        _forget_requests(run_dir)
        return reason
    finally:
        events.close()


def _describe(this: Rank, metrics: RunMetrics, packages: dict[str, str]) -> None:
    config, data = this.config, this.manifest.data
    metrics.describe(
        run={
            "corpus": data.corpus,
            "source": data.source_language,
            "target": data.target_language,
            "model": config.model.preset or config.model.kind,
            "parameters": str(this.num_parameters),
            "precision": config.trainer.precision,
            "zero_stage": str(config.trainer.zero_stage),
            "seed": str(config.trainer.seed),
        },
        manifest_sha256=this.manifest.sha256,
        build={
            "version": packages["babelray"],
            **{name: packages[name] for name in ("python", "torch", "deepspeed", "ray")},
        },
    )


def _forget_requests(run_dir: Path) -> None:
    for name in (STOP_FILE, HOLD_FILE, EARLY_STOP_FILE, HELD_FILE):
        with suppress(FileNotFoundError):
            (run_dir / name).unlink()
