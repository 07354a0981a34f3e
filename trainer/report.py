"""A run's page, ``report.html``: what was trained, how it went, how good it is; all in one file.

Whatever a run has not got yet (checkpoints, evaluations, its corpus) leaves a note in its place.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer import exhibits, exhibits_attention, exhibits_evaluation
from trainer.config import RunConfig
from trainer.evaluate import Result, read_results
from trainer.exhibits import Event
from trainer.formats import (
    format_bytes,
    format_duration,
    format_moment,
    format_number,
    format_score,
    format_share,
)
from trainer.run import (
    open_checkpoints,
    read_config,
    read_events,
    report_path,
)
from trainer.storage import write_atomically

log = logging.getLogger(__name__)


def write_report(run_dir: Path) -> Path:
    """Write the run's ``report.html`` and return its path.

    The page is one file without any reference to another: it can be mailed, archived, printed.

    Raises:
        UserError: there is no such run.
    """
    config = read_config(run_dir)
    events = read_events(run_dir)
    evaluations = read_results(run_dir)
    try:
        manifest, missing = Manifest.load(config.data.folder()), ""
    except UserError as error:
        manifest, missing = None, str(error)
    main = _main_evaluation(evaluations)
    context = {
        "name": run_dir.resolve().name,
        "summary": _summary(config, manifest),
        "state": _state(events),
        "tiles": _tiles(events, main),
        "curves": exhibits.curves(events, evaluations),
        "validations": [event for event in events if event["event"] == "validated"],
        "evaluations": exhibits_evaluation.results(evaluations),
        "signatures": exhibits_evaluation.signatures(evaluations),
        "by_length": exhibits_evaluation.by_length(main),
        "by_frequency": exhibits_evaluation.by_frequency(main),
        "worst": exhibits_evaluation.worst(main),
        "comparisons": exhibits_evaluation.comparisons(evaluations),
        "main": main,
        "samples": exhibits.samples(run_dir, main, manifest),
        "attention": exhibits_attention.attention(run_dir, manifest),
        "data": exhibits.data_section(config, manifest),
        "data_missing": missing,
        "changes": _changes(config),
        "settings": sorted(_flat(config.model_dump(mode="json")).items()),
        "history": _history(events),
        "checkpoints": _checkpoints(run_dir, events),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": _versions(events),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        duration=format_duration,
        size=format_bytes,
        moment=format_moment,
        score=format_score,
        share=format_share,
    )
    file = report_path(run_dir)
    write_atomically(file, environment.get_template("report.html.j2").render(context))
    return file


def _summary(config: RunConfig, manifest: Manifest | None) -> str:
    model = config.model
    languages = (
        (manifest.source_language, manifest.target_language)
        if manifest
        else (config.data.source, config.data.target)
    )
    return (
        f"{config.data.corpus}, {' → '.join(languages)} · {model.preset or model.kind}: "
        f"{model.encoder_layers}+{model.decoder_layers} layers, width {model.d_model}, "
        f"{model.num_heads} heads, {model.norm}-norm · {config.trainer.precision}, "
        f"ZeRO {config.trainer.zero_stage}, seed {config.trainer.seed}"
    )


def _state(events: list[Event]) -> dict[str, str]:
    """What the log's end says of the run: whether it ended, and why."""
    reasons = {
        "max_steps": "reached trainer.max_steps",
        "max_minutes": "reached trainer.max_minutes",
        "early_stopping": "no better validation for trainer.patience times",
        "stopped": "stopped on request",
    }
    begun = [event for event in events if event["event"] in ("started", "resumed", "step")]
    if not begun:
        return {"word": "not started", "detail": "nothing has been logged yet"}
    ends = [event for event in events if event["event"] == "finished"]
    if ends and ends[-1].get("time", 0) >= begun[-1].get("time", 0):
        reason = str(ends[-1].get("reason"))
        return {"word": "finished", "detail": reasons.get(reason, reason)}
    return {"word": "unfinished", "detail": "still training, or interrupted"}


def _tiles(events: list[Event], main: Result | None) -> list[dict[str, str]]:
    steps = [event for event in events if event["event"] == "step"]
    validated = [event for event in events if event["event"] == "validated"]
    begun = [event for event in events if event["event"] in ("started", "resumed")]
    last = steps[-1] if steps else {}
    # A run may end between two logged steps.
    end = max(
        (event for event in events if event["event"] in ("step", "validated", "finished")),
        key=lambda event: (event.get("step", 0), event.get("elapsed_s") or 0.0),
        default={},
    )
    tiles = []
    if main:
        where = f"{main.test_set}, checkpoint {main.checkpoint}"
        tiles.append(_tile("BLEU", f"{main.bleu:.2f}", where, main.signature))
        tiles.append(_tile("chrF", f"{main.chrf:.2f}", where, main.chrf_signature))
    else:
        tiles.append(_tile("BLEU", "–", "not evaluated yet"))
    if validated:
        best = min(validated, key=lambda event: event["perplexity"])
        tiles.append(
            _tile(
                "Validation perplexity",
                f"{best['perplexity']:.2f}",
                f"best, at step {best['step']:,}; {validated[-1]['perplexity']:.2f} at the end",
            )
        )
    if steps:
        tokens = last.get("target_tokens", 0) + last.get("source_tokens", 0)
        speed = statistics.median(event.get("tokens_per_second") or 0.0 for event in steps)
        used = [event["mfu"] for event in steps if event.get("mfu") is not None]
        tiles += [
            _tile("Steps", f"{end['step']:,}", f"epoch {last.get('epoch', 0) + 1}"),
            _tile(
                "Tokens trained on",
                format_number(tokens),
                f"{format_number(last.get('target_tokens'))} of them target tokens",
            ),
            _tile("Training time", format_duration(end.get("elapsed_s")), "set-up not counted"),
            _tile(
                "Tokens a second",
                format_number(speed),
                "median, source and target"
                + (f" · MFU {100 * statistics.median(used):.1f} %" if used else ""),
            ),
        ]
    if begun:
        sizes = [event["world_size"] for event in begun if "world_size" in event]
        resumed = sum(event["event"] == "resumed" for event in begun)
        times = {0: "never resumed", 1: "resumed once"}.get(resumed, f"resumed {resumed} times")
        note = f"{times}; {min(sizes)} to {max(sizes)} workers" if len(set(sizes)) > 1 else times
        if sizes:
            tiles.append(_tile("Workers", f"{sizes[-1]}", note))
        if begun[-1].get("parameters"):
            tiles.append(
                _tile(
                    "Parameters",
                    format_number(begun[-1]["parameters"]),
                    f"{begun[-1]['parameters']:,} exactly",
                )
            )
    return tiles


def _tile(label: str, value: str, note: str, code: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "code": code}


def _main_evaluation(evaluations: list[Result]) -> Result | None:
    """The result to show first: of the test set, of the best checkpoint, the newest."""
    ranked = sorted(
        evaluations,
        key=lambda r: (r.test_set == "test", r.checkpoint == "best", r.time),
    )
    return ranked[-1] if ranked else None


def _changes(config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Settings that are not the schema's defaults: name, value, default."""
    defaults = _flat(RunConfig().model_dump(mode="json"))
    values = _flat(config.model_dump(mode="json"))
    return [
        (name, value, defaults.get(name))
        for name, value in values.items()
        if value != defaults.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _history(events: list[Event]) -> list[dict[str, Any]]:
    """What happened besides steps, validations, their BLEU and checkpoints."""
    told = []
    hidden = {"event", "time", "step", "elapsed_s"}
    for event in events:
        if event["event"] in ("step", "validated", "checkpoint"):
            continue
        if exhibits.is_validation_bleu(event):
            continue
        details = ", ".join(
            f"{name.replace('_', ' ')} {_detail(value)}"
            for name, value in event.items()
            if name not in hidden and value is not None
        )
        told.append(
            {
                "time": event.get("time"),
                "step": event.get("step"),
                "event": event["event"],
                "details": details,
            }
        )
    return told


def _detail(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checkpoints(run_dir: Path, events: list[Event]) -> dict[str, Any] | None:
    written = [event for event in events if event["event"] == "checkpoint"]
    kept = open_checkpoints(run_dir).committed()
    if not written and not kept:
        return None
    sizes = [event["bytes"] for event in written if event.get("bytes")]
    seconds = [event["seconds"] for event in written if event.get("seconds") is not None]
    return {
        "written": len(written),
        "kept": ", ".join(f"{step:,}" for step in kept) or "none",
        "bytes": sizes[-1] if sizes else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
    }


def _versions(events: list[Event]) -> str:
    try:
        own = f"babelray {metadata.version('babelray')}"
    except metadata.PackageNotFoundError:
        own = "babelray"
    counts = Counter(
        f"torch {event['torch']} on {event.get('device', 'an unknown device')}"
        for event in events
        if event["event"] in ("started", "resumed") and event.get("torch")
    )
    return " · ".join([own, *counts])
