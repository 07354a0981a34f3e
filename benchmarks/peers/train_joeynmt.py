"""JoeyNMT: its training function. It draws pairs at random, so batches have much padding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from joeynmt.training import TrainManager, train
from peer import MAX_LENGTH, Job, Meter


def configuration(job: Job) -> dict[str, Any]:
    """The shape, the batches and the loss of the job, in JoeyNMT's configuration."""
    vocabulary, corpus, out = job.folder / "words", job.folder / "corpus", job.folder / "out"
    vocabulary.write_text(
        "\n".join(["<unk>", "<pad>", "<s>", "</s>", *Path(job.words).read_text().split()])
    )
    out.mkdir()
    for language, file in (("en", job.source), ("de", job.target)):
        os.symlink(file, f"{corpus}.{language}")
    side = {"level": "word", "max_length": MAX_LENGTH, "voc_file": str(vocabulary)}
    stack = {
        "type": "transformer",
        "num_layers": job.layers,
        "num_heads": job.num_heads,
        "embeddings": {"embedding_dim": job.d_model, "scale": True, "dropout": 0.0},
        "hidden_size": job.d_model,
        "ff_size": job.d_ff,
        "dropout": job.dropout,
        "layer_norm": job.norm,
    }
    return {
        "name": "peer",
        "model_dir": str(out),
        "use_cuda": False,
        "random_seed": 1,
        "data": {
            "train": str(corpus),
            "dev": str(corpus),
            "src": {**side, "lang": "en"},
            "trg": {**side, "lang": "de"},
        },
        "testing": {"eval_metrics": ["bleu"]},
        "training": {
            "optimizer": "adam",
            "adam_betas": [0.9, 0.98],
            "learning_rate": 1e-4,
            "scheduling": "noam",
            "learning_rate_factor": 1,
            "learning_rate_warmup": 4000,
            "clip_grad_norm": 1.0,
            "normalization": "tokens",
            "label_smoothing": job.label_smoothing,
            "batch_type": "token",
            "batch_size": job.tokens,
            "batch_multiplier": job.batches,
            "epochs": 1_000_000,
            "validation_freq": 1_000_000_000,
            "logging_freq": 100,
            "early_stopping_metric": "loss",
        },
        "model": {
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": stack,
            "decoder": stack,
        },
    }


def watch(manager: type, meter: Meter, batches: int) -> None:
    """Tell the meter of every step: at the beginning of the batch that follows it."""
    train_step, tokens, seen = manager._train_step, 0, 0

    def stepped(self: Any, batch: Any) -> Any:
        nonlocal tokens, seen
        if seen == 0:
            meter.start()
        elif seen % batches == 0:
            meter.stepped(tokens)
            tokens = 0
        seen += 1
        # Source lengths have the end sign, as targets have.
        tokens += int((batch.src != 1).sum()) + int(batch.ntokens)
        return train_step(self, batch)

    manager._train_step = stepped


def main() -> None:
    """Train until there are no more turns."""
    meter, job = Meter(), Job.given()
    torch.set_num_threads(1)
    watch(TrainManager, meter, job.batches)
    train(rank=0, world_size=None, cfg=configuration(job), skip_test=True)


if __name__ == "__main__":
    main()
