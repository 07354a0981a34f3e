from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_shards.config import DataConfig
from data_shards.corpora import Corpus
from data_shards.errors import DataError
from data_shards.manifest import SplitName
from data_shards.spool import Spool, read_and_spool

Pairs = list[tuple[str, str]]
HELDOUT: dict[SplitName, Pairs] = {
    "valid": [("valid one", "valid eins")],
    "test": [("test one", "test eins"), ("test  two", "test zwei")],
}


def numbered(count: int) -> Pairs:
    return [(f"sentence {number}", f"Satz {number}") for number in range(count)]


def spool_of(
    folder: Path, pairs: Pairs, heldout: dict[SplitName, Pairs], **values: object
) -> tuple[Spool, Counter[str]]:
    def train() -> Iterator[tuple[bytes, bytes]]:
        return ((source.encode(), target.encode()) for source, target in pairs)

    def reader(split: Pairs) -> Callable[[], Iterator[tuple[str, str]]]:
        return lambda: iter(split)

    corpus = Corpus(
        name="made",
        source_language="en",
        target_language="de",
        licence="none",
        train=train,
        heldout={name: reader(split) for name, split in heldout.items()},
    )
    counts: Counter[str] = Counter()
    folder.mkdir(exist_ok=True)
    return read_and_spool(corpus, DataConfig.model_validate(values), folder, counts), counts


def test_duplicates_are_dropped_but_for_the_first(tmp_path: Path) -> None:
    pairs = [("a b", "x"), ("c d", "y"), ("a  b", "x "), ("a b", "z"), ("c d", "y")]
    spool, counts = spool_of(tmp_path, pairs, HELDOUT)
    assert list(spool.pairs()) == [("a b", "x"), ("c d", "y"), ("a b", "z")]
    assert counts == {"read": 5, "duplicate": 2}
    assert spool.num_pairs == 3


def test_duplicates_may_be_kept(tmp_path: Path) -> None:
    pairs = numbered(3) * 2
    spool, counts = spool_of(tmp_path, pairs, HELDOUT, deduplicate=False)
    assert list(spool.pairs()) == pairs
    assert counts == {"read": 6}


def test_pairs_of_the_given_test_sets_are_not_trained_on(tmp_path: Path) -> None:
    train = [*numbered(3), ("test two", "test zwei"), ("valid one", "other")]
    spool, counts = spool_of(tmp_path, train, HELDOUT)
    assert list(spool.pairs()) == [*numbered(3), ("valid one", "other")]
    assert counts["held_out"] == 1
    assert spool.heldout == HELDOUT  # as given, not normalised


@pytest.mark.parametrize("deduplicate", [True, False])
def test_held_out_pairs_are_in_one_split_only(tmp_path: Path, deduplicate: bool) -> None:
    pairs = numbered(500) + numbered(100)
    spool, counts = spool_of(tmp_path, pairs, {}, heldout_pairs=20, deduplicate=deduplicate)
    valid, test = set(spool.heldout["valid"]), set(spool.heldout["test"])
    train = list(spool.pairs())
    assert len(valid) == len(spool.heldout["valid"]) == 20
    assert len(test) == len(spool.heldout["test"]) == 20
    assert not valid & test
    assert set(train) == set(pairs) - valid - test
    assert len(train) + counts["held_out"] + counts["duplicate"] == len(pairs)
    assert counts["duplicate"] == (100 if deduplicate else 0)


def test_what_is_held_out_hangs_on_the_pairs_alone(tmp_path: Path) -> None:
    pairs = numbered(500)
    one, _ = spool_of(tmp_path / "one", pairs, {}, heldout_pairs=10)
    two, _ = spool_of(tmp_path / "two", pairs[::-1] + pairs[:50], {}, heldout_pairs=10)
    assert one.heldout == two.heldout
    # Asking for more adds to what was held out before: no earlier test pair is trained on.
    three, _ = spool_of(tmp_path / "three", pairs, {}, heldout_pairs=20)
    held = {pair for split in one.heldout.values() for pair in split}
    assert held <= {pair for split in three.heldout.values() for pair in split}


def test_never_more_than_a_tenth_is_held_out(tmp_path: Path) -> None:
    spool, _ = spool_of(tmp_path, numbered(205), {}, heldout_pairs=1000)
    assert [len(split) for split in spool.heldout.values()] == [10, 10]
    assert spool.num_pairs == 185


def test_only_the_missing_set_is_held_out(tmp_path: Path) -> None:
    given: dict[SplitName, Pairs] = {"test": HELDOUT["test"]}
    spool, _ = spool_of(tmp_path, numbered(200), given, heldout_pairs=1000)
    assert spool.heldout["test"] == HELDOUT["test"]
    assert len(spool.heldout["valid"]) == 20


def test_too_small_a_corpus_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"19 different clean pairs of 38 read.*valid_source") as c:
        spool_of(tmp_path, numbered(19) * 2, {})
    assert "data.test_source and data.test_target" in str(c.value)


@pytest.mark.parametrize("wanted", [1, 7, 50, 99, 100, 1000])
def test_the_sample_is_of_the_size_asked_for(tmp_path: Path, wanted: int) -> None:
    spool, _ = spool_of(tmp_path, numbered(100), HELDOUT)
    sample = list(spool.sample(wanted))
    pairs = list(zip(sample[::2], sample[1::2], strict=True))
    assert len(pairs) == min(wanted, 100)
    numbers = [numbered(100).index(pair) for pair in pairs]
    assert numbers == sorted(set(numbers))
    gaps = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert not gaps or max(gaps) - min(gaps) <= 1  # from all over the corpus
