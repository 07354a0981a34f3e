"""Table 2: what training costs and what it gives, the paper's rows beside runs of this system.

Source: Vaswani et al. 2017 (arXiv 1706.03762v7), Table 2 and section 6.1 with footnote 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from data_shards.config import DataConfig
from model.config import ModelConfig
from trainer import exhibits_cost
from trainer.config import RunConfig, TrainerConfig
from trainer.paper.hardware import make_hardware
from trainer.paper.lengths import corpus_size
from trainer.paper.plan import reckon
from trainer.report_log import RunLog

_BASE, _BIG = exhibits_cost.PAPER_FLOPS["base"], exhibits_cost.PAPER_FLOPS["big"]
_PAPER_DEVICES, _PAPER_DEVICE = 8, "P100"
# Of the data's bound, so that a step has about 25,000 target tokens: configs/wmt14-*.yaml.
_TOKENS_PER_STEP = 27_000


@dataclass(frozen=True)
class PaperRow:
    """A row with the digits that are printed: BLEU on newstest2014, training cost in operations."""

    model: str
    bleu_en_de: str | None = None
    bleu_en_fr: str | None = None
    flops_en_de: str | None = None
    flops_en_fr: str | None = None


PAPER = (
    PaperRow("ByteNet", "23.75"),
    PaperRow("Deep-Att + PosUnk", None, "39.2", None, "1.0e20"),
    PaperRow("GNMT + RL", "24.6", "39.92", "2.3e19", "1.4e20"),
    PaperRow("ConvS2S", "25.16", "40.46", "9.6e18", "1.5e20"),
    PaperRow("MoE", "26.03", "40.56", "2.0e19", "1.2e20"),
    PaperRow("Deep-Att + PosUnk Ensemble", None, "40.4", None, "8.0e20"),
    PaperRow("GNMT + RL Ensemble", "26.30", "41.16", "1.8e20", "1.1e21"),
    PaperRow("ConvS2S Ensemble", "26.36", "41.29", "7.7e19", "1.2e21"),
    # The paper prints one cost for both languages.
    PaperRow("Transformer (base model)", "27.3", "38.1", "3.3e18", "3.3e18"),
    PaperRow("Transformer (big)", "28.4", "41.8", "2.3e19", "2.3e19"),
)


@dataclass(frozen=True)
class Recipe:
    """A training of the paper's, as section 5 tells it."""

    name: str
    preset: str
    target: str
    vocabulary_size: int
    steps: int
    hours: float
    paper_flops: float


RECIPES = (
    Recipe("base, en-de", "base", "de", 37_000, 100_000, 12.0, _BASE),
    Recipe("big, en-de", "big", "de", 37_000, 300_000, 84.0, _BIG),
    Recipe("base, en-fr", "base", "fr", 32_000, 100_000, 12.0, _BASE),
    Recipe("big, en-fr", "big", "fr", 32_000, 300_000, 84.0, _BIG),
)


@dataclass(frozen=True)
class Counted:
    """One of the paper's trainings, by its own method and counted from the model.

    Attributes:
        paper_flops: as printed.
        method_flops: time, times 8, times the sustained rate of a P100 (footnote 5).
        flops: of the steps, counted: matrix products, forward and backward, real tokens.
        utilisation: counted over the paper's method: what share of what it says a P100 sustains
            was the model's own work.
        target_tokens: of a step.
    """

    name: str
    num_parameters: int
    steps: int
    hours: float
    target_tokens: float
    source_tokens: float
    flops: float
    method_flops: float
    paper_flops: float
    utilisation: float


@cache
def count(recipe: Recipe) -> Counted:
    """The recipe's operations, counted on the corpus' published size."""
    config = RunConfig(
        model=ModelConfig(preset=recipe.preset),
        data=DataConfig(
            corpus=f"wmt14-en-{recipe.target}",
            source="en",
            target=recipe.target,
            vocabulary_size=recipe.vocabulary_size,
            lanes=_PAPER_DEVICES,
            tokens_per_step=_TOKENS_PER_STEP,
        ),
        trainer=TrainerConfig(max_steps=recipe.steps, precision="fp32"),
    )
    hardware = make_hardware(_PAPER_DEVICES, _PAPER_DEVICE)
    rate = hardware.device.paper_flops
    assert rate is not None
    dry = reckon(config, hardware, corpus_size(config.data, prepared=False))
    method = recipe.hours * 3600 * _PAPER_DEVICES * rate
    return Counted(
        name=recipe.name,
        num_parameters=dry.num_parameters,
        steps=recipe.steps,
        hours=recipe.hours,
        target_tokens=dry.batches.target_tokens,
        source_tokens=dry.batches.source_tokens,
        flops=dry.flops,
        method_flops=method,
        paper_flops=recipe.paper_flops,
        utilisation=dry.flops / method,
    )


def of_run(log: RunLog) -> dict[str, Any]:
    """A run's row: cost by both methods, and the scores of its main evaluation."""
    cost = exhibits_cost.cost(log)
    main = log.main
    config = log.config
    return {
        "run": log.name,
        "model": config.model.preset or config.model.kind,
        "kind": config.model.kind,
        "corpus": f"{config.data.corpus} {config.data.source}-{config.data.target}",
        "num_parameters": log.last("parameters", "started", "resumed"),
        "steps": log.end.get("step", 0),
        "training_s": cost.training_s,
        "devices": log.attempts[-1].num_workers if log.attempts else None,
        "counted_flops": cost.counted_flops,
        "method_flops": cost.paper_flops,
        "utilisation": cost.ratio,
        "unknown": cost.unknown,
        "test_set": None if main is None else main.test_set,
        "checkpoint": None if main is None else main.checkpoint,
        "bleu": None if main is None else main.bleu,
        "signature": None if main is None else main.signature,
        "paper_bleu": None if main is None else main.paper_bleu,
        "paper_signature": None if main is None else main.paper_signature,
    }


def table(logs: Sequence[RunLog]) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    return {
        "paper": [asdict(row) for row in PAPER],
        "counted": [asdict(count(recipe)) for recipe in RECIPES],
        "runs": [of_run(log) for log in logs],
    }
