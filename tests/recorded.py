"""A run's log and checkpoints' states without the training: what an audit looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.plan import LaneBatch, Plan, data_hash
from data_shards.randomness import Int64
from trainer.config import RunConfig
from trainer.events import EventLog

LOG_EVERY = 5
CHECKPOINT_EVERY = 20

# What a step really trained on of a lane's batch; steps are counted from 1.
Consumed = Callable[[int, LaneBatch], Int64]


@dataclass
class Recorded:
    """A run's folder, as a run of this many steps would have left it."""

    run_dir: Path
    plan: Plan
    steps: int

    def edit(self, step: int, event: str = "step", **values: Any) -> None:
        """Change a line of the log."""
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        for one in found:
            if (one["event"], one["step"]) == (event, step):
                one.update(values)
        text = "".join(json.dumps(one) + "\n" for one in found)
        (self.run_dir / "events.jsonl").write_text(text)

    def log(self, event: str, **values: Any) -> None:
        """Append a line to the log."""
        log = EventLog(self.run_dir / "events.jsonl")
        log.write(event, **values)
        log.close()

    def state(self, step: int) -> Path:
        """A checkpoint's ``state.json``."""
        return self.run_dir / "checkpoints" / f"step-{step:08d}" / "state.json"


def record(
    run_dir: Path,
    data: DataConfig,
    *,
    epochs: float = 2.5,
    consumed: Consumed = lambda step, batch: batch.pair_ids,
) -> Recorded:
    """Write the records of a run of so many epochs on a prepared corpus."""
    config = RunConfig(data=data.model_copy(update={"tokens_per_step": 1024}))
    manifest = Manifest.load(config.data.folder())
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    run = Recorded(run_dir, plan, int(epochs * plan.steps_per_epoch))
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.to_json())
    run.log("started", step=0, data_hash=f"{0:016x}")
    rolling = 0
    for step in range(1, run.steps + 1):
        for batch in plan.step(step - 1):
            hashed = data_hash(step - 1, batch.lane, consumed(step, batch))
            rolling = (rolling + hashed) % 2**64
        values = {"step": step, "data_hash": f"{rolling:016x}"}
        if step % LOG_EVERY == 0 or step == 1:
            run.log("step", **values)
        if step % CHECKPOINT_EVERY == 0 or step == run.steps:
            run.state(step).parent.mkdir(parents=True)
            settings = {"data": manifest.sha256, "plan": plan.digest}
            run.state(step).write_text(json.dumps({**values, "settings": settings}))
            (run.state(step).parent / "COMMIT").touch()
    return run
