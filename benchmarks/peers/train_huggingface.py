"""Hugging Face Transformers: ``MarianMTModel`` and ``Trainer``.

``Trainer`` has no batches by tokens, so it gets those of the plain loop of ``train.py``: sentences
sorted by length, cut at the budget, shuffled. Positions, embeddings and dropout are the paper's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from peer import Job, Meter
from torch import Tensor
from transformers import (
    MarianConfig,
    MarianMTModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

PAD, BEGIN, END = 0, 1, 2
_ENDLESS = 1_000_000_000


class Batches:
    """A step's batches after one another, epoch after epoch; counts the tokens it gave."""

    def __init__(self, job: Job, model: MarianMTModel) -> None:
        self._model = model
        sides = (job.sentences(job.source), job.sentences(job.target))
        ids = [
            [torch.tensor([int(word[1:]) for word in line] + [END]) for line in lines]
            for lines in sides
        ]
        self._pairs = list(zip(*ids, strict=True))
        self._budget = job.tokens
        self._random = random.Random(1)
        self.tokens = 0

    def _epoch(self) -> list[list[tuple[Tensor, Tensor]]]:
        self._random.shuffle(self._pairs)
        self._pairs.sort(key=lambda pair: (len(pair[1]), len(pair[0])))
        batches: list[list[tuple[Tensor, Tensor]]] = [[]]
        longest = 0
        for pair in self._pairs:
            size = max(map(len, pair))
            longest = max(longest, size)
            if longest * (len(batches[-1]) + 1) > self._budget:
                batches.append([])
                longest = size
            batches[-1].append(pair)
        self._random.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pad = torch.nn.utils.rnn.pad_sequence
        while True:
            for batch in self._epoch():
                sources, targets = zip(*batch, strict=True)
                self.tokens += sum(map(len, sources)) + sum(map(len, targets))
                source = pad(sources, batch_first=True, padding_value=PAD)
                labels = pad(targets, batch_first=True, padding_value=-100)
                shifted = self._model.prepare_decoder_input_ids_from_labels(labels=labels)
                yield {
                    "input_ids": source,
                    "attention_mask": (source != PAD).long(),
                    "decoder_input_ids": shifted,
                    "labels": labels,
                }


class Stepped(TrainerCallback):
    """Tells the meter of every step."""

    def __init__(self, meter: Meter, batches: Batches) -> None:
        self._meter, self._batches, self._seen = meter, batches, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Set-up is over."""
        self._meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Batches are loaded ahead by at most one: over a turn that is nothing."""
        tokens, self._seen = self._batches.tokens - self._seen, self._batches.tokens
        self._meter.stepped(tokens)


class WithBatches(Trainer):
    """A trainer that is given its batches."""

    batches: Batches

    def get_train_dataloader(self) -> Any:
        """The batches as they are."""
        return self.batches


def main() -> None:
    """Train until there are no more turns."""
    meter, job = Meter(), Job.given()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=job.num_words,
        d_model=job.d_model,
        encoder_layers=job.layers,
        decoder_layers=job.layers,
        encoder_attention_heads=job.num_heads,
        decoder_attention_heads=job.num_heads,
        encoder_ffn_dim=job.d_ff,
        decoder_ffn_dim=job.d_ff,
        activation_function="relu",
        dropout=job.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
        decoder_start_token_id=BEGIN,
        forced_eos_token_id=END,
    )
    model = MarianMTModel(config)
    batches = Batches(job, model)
    trainer = WithBatches(
        model=model,
        args=TrainingArguments(
            output_dir=str(job.folder / "out"),
            use_cpu=True,
            bf16=job.precision == "bf16",
            gradient_accumulation_steps=job.batches,
            max_steps=_ENDLESS,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            adam_beta2=0.98,
            adam_epsilon=1e-9,
            label_smoothing_factor=job.label_smoothing,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[Stepped(meter, batches)],
    )
    trainer.batches = batches
    trainer.train()


if __name__ == "__main__":
    main()
