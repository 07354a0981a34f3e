"""Validation loss: the held-out pairs in fixed batches, shared out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_shards.config import BOS_ID, EOS_ID, PAD_ID
from data_shards.manifest import Manifest
from data_shards.vocabulary import Vocabulary

# Validation needs no gradients, so its batches can be larger than a lane's.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class ValidationSet:
    """The held-out pairs as ready tensors: ``(source_BS, target_in_BT, target_out_BT)`` each."""

    batches: tuple[tuple[Tensor, Tensor, Tensor], ...]
    target_tokens: int

    @classmethod
    def of(cls, manifest: Manifest, *, max_length: int) -> ValidationSet:
        """Encode the corpus' validation text; sentences beyond ``max_length`` are cut to it."""
        vocabulary = Vocabulary.load(manifest.vocabulary_path)
        sources, targets = manifest.split_text("valid")
        pairs = [
            ([*source[: max_length - 1], EOS_ID], [*target[: max_length - 1], EOS_ID])
            for source, target in zip(
                vocabulary.encode(sources), vocabulary.encode(targets), strict=True
            )
        ]
        pairs.sort(key=lambda pair: (len(pair[1]), len(pair[0])))
        batches = tuple(_tensors(chunk) for chunk in _chunks(pairs))
        return cls(batches, sum(len(target) for _, target in pairs))


def empty_batch() -> tuple[Tensor, Tensor, Tensor]:
    """The smallest batch there is, for a rank that must take part with nothing to do."""
    eos, bos = torch.tensor([[EOS_ID]]), torch.tensor([[BOS_ID]])
    return eos, bos, eos


def _chunks(
    pairs: list[tuple[list[int], list[int]]],
) -> list[list[tuple[list[int], list[int]]]]:
    chunks: list[list[tuple[list[int], list[int]]]] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, len(pair[0]), len(pair[1]))
        if not chunks or (len(chunks[-1]) + 1) * longest > TOKENS_PER_BATCH:
            chunks.append([])
            longest = max(len(pair[0]), len(pair[1]))
        chunks[-1].append(pair)
    return chunks


def _tensors(pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    source = _pad([source for source, _ in pairs])
    target_in = _pad([[BOS_ID, *target[:-1]] for _, target in pairs])
    target_out = _pad([target for _, target in pairs])
    return source, target_in, target_out


def _pad(sentences: list[list[int]]) -> Tensor:
    ids = np.full((len(sentences), max(map(len, sentences))), PAD_ID, dtype=np.int64)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
    return torch.from_numpy(ids)
