"""What a report shows of a run: curves, sample translations, an attention map, the corpus.

Each function returns plain values for the template, or nothing where the run has not got that far.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from sacrebleu.metrics import CHRF

from data_shards.config import BOS_ID, EOS_ID
from data_shards.errors import UserError
from data_shards.manifest import Manifest, SplitName
from data_shards.plan import Plan
from trainer import figures
from trainer.config import RunConfig
from trainer.evaluate import Result, read_test_set
from trainer.figures import Series
from trainer.formats import format_number
from trainer.run import evaluation_dir, load_model, open_checkpoints
from trainer.translate import decode

log = logging.getLogger(__name__)

Event = dict[str, Any]

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
# Pieces of a sentence whose attention map is legible: what is looked for, and the most.
_MAP_LENGTH, _LONGEST_MAP = 12, 20
_MAX_CURVE_POINTS = 1500


@dataclass(frozen=True)
class Sample:
    """A test sentence with its translation and where its chrF stands among the others'."""

    place: str
    source: str
    reference: str
    hypothesis: str
    chrf: float


def curves(events: list[Event], evaluations: list[Result]) -> list[dict[str, Any]]:
    """Charts over the run's steps, each with ``heading``, ``note``, ``svg`` and ``wide``."""
    steps = _thinned([event for event in events if event["event"] == "step"])
    validated = [event for event in events if event["event"] == "validated"]
    breaks = [event["step"] for event in events if event["event"] == "resumed" and "step" in event]
    if not steps and not validated:
        return []

    def series(source: list[Event], key: str, label: str) -> list[Series]:
        points = [(e["step"], e[key]) for e in source if e.get(key) is not None]
        return [Series(label, *zip(*points, strict=True))] if points else []

    bleu: dict[str, list[Result]] = {}
    for result in evaluations:
        if len(result.averaged_steps) == 1:
            bleu.setdefault(result.test_set, []).append(result)
    tested = []
    for test_set, results in bleu.items():
        # One point a step: "best" and "last" may be the same checkpoint.
        points = sorted({result.step: result.bleu for result in results}.items())
        if len(points) > 1:
            tested.append(Series(test_set, *zip(*points, strict=True)))
    charts = [
        chart
        for chart in (
            _Chart(
                "loss",
                "Loss",
                "Negative log-likelihood a target token, without label smoothing.",
                "nats a token",
                series(steps, "mean_nll", "training")
                + series(validated, "valid_nll", "validation"),
            ),
            _Chart("bleu", "BLEU", "Of the checkpoints that were evaluated.", "BLEU", tested),
            _Chart(
                "rate",
                "Learning rate",
                "Of each logged step.",
                "rate",
                series(steps, "learning_rate", "rate"),
                from_zero=True,
            ),
            _Chart(
                "speed",
                "Throughput",
                "Source and target tokens; padding is not counted.",
                "tokens a second",
                series(steps[1:] or steps, "tokens_per_second", "throughput"),
                from_zero=True,
            ),
            _Chart(
                "norm",
                "Gradient norm",
                "Before clipping.",
                "norm",
                series(steps, "grad_norm", "norm"),
                from_zero=True,
            ),
        )
        if chart.lines
    ]
    # Two in a row: of an odd number the first takes a row of its own.
    return [
        _drawn(chart, breaks, wide=number == 0 and len(charts) % 2 == 1)
        for number, chart in enumerate(charts)
    ]


@dataclass(frozen=True)
class _Chart:
    name: str
    heading: str
    note: str
    y_label: str
    lines: list[Series]
    from_zero: bool = False


def _drawn(chart: _Chart, breaks: list[int], *, wide: bool) -> dict[str, Any]:
    ends = "; ".join(
        f"{line.label}: {format_number(line.y[-1])} at the end" for line in chart.lines
    )
    picture = figures.curves(
        chart.lines,
        name=chart.name,
        title=f"{chart.heading} over steps. {ends}.",
        y_label=chart.y_label,
        breaks=breaks,
        from_zero=chart.from_zero,
        wide=wide,
    )
    return {
        "heading": chart.heading,
        "note": chart.note,
        "svg": Markup(picture),  # noqa: S704
        "wide": wide,
    }


def _thinned(steps: list[Event]) -> list[Event]:
    """Evenly taken points, the last one among them: a screen shows no more."""
    if len(steps) <= _MAX_CURVE_POINTS:
        return steps
    taken = np.linspace(0, len(steps) - 1, _MAX_CURVE_POINTS).round().astype(int)
    return [steps[index] for index in taken]


def samples(run_dir: Path, main: Result | None, manifest: Manifest | None) -> list[Sample]:
    """Sentences of the main evaluation at fixed quantiles of quality, the best first."""
    if main is None:
        return []
    try:
        if main.source and main.reference:
            tested = read_test_set(Path(main.source), Path(main.reference))
            sources, references = tested.sources, tested.references
        elif manifest is not None:
            split: SplitName = "valid" if main.test_set == "valid" else "test"
            sources, references = manifest.split_text(split)
        else:
            return []
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


def attention(run_dir: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    """Cross-attention over one sentence of the test set, as the best checkpoint translates it."""
    if manifest is None or not open_checkpoints(run_dir).committed():
        return None
    try:
        loaded = load_model(run_dir, "best")
        sources, _ = manifest.split_text("test" if "test" in manifest.data.splits else "valid")
    except UserError as error:
        log.warning("no attention map: %s", error)
        return None
    pieces = loaded.vocabulary.encode(sources[:200])
    fitting = [ids for ids in pieces if 0 < len(ids) <= _LONGEST_MAP]
    if not fitting:
        return None
    source = [*min(fitting, key=lambda ids: abs(len(ids) - _MAP_LENGTH)), EOS_ID]
    with torch.inference_mode():
        found = decode(loaded, [source], loaded.config.evaluation)[0].ids
        # A model that repeats itself for ever is shown up to here.
        written = [*found, EOS_ID][: 2 * _LONGEST_MAP]
        target_in_BT = torch.tensor([[BOS_ID, *written[:-1]]])
        maps = loaded.model.attention_maps(torch.tensor([source]), target_in_BT)
    cross_LHTS = maps["cross"][:, 0].numpy()
    columns = _labels(loaded.vocabulary.pieces(source))
    rows = _labels(loaded.vocabulary.pieces(written))
    source_text, target_text = loaded.vocabulary.decode([source, found])
    title = f"Cross-attention, mean over layers and heads: {source_text} → {target_text}"
    layers = [
        {
            "number": number,
            "heads": [
                Markup(  # noqa: S704
                    figures.attention_thumbnail(
                        weights, title=f"Cross-attention of layer {number}, head {head}"
                    )
                )
                for head, weights in enumerate(layer, start=1)
            ],
        }
        for number, layer in enumerate(cross_LHTS, start=1)
    ]
    return {
        "step": loaded.step,
        "source": source_text,
        "target": target_text,
        "mean": Markup(  # noqa: S704
            figures.attention_map(cross_LHTS.mean((0, 1)), columns, rows, title=title)
        ),
        "layers": layers,
    }


def _labels(pieces: list[str]) -> list[str]:
    return [piece.replace("\u2581", "·") for piece in pieces]


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
