"""What the trials of Table 3 come to: scores, how sure they are, differences from the base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from trainer.config import RunConfig
from trainer.paper.table3 import BASE, ROWS, scaled
from trainer.paper.table3_statistics import (
    RESAMPLES,
    Floats,
    SeedNoise,
    bleu_of,
    bleu_samples,
    interval,
    perplexity,
    perplexity_samples,
    resamples,
)
from trainer.paper.table3_trial import Trial
from trainer.storage import write_atomically

Trials = Mapping[tuple[str, int], Trial]

# What is measured: the first two are the paper's columns.
METRICS = ("perplexity", "bleu_valid", "bleu_test")


def bleu(trial: Trial, test_set: str) -> float:
    """Corpus BLEU of one training."""
    return bleu_of(np.sum(trial.counts[test_set], axis=0))


def score(trial: Trial, metric: str) -> float:
    """One training by one of ``METRICS``."""
    if metric == "perplexity":
        return perplexity(trial.nll, trial.pieces)
    return bleu(trial, metric.removeprefix("bleu_"))


def summarise(trials: Trials, base: RunConfig) -> dict[str, Any]:
    """All that the page tells, as plain values (also ``table3.json``).

    Args:
        trials: by row and seed; of rows that are not there nothing is said.
        base: the configuration of the row "base".

    Raises:
        UserError: there are no trials.
    """
    if not trials:
        raise UserError("no training of Table 3 is done: babelray table3 trains them")
    names = [name for name in ROWS if any(row == name for row, _ in trials)]
    seeds = {name: sorted(seed for row, seed in trials if row == name) for name in names}
    by_row = {name: [trials[name, seed] for seed in seeds[name]] for name in names}
    any_trial = next(iter(trials.values()))
    metrics = {metric: _metric(metric, by_row) for metric in METRICS}
    return {
        "config": _portable(base),
        "steps": any_trial.steps,
        "signature": any_trial.signature,
        "sentences": {name: len(rows) for name, rows in any_trial.counts.items()},
        "bootstrap_resamples": RESAMPLES,
        "machine": any_trial.machine,
        "versions": any_trial.versions,
        "seed_noise": {metric: found["noise"] for metric, found in metrics.items()},
        "rows": [
            {
                "row": name,
                "parameters": by_row[name][0].parameters,
                "model": _changes(name, base),
                "seeds": seeds[name],
                "seconds": [round(trial.seconds, 1) for trial in by_row[name]],
                "target_tokens": by_row[name][0].target_tokens,
                **{metric: found["rows"][name] for metric, found in metrics.items()},
                **{
                    f"{metric}_of_seeds": [score(trial, metric) for trial in by_row[name]]
                    for metric in METRICS
                },
                "paper": {
                    "perplexity": ROWS[name].perplexity,
                    "bleu": ROWS[name].bleu,
                    "parameters_millions": ROWS[name].parameters,
                    "steps": ROWS[name].steps,
                },
            }
            for name in names
        ],
    }


def _metric(metric: str, by_row: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
    """Each row by one metric, and the noise of seeds."""
    scores = {name: [score(trial, metric) for trial in found] for name, found in by_row.items()}
    noise = SeedNoise.of(scores)
    samples = {name: _samples(metric, found) for name, found in by_row.items()}
    rows = {}
    for name in by_row:
        mean = float(np.mean(scores[name]))
        low, high = interval(samples[name])
        rows[name] = {
            "mean": mean,
            "sentences": [low, high],
            "seeds": _number(noise.half_width(len(scores[name]))),
            "range": [min(scores[name]), max(scores[name])],
            "difference": None,
        }
        if BASE in by_row and name != BASE:
            low, high = interval(samples[name] - samples[BASE])
            rows[name]["difference"] = {
                "mean": mean - float(np.mean(scores[BASE])),
                "sentences": [low, high],
                "seeds": _number(noise.half_width(len(scores[name]), len(scores[BASE]))),
            }
    return {
        "rows": rows,
        "noise": {"deviation": _number(noise.deviation), "freedom": noise.freedom},
    }


def _samples(metric: str, trials: Sequence[Trial]) -> Floats:
    """Of each resample the mean over the seeds, [R]; the resamples are the same for all rows."""
    if metric == "perplexity":
        drawn = resamples(len(trials[0].nll))
        each = [perplexity_samples(trial.nll, trial.pieces, drawn) for trial in trials]
    else:
        test_set = metric.removeprefix("bleu_")
        drawn = resamples(len(trials[0].counts[test_set]))
        each = [bleu_samples(trial.counts[test_set], drawn) for trial in trials]
    return np.asarray(np.mean(each, axis=0))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _changes(name: str, base: RunConfig) -> dict[str, Any]:
    """What the scaled-down row has otherwise than the base."""
    own = scaled(ROWS[name], base)
    before, after = base.model_dump(mode="json"), own.model_dump(mode="json")
    return {
        key: value
        for section in ("model", "trainer")
        for key, value in after[section].items()
        if value != before[section][key]
        and key not in {"preset", "seed", "peak_learning_rate", "max_minutes", "patience"}
    }


def _portable(base: RunConfig) -> dict[str, Any]:
    """The configuration without the places of one machine."""
    values = base.model_dump(mode="json", exclude={"recovery"})
    for name in ("root", "dir", "mirror", "cache_dir"):
        del values["data"][name]
    return values


def read(file: Path) -> dict[str, Any]:
    """What ``write`` wrote.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no such result: {file}: babelray table3 --output {file} writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"the result cannot be read: {file}: {error}") from None
    if not isinstance(summary, dict) or not {"rows", "seed_noise", "config"} <= summary.keys():
        raise UserError(f"{file} holds no result of babelray table3: give one that --output wrote")
    return summary


def write(summary: Mapping[str, Any], file: Path) -> None:
    """The summary as JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(summary, indent=2, allow_nan=False) + "\n")
