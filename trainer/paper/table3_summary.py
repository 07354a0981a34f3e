"""What the trials of Table 3 come to: scores, how sure they are, each row against the base.

BLEU is averaged and compared as it is, perplexity by its logarithm (nats a piece): means are
geometric and rows stand to the base by ratio, since seeds move a large perplexity by more than a
small one. All is given back as perplexities and ratios of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_shards.config import PLACES
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
    """Each row by one metric, and the noise of seeds (of perplexity: of its logarithm)."""
    scores = {name: [score(trial, metric) for trial in found] for name, found in by_row.items()}
    scaled_scores = {name: list(_scale(metric, np.array(each))) for name, each in scores.items()}
    means = {name: float(np.mean(each)) for name, each in scaled_scores.items()}
    noise = SeedNoise.of(scaled_scores)
    samples = {name: _samples(metric, found) for name, found in by_row.items()}
    rows = {}
    for name, each in scores.items():
        own = _estimate(metric, means[name], samples[name], noise.half_width(len(each)))
        against = None
        if BASE in by_row and name != BASE:
            against = _estimate(
                metric,
                means[name] - means[BASE],
                samples[name] - samples[BASE],
                noise.half_width(len(each), len(scores[BASE])),
            )
        rows[name] = {**own, "range": [min(each), max(each)], "against_base": against}
    return {
        "rows": rows,
        "noise": {"deviation": _number(noise.deviation), "freedom": noise.freedom},
    }


def _estimate(metric: str, mean: float, samples: Floats, seeds: float) -> dict[str, Any]:
    """A mean with its 95 % intervals: over sentences, over seeds, over both; given back unscaled.

    Args:
        mean, samples: on the scale of the metric; resamples [R].
        seeds: half of the interval over seeds, NaN if unknown.
    """
    low, high = interval(samples)
    both = math.hypot(seeds, (high - low) / 2)

    def around(half: float) -> list[float] | None:
        return _unscale(metric, mean - half, mean + half) if math.isfinite(half) else None

    return {
        "mean": _unscale(metric, mean)[0],
        "sentences": _unscale(metric, low, high),
        "seeds": around(seeds),
        "both": around(both),
    }


def _scale(metric: str, values: Floats) -> Floats:
    return np.log(values) if metric == "perplexity" else values


def _unscale(metric: str, *values: float) -> list[float]:
    return [math.exp(value) if metric == "perplexity" else value for value in values]


def _samples(metric: str, trials: Sequence[Trial]) -> Floats:
    """Of each resample the mean over the seeds, on the scale of the metric, [R].

    The resamples are the same for all rows.
    """
    if metric == "perplexity":
        drawn = resamples(len(trials[0].nll))
        each = [perplexity_samples(trial.nll, trial.pieces, drawn) for trial in trials]
    else:
        test_set = metric.removeprefix("bleu_")
        drawn = resamples(len(trials[0].counts[test_set]))
        each = [bleu_samples(trial.counts[test_set], drawn) for trial in trials]
    return np.asarray(np.mean([_scale(metric, values) for values in each], axis=0))


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
    for name in PLACES:
        del values["data"][name]
    return values
