"""Of communication.py: what gradients rounded to bf16 on their way cost in quality.

Short trainings of the generated corpus' model in float32 by two ranks, alike but for the seed and
``trainer.gradient_dtype``; the final weights translate the corpus' test sentences.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, Spread

from trainer.config import EvaluationConfig, RunConfig, parse_config

STEPS = 250  # some way up the curve, where differences would show


def configs(root: Path, seeds: int) -> list[RunConfig]:
    """Pairs of trainings, float32 gradients first."""
    values = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    values["data"] |= {"root": str(root), "lanes": 2, "tokens_per_step": 2048}
    found = []
    for seed in range(1, seeds + 1):
        for dtype in (None, "bf16"):
            trainer = {
                **values["trainer"],
                **{"precision": "fp32", "gradient_dtype": dtype, "seed": seed, "threads": 1},
                **{"max_steps": STEPS, "checkpoint_every": STEPS, "validate_every": STEPS},
                "warmup_steps": 100,
            }
            found.append(parse_config({**values, "trainer": trainer}, where="bleu"))
    return found


def bleu(run_dir: Path) -> float:
    """Of the last checkpoint, greedily decoded."""
    from trainer.run import load_model
    from trainer.scores import bleu_metric
    from trainer.test_sets import open_test_sets
    from trainer.translate import Translator

    model = load_model(run_dir, "last")
    [test_set] = open_test_sets(["test"], model.manifest)
    translator = Translator([model], EvaluationConfig(search="greedy"))
    hypotheses = [best[0].text for best in translator.translate(test_set.sources)]
    metric = bleu_metric(model.manifest.data.target_language)
    return float(metric.corpus_score(hypotheses, [test_set.references]).score)


def compare(folders: list[Path], events: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints and returns BLEU and loss of each pair, and the differences."""
    rows = []
    for (plain, rounded), (before, after) in zip(
        zip(folders[::2], folders[1::2], strict=True),
        zip(events[::2], events[1::2], strict=True),
        strict=True,
    ):
        rows.append(
            {
                "bleu": {"fp32": bleu(plain), "bf16": bleu(rounded)},
                "valid_nll": {"fp32": _last_nll(before), "bf16": _last_nll(after)},
            }
        )
        told = (f"{kind} {v['fp32']:.3f} {v['bf16']:.3f}" for kind, v in rows[-1].items())
        print(f"  seed {len(rows)}, gradients in float32 and bf16: " + ", ".join(told))
    differences = {}
    for kind in ("bleu", "valid_nll"):
        own = Spread.of([row[kind]["bf16"] - row[kind]["fp32"] for row in rows])
        seeds = Spread.of([row[kind]["fp32"] for row in rows])
        differences[kind] = {"bf16_less_fp32": asdict(own), "seeds": asdict(seeds)}
        print(
            f"  {kind}: bf16 less float32 {own.median:+.3f} ({own.lowest:+.3f} to "
            f"{own.highest:+.3f}); float32 over the seeds {seeds.lowest:.3f} to {seeds.highest:.3f}"
        )
    return {"steps": STEPS, "seeds": rows, "differences": differences}


def _last_nll(events: list[dict[str, Any]]) -> float:
    return float([event for event in events if event["event"] == "validated"][-1]["valid_nll"])
