"""TensorBoard: a run's numbers as event files in ``<run_dir>/tensorboard``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from trainer.trackers import Event, scalars

FOLDER = "tensorboard"
_FLUSH_S = 10

# Told as text, at the step where it happened.
_NOTABLE = frozenset({"started", "resumed", "resized", "rewound", "skipped", "worker_failed"})


class TensorBoard:
    """A tracker (``trainer.trackers``) that writes one series a number across all resumes."""

    def begin(
        self, run: str, run_dir: Path, config: dict[str, Any], resumed_from: int | None
    ) -> None:
        """Begin a file; what earlier ones hold of later steps is marked as void."""
        folder = run_dir / FOLDER
        has_past = any(folder.glob("events.out.*"))
        self._writer = SummaryWriter(
            str(folder),
            flush_secs=_FLUSH_S,
            purge_step=(resumed_from or 0) + 1 if has_past else None,
            # Else two files begun in one second would share a name.
            filename_suffix=f".{resumed_from or 0}",
        )
        self._step = resumed_from or 0
        if not has_past:
            self._writer.add_text("config", _code(json.dumps(config, indent=2)), 0)

    def event(self, event: Event) -> None:
        """Write its numbers, or what happened."""
        at_s, step = event.get("time"), event.get("step")
        if event["event"] in {"step", "validated"}:
            self._step = event["step"]
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, step, walltime=at_s)
        if event["event"] in _NOTABLE:
            at_step = self._step if step is None else step
            self._writer.add_text("events", _code(json.dumps(event)), at_step, walltime=at_s)

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()


def _code(text: str) -> str:
    """Text as TensorBoard's markdown shows it letter by letter."""
    return "".join(f"    {line}\n" for line in text.splitlines())
