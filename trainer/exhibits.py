"""What a report shows of a run: sample translations, the corpus.

Each function returns plain values for the template, or nothing where the run has not got that far.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from sacrebleu.metrics import CHRF

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from trainer import figures
from trainer.config import RunConfig
from trainer.evaluate import Result
from trainer.run import evaluation_dir
from trainer.test_sets import reopen

log = logging.getLogger(__name__)

# Quantiles of the sentences' chrF that samples are taken at: the failures are shown as well.
_SAMPLES = (
    (1.0, "best"),
    (0.9, "90th percentile"),
    (0.75, "75th percentile"),
    (0.6, "60th percentile"),
    (0.5, "median"),
    (0.4, "40th percentile"),
    (0.25, "25th percentile"),
    (0.1, "10th percentile"),
    (0.05, "5th percentile"),
    (0.0, "worst"),
)


@dataclass(frozen=True)
class Sample:
    """A test sentence with its translation and where its chrF stands among the others'."""

    place: str
    source: str
    reference: str
    hypothesis: str
    chrf: float


def samples(run_dir: Path, main: Result | None, manifest: Manifest | None) -> list[Sample]:
    """Sentences of the main evaluation at fixed quantiles of quality, the best first."""
    if main is None:
        return []
    files = (Path(main.source), Path(main.reference)) if main.source and main.reference else None
    try:
        tested = reopen(main.test_set, files, manifest)
        if tested is None:
            return []
        sources, references = tested.sources, tested.references
        text = (evaluation_dir(run_dir) / main.hypotheses).read_text(encoding="utf-8")
    except (OSError, UserError) as error:
        log.warning("no sample translations: %s", error)
        return []
    hypotheses = text.split("\n")[:-1]
    if not len(sources) == len(references) == len(hypotheses):
        log.warning("no sample translations: %s does not fit its test set", main.hypotheses)
        return []
    metric = CHRF()
    scores = [
        metric.sentence_score(hypothesis, [reference]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    chosen: dict[int, str] = {}
    for quantile, place in _SAMPLES:
        chosen.setdefault(order[round(quantile * (len(order) - 1))], place)
    return [
        Sample(place, sources[i], references[i], hypotheses[i], scores[i])
        for i, place in chosen.items()
    ]


def data_section(config: RunConfig, manifest: Manifest | None) -> dict[str, Any] | None:
    """The corpus: counts, filters, lengths, and how well batches are filled."""
    if manifest is None:
        return None
    data = manifest.data
    lengths = np.asarray(manifest.lengths)
    languages = f"source ({data.source_language})", f"target ({data.target_language})"
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    efficiency = plan.padding_efficiency()
    picture = figures.histogram(
        [(language, lengths[:, side]) for side, language in enumerate(languages)],
        name="lengths",
        title="Histogram of sentence lengths, source and target, in pieces.",
        x_label="pieces, end sign included",
        y_label="sentences",
    )
    sides = [
        {
            "name": languages[side],
            "tokens": tokens,
            "mean": float(lengths[:, side].mean()),
            "median": float(np.median(lengths[:, side])),
            "longest": int(lengths[:, side].max()),
            "efficiency": 100 * efficiency[side],
        }
        for side, tokens in enumerate((data.source_tokens, data.target_tokens))
    ]
    read = data.filters.get("read", 0)
    outcomes = sorted(data.filters.items(), key=lambda item: -item[1])
    filters = [
        {"reason": reason.replace("_", " "), "pairs": count, "share": 100 * count / max(1, read)}
        for reason, count in outcomes
        if count and reason != "read"
    ]
    unused = sorted(reason.replace("_", " ") for reason, count in outcomes if not count)
    return {
        "corpus": data.corpus,
        # Without its scheme an address is text: the page names nothing that could be fetched.
        "licence": re.sub(r"https?://", "", data.licence),
        "folder": str(manifest.folder),
        "sha256": manifest.sha256,
        "num_pairs": data.num_pairs,
        "vocabulary_size": data.vocabulary.size,
        "vocabulary_type": config.data.vocabulary_type,
        "num_shards": len(data.shards),
        "steps_per_epoch": plan.steps_per_epoch,
        "splits": {name: entry.num_pairs for name, entry in data.splits.items()},
        "sides": sides,
        "read": read,
        "filters": filters,
        "unused_filters": ", ".join(unused),
        "histogram": Markup(picture),  # noqa: S704
    }
