"""Sockeye: its command ``train`` in this process, without validation on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sockeye.train
import sockeye.training
import torch
from peer import MAX_LENGTH, Job, Meter


def options(job: Job) -> dict[str, Any]:
    """The shape, the batches and the loss of the job, in Sockeye's options."""
    sizes = {
        "num-layers": job.layers,
        "transformer-model-size": job.d_model,
        "num-embed": job.d_model,
        "transformer-attention-heads": job.num_heads,
        "transformer-feed-forward-num-hidden": job.d_ff,
        "max-seq-len": MAX_LENGTH,
    }
    # Layer norm (n), dropout (d), residual (r), before and after a sub-layer.
    normed = ("n", "dr") if job.norm == "pre" else ("", "drn")
    few = job.folder / "few"
    few.write_text("\n".join(Path(job.source).read_text().splitlines()[:10]) + "\n")
    return {
        **{name: f"{value}:{value}" for name, value in sizes.items()},
        "source": job.source,
        "target": job.target,
        "validation-source": few,
        "validation-target": few,
        "output": job.folder / "out",
        "shared-vocab": None,
        "weight-tying-type": "src_trg_softmax",
        "transformer-preprocess": f"{normed[0]}:{normed[0]}",
        "transformer-postprocess": f"{normed[1]}:{normed[1]}",
        "transformer-dropout-attention": "0.0:0.0",
        "transformer-dropout-act": "0.0:0.0",
        "transformer-dropout-prepost": f"{job.dropout}:{job.dropout}",
        "label-smoothing": job.label_smoothing,
        "batch-type": "max-word",
        "batch-size": job.tokens,
        "update-interval": job.batches,
        "optimizer": "adam",
        "optimizer-betas": "0.9:0.98",
        "initial-learning-rate": 1e-4,
        "gradient-clipping-type": "norm",
        "gradient-clipping-threshold": 1.0,
        "checkpoint-interval": 1_000_000_000,
        "max-num-checkpoint-not-improved": -1,
        "use-cpu": None,
        "seed": 1,
    }


def watch(trainer: type, meter: Meter) -> None:
    """Tell the meter of every step."""
    step, tokens, begun = trainer._step, 0, False

    def stepped(self: Any, batch: Any) -> bool:
        nonlocal tokens, begun
        if not begun:
            begun = True
            meter.start()
        # Source and target with an end sign each; padding is 0.
        labels = batch.labels["target_label"]
        tokens += int(batch.source_length.sum()) + int((labels != 0).sum())
        updated: bool = step(self, batch)
        if updated:
            meter.stepped(tokens)
            tokens = 0
        return updated

    trainer._step = stepped


def main() -> None:
    """Train until there are no more turns."""
    meter, job = Meter(), Job.given()
    torch.set_num_threads(1)
    watch(sockeye.training.EarlyStoppingTrainer, meter)
    for name, value in options(job).items():
        if value not in ("", ":"):
            sys.argv += [f"--{name}", *([] if value is None else [str(value)])]
    sockeye.train.main()


if __name__ == "__main__":
    main()
