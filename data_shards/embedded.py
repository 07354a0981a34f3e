"""A small English-German corpus that needs no network: it is *generated*, by a grammar of our own.

Nobody said or wrote these sentences. They are grammatical, simple and sometimes odd, and they
measure whether a model has learnt a translation task that really needs attention: agreement in
gender, case and number; verb-final clauses; separable verbs; infinitives and participles at the
end; numbers whose order turns round; ``it`` that takes its gender from a noun earlier in the
sentence. A score on them says that the system works, not how well it translates newspapers.

An English sentence has exactly one right German translation here, so BLEU can reach 100.

**Held-out combinations.** Every sentence is made of *combinations* of content words: an adjective
with its noun, a subject with its verb, a verb with its object, a preposition with its noun, an
owner with what is owned. A hash of the combination, which depends on nothing else (no seed, no
pattern, no inflection), gives it to one split: about 5 in 100 to ``test``, 3 in 100 to ``valid``,
the rest to all. Then

- a ``train`` sentence has no combination of ``valid`` or of ``test``;
- a ``valid`` sentence has at least one of ``valid`` and none of ``test``;
- a ``test`` sentence has at least one of ``test`` and none of ``valid``.

So the splits share no sentence, whatever the seeds, and every ``valid`` and ``test`` sentence asks
for words to be put together that were never seen together. Each word form in it, however, is
common: it occurs at least 8 times in 20,000 sentences of ``train``.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

from data_shards.embedded_clauses import Combination, Draw
from data_shards.embedded_patterns import PATTERNS, WEIGHTED
from data_shards.errors import DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

MAX_WORDS = 22  # longer sentences are drawn again, on either side
# Draws in a row that bring no new sentence before the grammar counts as exhausted.
MAX_FRUITLESS_DRAWS = 20_000

# A word form is common that occurs so often in so many sentences of ``train``.
_COMMON_COUNT, _COMMON_SAMPLE = 8, 20_000

# Of a hundred hash values, how many give a combination to this split.
_HELD_OUT_PERCENT: dict[Split, int] = {"test": 5, "valid": 3}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One generated pair, the pattern it follows and the combinations in it."""

    english: str
    german: str
    pattern: str
    combinations: frozenset[Combination]


@cache
def split_of(combination: Combination) -> Split:
    """The split that alone may use ``combination``; ``train`` stands for "all may"."""
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    value = int.from_bytes(digest[:4], "big") % 100
    for split, percent in _HELD_OUT_PERCENT.items():
        if value < percent:
            return split
        value -= percent
    return "train"


def belongs(combinations: Iterable[Combination], split: Split) -> bool:
    """Whether a sentence with these combinations may stand in ``split``."""
    owners = {split_of(combination) for combination in combinations} - {"train"}
    return owners == ({split} - {"train"})


def _endless(stream: str, split: Split, patterns: Sequence[str]) -> Iterator[Sentence | None]:
    """Draws of ``split``, repetitions among them; None for one that cannot be used."""
    rng = random.Random(f"babelray/{stream}")  # noqa: S311 - no secret depends on it
    while True:
        draw = Draw(rng)
        name = draw.pick(patterns)
        english, german = PATTERNS[name](draw)
        short = max(english.count(" "), german.count(" ")) < MAX_WORDS
        if short and belongs(draw.combinations, split):
            yield Sentence(english, german, name, frozenset(draw.combinations))
        else:
            yield None


def word_forms(text: str) -> list[str]:
    """The words of a sentence as they are spelt, without the marks around them."""
    return [word.strip(".,?!") for word in text.split()]


@cache
def common_words() -> frozenset[str]:
    """The forms, of both languages, that a training corpus of usual size shows often."""
    drawn = filter(None, _endless("common", "train", WEIGHTED))
    counts: Counter[str] = Counter()
    for one in islice(drawn, _COMMON_SAMPLE):
        counts.update(word_forms(one.english))
        counts.update(word_forms(one.german))
    return frozenset(word for word, count in counts.items() if count >= _COMMON_COUNT)


def sentences(
    split: Split, num_pairs: int, *, seed: int = 1, patterns: Sequence[str] = ()
) -> Iterator[Sentence]:
    """``generate``, with each pair's pattern and combinations; of the named ``patterns`` only."""
    if split not in SPLITS:
        raise DataError(f"the embedded corpus has no split {split!r}: choose one of {SPLITS}")
    names = [name for name in WEIGHTED if not patterns or name in patterns]
    drawn = _endless(f"{split}/{seed}", split, names)
    seen: set[str] = set()
    num_fruitless = 0
    while len(seen) < num_pairs:
        one = next(drawn)
        if one is None or one.english in seen or not (split == "train" or _is_common(one)):
            num_fruitless += 1
            if num_fruitless == MAX_FRUITLESS_DRAWS:
                raise DataError(
                    f"the embedded corpus has hardly more than {len(seen)} different {split} "
                    f"sentences, but {num_pairs} were asked for: ask for fewer "
                    "(data.embedded_pairs, data.heldout_pairs)"
                )
            continue
        num_fruitless = 0
        seen.add(one.english)
        yield one


def _is_common(one: Sentence) -> bool:
    return common_words().issuperset((*word_forms(one.english), *word_forms(one.german)))


def generate(split: Split, num_pairs: int, *, seed: int = 1) -> Iterator[tuple[str, str]]:
    """``num_pairs`` different ``(English, German)`` pairs of ``split``.

    The same arguments give the same pairs in every process and Python version, and a longer
    corpus begins with the shorter one. Different seeds give different samples of the same splits.

    Raises:
        DataError: ``split`` is unknown, or the grammar has no ``num_pairs`` different sentences.
    """
    return ((one.english, one.german) for one in sentences(split, num_pairs, seed=seed))
