"""What a report says first of a run: its model in a line, its state, its main numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from importlib import metadata

from model.description import line
from trainer import exhibits_reliability
from trainer.exhibits_reliability import told_restarts
from trainer.formats import format_duration, format_number
from trainer.report_log import RunLog

_ENDS = {
    "max_steps": "reached trainer.max_steps",
    "max_minutes": "reached trainer.max_minutes",
    "early_stopping": "no better validation for trainer.patience times",
    "stopped": "stopped on request",
}


def summary(log: RunLog) -> str:
    """Corpus, model and mode of training in a line."""
    config, manifest = log.config, log.manifest
    model = config.model
    languages = (
        (manifest.source_language, manifest.target_language)
        if manifest
        else (config.data.source, config.data.target)
    )
    return (
        f"{config.data.corpus}, {' → '.join(languages)} · {model.preset or model.kind}: "
        f"{line(model)} · {config.trainer.precision}, "
        f"ZeRO {config.trainer.zero_stage}, seed {config.trainer.seed}"
    )


def state(log: RunLog) -> dict[str, str]:
    """What the log's end says of the run: ``word`` (not started, running, unfinished, finished,
    failed) and ``detail``.
    """
    begun = log.of("started", "resumed", "step")
    since = begun[-1].get("time", 0) if begun else 0
    final = [failure for failure in log.failures if failure.get("final")]
    if log.is_live:
        return {"word": "running", "detail": "trained by a command at the moment"}
    if final and final[-1].get("time", 0) >= since:
        return {"word": "failed", "detail": str(final[-1].get("message") or final[-1].get("cause"))}
    if not begun:
        return {"word": "not started", "detail": "nothing has been logged yet"}
    ends = log.of("finished")
    if ends and ends[-1].get("time", 0) >= since:
        reason = str(ends[-1].get("reason"))
        return {"word": "finished", "detail": _ENDS.get(reason, reason)}
    if log.is_live is False:
        return {"word": "unfinished", "detail": "interrupted"}
    return {"word": "unfinished", "detail": "still training, or interrupted"}


def tiles(log: RunLog) -> list[dict[str, str]]:
    """The main numbers, each with ``label``, ``value``, ``note`` and ``code``."""
    main = log.main
    steps = log.steps
    validated = [event for event in log.of("validated") if event.get("perplexity") is not None]
    begun = log.of("started", "resumed")
    # A run may end between two logged steps.
    end, totals, timed = log.end, log.totals, log.timed
    found = []
    if main:
        where = f"{main.test_set}, checkpoint {main.checkpoint}"
        found.append(_tile("BLEU", f"{main.bleu:.2f}", where, main.signature))
        found.append(_tile("chrF", f"{main.chrf:.2f}", where, main.chrf_signature))
    else:
        found.append(_tile("BLEU", "–", "not evaluated yet"))
    if validated:
        best = min(validated, key=lambda event: event["perplexity"])
        found.append(
            _tile(
                "Validation perplexity",
                f"{best['perplexity']:.2f}",
                f"best, at step {best['step']:,}; the last, at step {validated[-1]['step']:,}: "
                f"{validated[-1]['perplexity']:.2f}",
            )
        )
    if totals:
        tokens = (totals.get("target_tokens") or 0) + (totals.get("source_tokens") or 0)
        speeds = [event["tokens_per_second"] for event in steps if event.get("tokens_per_second")]
        used = [event["mfu"] for event in steps if event.get("mfu") is not None]
        found += [
            _tile("Steps", f"{end['step']:,}", f"epoch {(log.epoch or 0) + 1}"),
            _tile(
                "Tokens trained on",
                format_number(tokens),
                f"{format_number(totals.get('target_tokens'))} of them target tokens"
                + log.told_place(totals),
            ),
            _tile(
                "Training time",
                format_duration(timed.get("elapsed_s")),
                f"set-up not counted{log.told_place(timed)}",
            ),
            _tile(
                "Tokens a second",
                format_number(statistics.median(speeds) if speeds else None),
                "median, source and target"
                + (f" · MFU {100 * statistics.median(used):.1f} %" if used else ""),
            ),
        ]
    if begun:
        sizes = [event["world_size"] for event in begun if "world_size" in event]
        times = told_restarts(exhibits_reliability.restarts(log)) or "never restarted"
        note = f"{times}; {min(sizes)} to {max(sizes)} workers" if len(set(sizes)) > 1 else times
        if sizes:
            found.append(_tile("Workers", f"{sizes[-1]}", note))
        if begun[-1].get("parameters"):
            found.append(
                _tile(
                    "Parameters",
                    format_number(begun[-1]["parameters"]),
                    f"{begun[-1]['parameters']:,} exactly",
                )
            )
    return found


def _tile(label: str, value: str, note: str, code: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "code": code}


def versions(log: RunLog) -> str:
    """Who wrote the page, and what trained the run."""
    try:
        own = f"babelray {metadata.version('babelray')}"
    except metadata.PackageNotFoundError:
        own = "babelray"
    counts = Counter(
        f"torch {event['torch']} on {event.get('device', 'an unknown device')}"
        for event in log.of("started", "resumed")
        if event.get("torch")
    )
    return " · ".join([own, *counts])
