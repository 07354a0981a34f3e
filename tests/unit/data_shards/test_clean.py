from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.clean import DuplicateFinder, clean, normalise, pair_digest
from data_shards.config import DataConfig


def run(
    *pairs: tuple[bytes, bytes], **values: object
) -> tuple[list[tuple[str, str]], Counter[str]]:
    config = DataConfig.model_validate(values)
    counts: Counter[str] = Counter()
    return list(clean(pairs, config, counts)), counts


def test_a_good_pair_is_kept_and_normalised() -> None:
    kept, counts = run((b"  A\tdog \xc2\xa0 runs. ", "Ein Hund la\u0308uft.".encode()))
    assert kept == [("A dog runs.", "Ein Hund läuft.")]
    assert counts == {"read": 1}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (b"caf\xe9", b"Kaffee", "not_unicode"),
        (b"Kaffee", b"\xff\xfe", "not_unicode"),
        (b"a bell \x07", b"eine Glocke", "control_characters"),
        (b"one\rtwo", b"eins zwei", "control_characters"),
        (b"one two", "eins\u2028zwei".encode(), "control_characters"),
        (b"one two", "eins\u0085zwei".encode(), "control_characters"),
        (b"", b"nichts", "empty"),
        (b"nothing", b" \t ", "empty"),
        (b"", b"", "empty"),
        (b"a", b"ein sehr langer Satz", "length_ratio"),
        (b"w" * 300, b"w" * 257, "too_long"),
    ],
)
def test_each_filter_drops_and_counts(source: bytes, target: bytes, reason: str) -> None:
    good = (b"A good pair.", b"Ein gutes Paar.")
    kept, counts = run((source, target), good, max_length=16)
    assert kept == [("A good pair.", "Ein gutes Paar.")]
    assert counts == {"read": 2, reason: 1}


def test_the_bounds_themselves_are_kept() -> None:
    kept, _ = run((b"ab", b"a" * 6), (b"x" * 256, b"y" * 256), max_ratio=3.0, max_length=16)
    assert len(kept) == 2


def test_case_and_compatibility_forms_are_left_alone() -> None:
    assert normalise("Straße … ½ ﬁn") == "Straße … ½ ﬁn"


@given(st.text())
def test_normalising_again_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)


@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=30))
def test_every_pair_is_counted_exactly_once(pairs: list[tuple[bytes, bytes]]) -> None:
    kept, counts = run(*pairs, max_length=4, max_ratio=2.0)
    dropped = sum(count for reason, count in counts.items() if reason != "read")
    assert counts["read"] == len(pairs) == len(kept) + dropped
    assert all("\t" not in side and "\n" not in side for pair in kept for side in pair)


def test_the_digest_tells_where_one_side_ends() -> None:
    assert pair_digest("a b", "c") != pair_digest("a", "b c")
    assert pair_digest("ab", "c") != pair_digest("a", "bc")


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 60), max_size=200))
def test_duplicates_are_those_a_set_finds(
    rows: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    seen: set[int] = set()
    expected = []
    for row in rows:
        expected.append(row in seen)
        seen.add(row)

    finder = DuplicateFinder(tmp_path_factory.mktemp("duplicates"))
    for row in rows:
        finder.add(pair_digest(str(row), "x"))
    assert finder.finish().tolist() == expected


def test_digests_that_share_their_first_half_are_not_duplicates(tmp_path: Path) -> None:
    finder = DuplicateFinder(tmp_path)
    for low in (b"\0" * 8, b"\0" * 7 + b"\1", b"\0" * 8):
        finder.add(b"\5" * 8 + low)
    assert finder.finish().tolist() == [False, False, True]


def test_finding_duplicates_leaves_one_byte_a_row_on_disk(tmp_path: Path) -> None:
    finder = DuplicateFinder(tmp_path)
    for row in range(1000):
        finder.add(pair_digest(str(row % 700), ""))
    assert finder.finish().sum() == 300
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {"duplicates": 1000}
