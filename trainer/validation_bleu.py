"""BLEU of a run's checkpoints on its validation set, while it trains: computing and judging it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.errors import UserError
from trainer.config import EvaluationConfig
from trainer.run import load_model
from trainer.storage import write_atomically

_LATEST = "valid_bleu.json"


def score_checkpoint(run_dir: Path, step: int, *, threads: int) -> dict[str, Any]:
    """Translate the validation set with a checkpoint; what an ``evaluated`` event says of it.

    Searched and scored as ``babelray evaluate --test-set valid`` would, on CPU threads of this
    process.

    Raises:
        UserError: the checkpoint is gone or damaged, or the corpus has no validation set.
    """
    # Ranks import this module for the gauge, and need none of these.
    from sacrebleu.metrics import CHRF

    from trainer.scores import bleu_metric
    from trainer.translate import Translator

    torch.set_num_threads(threads)
    began = time.monotonic()
    loaded = load_model(run_dir, str(step))
    sources, references = loaded.manifest.split_text("valid")
    if not sources:
        raise UserError("the corpus has no validation set: set trainer.bleu_every to null")
    found = Translator([loaded], loaded.config.evaluation).translate(sources)
    hypotheses = [translations[0].text for translations in found]
    bleu, chrf = bleu_metric(loaded.manifest.target_language), CHRF()
    return {
        "test_set": "valid",
        "checkpoint": str(step),
        "step": step,
        "bleu": float(bleu.corpus_score(hypotheses, [references]).score),
        "chrf": float(chrf.corpus_score(hypotheses, [references]).score),
        "signature": str(bleu.get_signature()),
        "seconds": round(time.monotonic() - began, 3),
    }


def search_digest(evaluation: EvaluationConfig) -> str:
    """What scores must share to be compared: how their translations were searched."""
    settings = evaluation.model_dump(mode="json", exclude={"batch_tokens"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def write_latest(run_dir: Path, values: dict[str, Any]) -> None:
    """Leave the newest score where ``latest_bleu`` looks for it."""
    content = {name: values[name] for name in ("step", "bleu", "chrf", "signature")}
    write_atomically(run_dir / _LATEST, json.dumps(content) + "\n")


def latest_bleu(run_dir: Path) -> float:
    """The newest score, for a gauge to read whenever it is looked at; NaN before the first."""
    try:
        return float(json.loads((run_dir / _LATEST).read_text(encoding="utf-8"))["bleu"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


@dataclass
class BleuHistory:
    """What is known of the checkpoints scored so far, in the order of their steps.

    Attributes:
        last_step: the newest one scored; 0 before the first.
        best_step, best_bleu: the best of them, the earlier one if two are equal.
        stale: how many were scored since the best.
    """

    last_step: int = 0
    best_step: int | None = None
    best_bleu: float = -math.inf
    stale: int = 0

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]], *, search: str) -> BleuHistory:
        """Of what a run has logged (``read_events``), as far as it was searched alike.

        Args:
            search: ``search_digest`` of now. Evaluations by hand do not give one.
        """
        scored = {
            event["step"]: event["bleu"]
            for event in events
            if event["event"] == "evaluated" and event.get("search") == search
        }
        history = cls()
        for step in sorted(scored):
            history.add(step, scored[step])
        return history

    def recall(self, note: dict[str, Any], *, search: str) -> None:
        """Take in what ``best.json`` says: all there is, where a run goes on elsewhere."""
        if note.get("search") == search and note["bleu"] > self.best_bleu:
            self.best_step, self.best_bleu, self.stale = note["step"], note["bleu"], 0

    def add(self, step: int, bleu: float) -> bool:
        """Take a score in; whether it is the best so far."""
        self.last_step = max(self.last_step, step)
        if bleu > self.best_bleu:
            self.best_step, self.best_bleu, self.stale = step, bleu, 0
            return True
        self.stale += 1
        return False
