"""Where a run was made, how to repeat it, and a paragraph on it for a paper's appendix."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from data_shards.config import PLACES
from model import description
from trainer.config import RunConfig
from trainer.evaluate import Result
from trainer.exhibits_cost import Cost, format_flops
from trainer.formats import format_bytes, format_duration, format_number
from trainer.report_lines import Event
from trainer.report_log import RunLog

# Where things lie and how they are watched: another machine's are its own.
_PLACES = frozenset(
    {
        *(f"data.{name}" for name in PLACES), "data.prefetch_steps",
        "recovery.storage", "recovery.staging",
        "trainer.metrics_host", "trainer.metrics_port", "trainer.trackers", "trainer.threads",
    }
)  # fmt: skip

_REFERENCES = {
    "sentencepiece": "T. Kudo, J. Richardson. SentencePiece: A simple and language independent "
    "subword tokenizer and detokenizer for Neural Text Processing. EMNLP 2018.",
    "adam": "D. P. Kingma, J. Ba. Adam: A Method for Stochastic Optimization. ICLR 2015.",
    "zero": "S. Rajbhandari, J. Rasley, O. Ruwase, Y. He. ZeRO: Memory Optimizations Toward "
    "Training Trillion Parameter Models. SC 2020.",
    "sacrebleu": "M. Post. A Call for Clarity in Reporting BLEU Scores. WMT 2018.",
}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def changes(config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Settings that are not the schema's defaults: name, value, default."""
    defaults = flat(RunConfig().model_dump(mode="json"))
    return [
        (name, value, defaults.get(name))
        for name, value in flat(config.model_dump(mode="json")).items()
        if value != defaults.get(name)
    ]


def environment(log: RunLog) -> dict[str, Any]:
    """Plain values of the newest attempt: ``device``, ``machine``, ``versions``, ``workers``,
    ``precision``, ``dashboard``; and ``others``, how many attempts ran on something else.
    """
    begun = log.of("started", "resumed")
    last = begun[-1] if begun else {}
    versions = dict(last.get("versions") or {})
    if not versions and last.get("torch"):
        versions = {"torch": last["torch"]}
    kinds = [json.dumps(_machine(event), sort_keys=True) for event in begun]
    address = log.dashboard.get("dashboard_url") or ""
    return {
        "device": last.get("device"),
        "machine": _machine(last),
        "versions": versions,
        "workers": log.attempts[-1].num_workers if log.attempts else None,
        "precision": log.config.trainer.precision,
        "zero_stage": log.config.trainer.zero_stage,
        "others": sum(kind != kinds[-1] for kind in kinds),
        # Without its scheme an address is text: the page names nothing that could be fetched.
        "dashboard": address.partition("://")[2] or None,
    }


def environment_rows(log: RunLog) -> list[tuple[str, str]]:
    """The same as a table: name and text."""
    found = environment(log)
    machine = found["machine"]
    rows = [
        ("Device", machine.get("gpu") or found["device"]),
        ("Processor", machine.get("cpu")),
        ("Cores", machine.get("cores")),
        ("Memory", format_bytes(machine["memory_bytes"]) if machine.get("memory_bytes") else None),
        ("Workers", found["workers"]),
        ("Precision", f"{found['precision']}, ZeRO stage {found['zero_stage']}"),
        *((name, version) for name, version in found["versions"].items()),
        ("Ray dashboard while it ran", found["dashboard"]),
        ("Attempts on other machines", found["others"] or None),
    ]
    return [(name, _text(value)) for name, value in rows if value not in (None, "")]


def command(log: RunLog) -> str:
    """What trains the same again, from the run's own configuration."""
    name = shlex.quote(f"{log.name}-again")
    file = shlex.quote(str(log.run_dir / "config.json"))
    return f"babelray train --config {file}{_workers(log)} --name {name}"


def command_alone(log: RunLog) -> str:
    """The same without the run's folder: what differs from the defaults, places aside; a setting a
    line.
    """
    preset = log.config.model.preset
    defaults = flat(RunConfig(model={"preset": preset}).model_dump(mode="json"))
    settings = [f"--set model.preset={preset}"] if preset else []
    settings += [
        f"--set {shlex.quote(f'{name}={_yaml(value)}')}"
        for name, value in flat(log.config.model_dump(mode="json")).items()
        if value != defaults.get(name) and name not in _PLACES and name != "model.preset"
    ]
    return " \\\n  ".join([f"babelray train{_workers(log)}", *settings])


def method(log: RunLog, found: Cost) -> list[str]:
    """Paragraphs on model, data, training, hardware and scores; only of what is known."""
    texts = (_model(log), _data(log), _training(log), _hardware(log, found), _scores(log.main))
    return [text for text in texts if text]


def references(log: RunLog) -> list[str]:
    """What the paragraphs rest on."""
    names = ["sentencepiece", "adam"]
    if log.config.trainer.zero_stage:
        names.append("zero")
    if log.main:
        names.append("sacrebleu")
    return [*description.references(log.config.model), *(_REFERENCES[name] for name in names)]


def _machine(event: Event) -> Event:
    value = event.get("machine")
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _yaml(value: Any) -> str:
    """As ``--set`` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _workers(log: RunLog) -> str:
    return f" --workers {log.attempts[-1].num_workers}" if log.attempts else ""


def _model(log: RunLog) -> str:
    parameters = log.last("parameters", "started", "resumed")
    size = f": {parameters:,} parameters" if parameters else ""
    return f"We train {description.sentence(log.config.model)}{size}."


def _data(log: RunLog) -> str:
    data = log.config.data
    lengths = f"Pairs of more than {data.max_length} pieces a side are left out."
    if log.manifest is None:
        return f"The corpus is {data.corpus}, {data.source} to {data.target}. {lengths}"
    found = log.manifest.data
    return (
        f"The training data are {found.num_pairs:,} sentence pairs of {found.corpus}, "
        f"{found.source_language} to {found.target_language} ({format_number(found.source_tokens)} "
        f"source and {format_number(found.target_tokens)} target pieces), cut by one "
        f"SentencePiece {data.vocabulary_type} vocabulary of {found.vocabulary.size:,} pieces for "
        f"both languages (Kudo and Richardson, 2018). {lengths}"
    )


def _training(log: RunLog) -> str:
    config = log.config.trainer
    peak = config.peak_learning_rate or (log.config.model.d_model * config.warmup_steps) ** -0.5
    parts = [
        f"We use {'AdamW' if config.weight_decay else 'Adam'} (Kingma and Ba, 2015) with "
        f"β1 = {config.adam_beta1:g}, β2 = {config.adam_beta2:g} and ε = {config.adam_epsilon:g}"
        + (f", weight decay {config.weight_decay:g}" if config.weight_decay else "")
        + f"; the learning rate rises linearly over {config.warmup_steps:,} steps to {peak:.3g}, "
        "then falls with the inverse square root of the step"
        + (f", and linearly to zero over the last {config.decay_fraction:.0%} of the run"
           if config.decay_fraction else "")
        + f". Label smoothing is {config.label_smoothing:g}"
        + (f"; gradients are clipped to a norm of {config.clip_norm:g}" if config.clip_norm else "")
        + f"; the seed is {config.seed}."
    ]  # fmt: skip
    event = log.totals
    if event.get("target_tokens") and event.get("source_tokens"):
        parts.append(
            f"A batch holds at most {log.config.data.tokens_per_step:,} padded tokens a side, on "
            f"average {event['source_tokens'] / event['step']:,.0f} source and "
            f"{event['target_tokens'] / event['step']:,.0f} target tokens; training took "
            f"{log.end['step']:,} updates, "
            f"{format_number(event['source_tokens'] + event['target_tokens'])} tokens in all"
            f"{log.told_place(event)}."
        )
    return " ".join(parts)


def _hardware(log: RunLog, found: Cost) -> str:
    if not log.attempts or not log.totals:
        return ""
    there = environment(log)
    device = there["machine"].get("gpu") or there["machine"].get("cpu") or there["device"]
    workers = there["workers"]
    stage = there["zero_stage"]
    text = (
        f"Training ran on {workers} worker{'' if workers == 1 else 's'}"
        f"{f' ({_text(device)})' if device else ''} in {there['precision']}"
        + (f" with ZeRO stage {stage} (Rajbhandari et al., 2020)" if stage else "")
        + f" for {format_duration(found.training_s)}, {found.device_hours:.3g} device-hours"
    )
    if found.counted_flops:
        text += f", {format_flops(found.counted_flops)} floating-point operations of the model"
    if found.paper_flops:
        text += (
            f" ({format_flops(found.paper_flops)} by the method of Vaswani et al., 2017: time, "
            "devices, sustained rate)"
        )
    return f"{text}."


def _scores(main: Result | None) -> str:
    if main is None:
        return ""
    search = main.settings.get("search", "beam")
    how = (
        f"beam search of {main.beam} and a length penalty of {main.length_penalty:g}"
        if search == "beam"
        else f"{'greedy search' if search == 'greedy' else 'sampling'}"
    )
    weights = (
        f"the mean of {len(main.averaged_steps)} checkpoints"
        if len(main.averaged_steps) > 1
        else f"the checkpoint of step {main.step:,} ({main.checkpoint})"
    )
    return (
        f"With {weights}, {how}, sacreBLEU (Post, 2018) gives {main.bleu:.2f} BLEU "
        f"({main.signature}) and {main.chrf:.2f} chrF ({main.chrf_signature}) on {main.test_set} "
        f"({main.num_sentences:,} sentences)."
    )
