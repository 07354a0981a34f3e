"""OpenNMT-py: its command ``train`` in this process, on one thread, its loader too."""

from __future__ import annotations

import sys
from typing import Any

import onmt.trainer
import torch
import yaml
from onmt.bin.train import main as train
from peer import MAX_LENGTH, Job, Meter


def options(job: Job) -> dict[str, Any]:
    """The shape, the batches and the loss of the job, as OpenNMT-py's configuration."""
    vocabulary = job.folder / "words.vocab"
    with open(job.words) as words, vocabulary.open("w") as lines:
        lines.writelines(f"{word.strip()}\t1\n" for word in words)
    return {
        "data": {"corpus": {"path_src": job.source, "path_tgt": job.target}},
        "src_vocab": str(vocabulary),
        "share_vocab": True,
        "src_vocab_size": job.num_words,
        "tgt_vocab_size": job.num_words,
        "save_model": str(job.folder / "model"),
        "encoder_type": "transformer",
        "decoder_type": "transformer",
        "layers": job.layers,
        "hidden_size": job.d_model,
        "word_vec_size": job.d_model,
        "heads": job.num_heads,
        "transformer_ff": job.d_ff,
        "dropout": [job.dropout],
        "attention_dropout": [0.0],
        "position_encoding": True,
        "share_embeddings": True,
        "share_decoder_embeddings": True,
        "label_smoothing": job.label_smoothing,
        "batch_type": "tokens",
        "batch_size": job.tokens,
        "accum_count": [job.batches],
        "normalization": "tokens",
        "src_seq_length": MAX_LENGTH,
        "tgt_seq_length": MAX_LENGTH,
        "bucket_size": 29_000,  # once through a small corpus, sorted by length
        "num_workers": 0,  # or its work would be another process's, and not counted
        "optim": "adam",
        "adam_beta2": 0.98,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "train_steps": 1_000_000_000,
        "save_checkpoint_steps": 1_000_000_000,
        "valid_steps": 1_000_000_000,
        "report_every": 100,
        "world_size": 1,
        "gpu_ranks": [],
        "seed": 1,
    }


def watch(trainer: type, meter: Meter) -> None:
    """Tell the meter of every step; source sentences have no end sign here, so one is counted."""
    train_step, begun = trainer._gradient_accumulation, False

    def stepped(self: Any, batches: list[dict[str, Any]], *rest: Any) -> None:
        nonlocal begun
        if not begun:
            begun = True
            meter.start()
        train_step(self, batches, *rest)
        padding = self.train_loss.padding_idx
        source = sum(int(batch["srclen"].sum()) + len(batch["srclen"]) for batch in batches)
        target = sum(int(batch["tgt"][:, 1:, 0].ne(padding).sum()) for batch in batches)
        meter.stepped(source + target)

    trainer._gradient_accumulation = stepped


def main() -> None:
    """Train until there are no more turns."""
    meter, job = Meter(), Job.given()
    torch.set_num_threads(1)
    file = job.folder / "options.yaml"
    file.write_text(yaml.safe_dump(options(job)))
    watch(onmt.trainer.Trainer, meter)
    sys.argv[1:] = ["-config", str(file)]
    train()


if __name__ == "__main__":
    main()
