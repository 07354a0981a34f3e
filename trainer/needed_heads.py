"""The heads that a group of words needs most: chosen on some sentences, measured on others.

The head that costs most of many costs much partly by luck. So it is chosen on the validation split,
and what it costs is told of the test split, with an interval.

Shapes: S sentences, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.silenced_heads import HeadName, Needed

RESAMPLES = 2000
_SEED = 12345  # sacreBLEU's


@dataclass(frozen=True)
class Cost:
    """What a group's words on the test split cost without a head.

    Attributes:
        right: share of the words that are right without it.
        lost: words that are right with it only.
        won: words that are right without it only.
        interval: 95 % of the share that is lost, less what is won; None where no word changes,
            since then there is nothing to resample.
    """

    head: HeadName
    right: float
    lost: int
    won: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Costs:
    """A group of words, and the heads that it needs most.

    Attributes:
        cases: words of the test split.
        right: share of them that are right with all heads.
        heads: those whose silencing loses most words of the validation split, in this order; fewer
            than were asked for, or none, where others lose nothing there.
    """

    group: str
    cases: int
    right: float
    heads: tuple[Cost, ...]


def costs(chosen: Needed, measured: Needed, *, most: int = 2) -> list[Costs]:
    """For each group of words of ``measured`` the costs of the heads chosen by ``chosen``."""
    return [
        Costs(
            group,
            whole.cases,
            whole.right,
            tuple(_cost(measured, group, head) for head in _most_needed(chosen, group)[:most]),
        )
        for group, whole in measured.whole.items()
    ]


def _most_needed(chosen: Needed, group: str) -> list[HeadName]:
    """Heads without which words of the group are lost; of equals that with more nats first."""
    if group not in chosen.whole:
        return []
    whole = chosen.whole[group]
    without = {head: right[group] for head, right in chosen.silenced.items()}
    needed = [head for head, right in without.items() if right.right < whole.right]
    return sorted(needed, key=lambda head: (without[head].right, -without[head].nats))


def _cost(measured: Needed, group: str, head: HeadName) -> Cost:
    whole, without = measured.whole[group], measured.silenced[head][group]
    pairs = zip(whole.each, without.each, strict=True)
    changes = [int(before) - int(after) for before, after in pairs]
    return Cost(
        head,
        without.right,
        changes.count(1),
        changes.count(-1),
        interval(changes, measured.sentences[group]),
    )


def interval(changes: Sequence[int], sentences: Sequence[int]) -> tuple[float, float] | None:
    """95 % of the mean change, by resampling sentences: the words of one are not independent.

    Args:
        changes: 1 where a word is lost, -1 where it is won, 0 elsewhere.
        sentences: the number of each word's sentence.

    Returns:
        The percentiles 2.5 and 97.5 of the resampled means; None where nothing changes.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; over
    sentences as Koehn 2004.
    """
    if not any(changes):
        return None
    number_of = {sentence: number for number, sentence in enumerate(dict.fromkeys(sentences))}
    num_sentences = len(number_of)
    numbers = torch.tensor([number_of[sentence] for sentence in sentences])
    change_S, cases_S = (
        torch.zeros(num_sentences).index_add_(0, numbers, values)
        for values in (torch.tensor(changes).float(), torch.ones(len(changes)))
    )
    generator = torch.Generator().manual_seed(_SEED)
    picked_RS = torch.randint(num_sentences, (RESAMPLES, num_sentences), generator=generator)
    means_R = change_S[picked_RS].sum(1) / cases_S[picked_RS].sum(1)
    low, high = means_R.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
