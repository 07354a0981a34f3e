"""A run's whole configuration: a torch-free, frozen schema, read from YAML and ``--set``.

A value's way: YAML file, then ``--set``, then one validated object, then ``config.json``, then the
worker, as an explicit argument. A default lives here (or in the packages' own schemas) and nowhere
else.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_shards.config import DataConfig
from data_shards.errors import UserError
from model.config import ModelConfig

# In a run's folder: whoever makes it asks the run to save a checkpoint and stop.
STOP_FILE = "stop"

_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class TrainerConfig(BaseModel):
    """Optimisation, precision, and when to look, save and stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(1, ge=0, lt=2**31)

    # When to stop: whichever comes first.
    max_steps: int | None = Field(100_000, ge=1)
    max_minutes: float | None = Field(
        None, gt=0, description="training time (set-up not counted) over all resumes of the run"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="validations (of the loss, or of BLEU: best_by) without a better one before "
        "stopping early",
    )

    # The step.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="what DeepSpeed shares out over ranks: nothing (0), Adam's state (1), "
        "gradients (2), weights (3). Higher ones save memory and send more. One worker has nobody "
        "to share with: 0 is then 1, which in fp32 holds a copy of the weights",
    )
    gradient_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="what gradients are rounded to while ranks sum them (bf16 halves what fp32 "
        "sends); by default the precision",
    )
    batches: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="packed: sequences end to end, nothing is computed on padding (a GPU, bf16 or "
        "fp16); auto: that where it is possible, else padded",
    )
    tokens_per_pass: int = Field(
        25_000,
        ge=1,
        description="packed: source (and target) tokens whose lanes are computed together at most; "
        "fewer where the device's memory asks for it",
    )
    compile: bool = Field(
        False, description="packed: compile the layers (needs a C compiler); else as they are"
    )
    loss: Literal["own", "liger"] = Field(
        "own", description="liger: Liger's kernels on a GPU (pip install 'babelray[liger]')"
    )
    tf32: bool = Field(
        True, description="on a GPU float32 products may round their factors to 10 bits"
    )
    peak_learning_rate: float | None = Field(
        None,
        gt=0,
        description="rate where warmup ends; default (d_model*warmup)^-0.5",
    )
    warmup_steps: int = Field(4000, ge=1)
    decay_fraction: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="last part of the run in which the rate also falls linearly to zero",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.98, ge=0, lt=1)
    adam_epsilon: float = Field(1e-9, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 leaves it alone")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an exponential moving average of the weights (checkpoint 'ema'); for "
        "example 0.999, which looks back about a thousand updates",
    )

    # When to look and to save, in steps.
    log_every: int = Field(50, ge=1)
    validate_every: int = Field(1000, ge=1)
    bleu_every: int | None = Field(
        None,
        ge=1,
        description="score a checkpoint with BLEU on the validation set every so many steps, "
        "beside the training",
    )
    best_by: Literal["loss", "bleu"] = Field(
        "loss", description="what makes a checkpoint the best: validation loss, or BLEU"
    )
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(5, ge=1, description="newest kept; the best is kept besides")
    threads: int | None = Field(
        None, ge=1, description="CPU threads a worker; by default the cores shared out"
    )
    metrics_port: int = Field(
        9400, ge=0, le=65_535, description="Prometheus metrics of this node; 0 serves none"
    )
    metrics_host: str = Field("127.0.0.1", description="address that the metrics are served on")
    stragglers: bool = Field(True, description="compare the ranks' own time, and tell the slowest")
    peak_flops: float | None = Field(
        None,
        gt=0,
        description="operations a second of one device, for utilisation; by default the data "
        "sheet's for a GPU that is known, else measured",
    )
    trackers: tuple[str, ...] = Field(
        (),
        description="where events go besides events.jsonl: tensorboard, an installed plug-in's "
        "name, or package.module:factory",
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class RecoveryConfig(BaseModel):
    """What a run does when something fails; an undisturbed one computes the same with any of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Checkpoints: where they go, and what a failing disk or storage may cost.
    storage: str | None = Field(
        None,
        description="folder or URL (s3://, gs://, ...) that checkpoints are published under, as "
        "<storage>/<run>/checkpoints; by default the run's own folder",
    )
    staging: Path | None = Field(
        None,
        description="fast local folder where checkpoints are written before publishing",
    )
    save_attempts: int = Field(
        5, ge=1, description="failed saves in a row after which the run stops with an error"
    )
    save_backoff_s: float = Field(
        10.0, gt=0, description="wait before a failed save is tried again; doubles each time"
    )

    # Workers: how failures are seen, and how many are borne.
    max_failures: int = Field(
        3, ge=0, description="restarts in a row without a new checkpoint before the run is given up"
    )
    hang_timeout_s: float = Field(
        300.0, gt=0, description="longest wait for a step before a rank shows its stack and ends"
    )
    grace_s: float = Field(
        30.0, gt=0, description="longest wait for a checkpoint when a machine is to be given back"
    )
    resize_interval_s: float = Field(
        60.0, gt=0, description="how often an elastic run looks whether it could be larger"
    )
    standby: bool = Field(
        True, description="keep started processes in reserve, so that a restart is quick"
    )

    # Numbers gone wrong: a step whose loss or gradient is not finite, or whose loss leaps up, is
    # not trained on.
    spike_nats: float | None = Field(
        3.0,
        gt=0,
        description="a loss this much above its running mean, nats a token, is a spike; null: no",
    )
    max_skipped: int = Field(10, ge=1, description="steps in a row not trained on, before ...")
    then: Literal["rewind", "stop"] = Field(
        "rewind", description="... the run goes back to its last good checkpoint, or stops"
    )
    max_rewinds: int = Field(3, ge=0, description="after as many the run stops")


class EvaluationConfig(BaseModel):
    """How sentences are translated.

    Source: Vaswani et al. 2017, section 6.1, for the defaults. Rules are named after their papers:
    wu: Wu et al. 2016 (arXiv 1609.08144), equation 14; average: the mean over the pieces, as in
    Jean et al. 2015; reward: so much a piece, He et al. 2016; summary: Gehrmann et al. 2018.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    search: Literal["beam", "greedy", "sample"] = "beam"
    beam: int = Field(4, ge=1, le=256)
    length_rule: Literal["wu", "average", "reward"] = Field(
        "wu", description="how hypotheses of different length are compared"
    )
    length_penalty: float = Field(
        0.6, ge=0, le=10, description="strength of length_rule; 0 compares plain log-probabilities"
    )
    coverage_rule: Literal["wu", "summary"] = "wu"
    coverage_penalty: float = Field(
        0.0, ge=0, le=10, description="strength of coverage_rule; 0 is none"
    )
    max_extra_length: int = Field(50, ge=0, description="longest output: source length and this")
    unknown: Literal["forbid", "copy", "keep"] = Field(
        "forbid",
        description="the unknown piece in a translation: never; replaced by the source word that "
        "is attended to most (Luong et al. 2015); or as it is",
    )

    # Of search "sample".
    temperature: float = Field(1.0, gt=0, le=100)
    top_k: int = Field(0, ge=0, description="sample from the k most probable pieces; 0 from all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="... and from the fewest that hold this much probability"
    )
    seed: int = Field(1, ge=0, lt=2**31)

    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the weights while decoding")
    batch_tokens: int = Field(4096, ge=1, description="source tokens decoded together, padded")


class RunConfig(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig = Field(default_factory=lambda: ModelConfig(preset="base"))
    data: DataConfig = Field(default_factory=DataConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.trainer.max_steps is None and self.trainer.max_minutes is None:
            raise ValueError(
                "the run would never end: set trainer.max_steps or trainer.max_minutes"
            )
        if self.trainer.best_by == "bleu" and self.trainer.bleu_every is None:
            raise ValueError(
                "trainer.best_by is bleu, but BLEU is never computed: set trainer.bleu_every"
            )
        if self.model.positions == "learned" and self.data.max_length > self.model.max_positions:
            raise ValueError(
                f"data.max_length {self.data.max_length} is beyond the model's "
                f"max_positions {self.model.max_positions}: raise model.max_positions"
            )
        return self

    def to_json(self) -> str:
        """The resolved configuration, as ``config.json`` holds it."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def load_config(file: Path | None, settings: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=value`` settings, validate.

    Args:
        file: a YAML mapping that holds only what differs from the defaults; None for none.
        settings: assignments as given to ``--set``; the value is read as YAML.

    Raises:
        UserError: the file is missing or not a mapping, a key is unknown, a value is out of range.
    """
    where = f"{file}" if file is not None else "--set"
    return parse_config(read_values(file, settings), where=where)


def read_values(file: Path | None, settings: Iterable[str] = ()) -> dict[str, Any]:
    """What a file and settings say, not validated yet: ``load_config`` has the arguments."""
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_mapping(file)
    for setting in settings:
        _assign(values, setting)
    return values


def parse_config(values: Mapping[str, Any], *, where: str) -> RunConfig:
    """Validate plain values (of YAML or of a ``config.json``).

    Raises:
        UserError: one line for each key that is wrong, with the mend.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"configuration ({where}): " + "\n  ".join(lines)) from None


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"configuration file not found: {file}. Give an existing file, "
            "for example --config configs/tiny.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file cannot be read: {file}: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"configuration file is not YAML: {file}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"configuration file must hold a mapping of sections: {file}")
    return values


def _assign(values: dict[str, Any], setting: str) -> None:
    key, sign, text = setting.partition("=")
    if not sign or not key:
        raise UserError(f"--set {setting!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting!r}: the value is not readable as YAML") from None
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3 as text
    elif isinstance(value, bool) and text.lower() not in {"true", "false"}:
        value = text  # and the language code "no" as false
    *sections, name = key.split(".")
    node = values
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {setting!r}: {section} is a value, not a section")
    node[name] = value


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        section = _section(path[:-1])
        close = get_close_matches(path[-1], section, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*path[:-1], close[0]])}?"
            if close
            else ("known here: " + ", ".join(section))
        )
        return f"unknown key {name}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}: {message} (given: {item['input']!r})"


def _section(path: list[str]) -> list[str]:
    """The keys of the section at ``path``."""
    node: Any = RunConfig
    for part in path:
        field = node.model_fields.get(part)
        if field is None:
            return []
        node = field.annotation
        if isinstance(node, types.UnionType) or typing.get_origin(node) is typing.Union:
            node = typing.get_args(node)[0]
        if not (isinstance(node, type) and issubclass(node, BaseModel)):
            return []
    return sorted(node.model_fields)
