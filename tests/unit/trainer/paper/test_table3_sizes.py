from __future__ import annotations

import pytest

from trainer.paper.table3 import ROWS
from trainer.paper.table3_sizes import (
    ARCHITECTURES,
    BIG,
    FITTING_VOCABULARY,
    OURS,
    PAPER_VOCABULARY,
    allowed_by_all,
    counted,
    learned_positions_within,
    listed,
    millions,
    reckoned,
)


@pytest.mark.parametrize("row", ROWS)
def test_the_parameters_reckoned_are_those_counted_in_the_model(row: str) -> None:
    assert reckoned(ROWS[row], PAPER_VOCABULARY) == counted(ROWS[row], PAPER_VOCABULARY)


def test_a_vocabulary_of_41_thousand_gives_the_papers_number_for_every_row_but_big() -> None:
    found = {row.name: millions(reckoned(row, FITTING_VOCABULARY)) for row in listed()}
    paper = {row.name: row.parameters for row in listed()}
    assert found.pop(BIG) == 218
    assert paper.pop(BIG) == 213
    assert found == paper
    assert len(found) == 10


def test_the_range_of_vocabularies_of_all_rows_but_big_is_exact() -> None:
    allowed = allowed_by_all(OURS)
    assert (allowed[0], allowed[-1]) == (40_932, 41_160)
    others = [row for row in listed() if row.name != BIG]

    def fits(vocabulary: int) -> bool:
        return all(millions(reckoned(row, vocabulary)) == row.parameters for row in others)

    assert fits(allowed[0])
    assert fits(allowed[-1])
    assert not fits(allowed[0] - 1)
    assert not fits(allowed[-1] + 1)


def test_big_has_the_papers_number_with_a_vocabulary_of_its_own() -> None:
    allowed = OURS.allows(ROWS[BIG])
    assert (allowed[0], allowed[-1]) == (35_296, 36_272)
    for vocabulary, number in (
        (allowed[0], 213), (allowed[-1], 213), (allowed[0] - 1, 212), (allowed[-1] + 1, 214),
    ):  # fmt: skip
        assert millions(counted(ROWS[BIG], vocabulary)) == number


def test_what_the_papers_own_37_thousand_pieces_give() -> None:
    assert {row.name: millions(reckoned(row, PAPER_VOCABULARY)) for row in listed()} == {
        "base": 63, "B-d_k-16": 56, "B-d_k-32": 58, "C-2-layers": 34, "C-4-layers": 48,
        "C-8-layers": 78, "C-d_model-256": 27, "C-d_model-1024": 164, "C-d_ff-1024": 50,
        "C-d_ff-4096": 88, "big": 214,
    }  # fmt: skip


def test_no_reading_of_the_paper_gives_big_and_the_other_rows_one_vocabulary() -> None:
    assert len(ARCHITECTURES) == 18
    for each in ARCHITECTURES:
        big, others = each.allows(ROWS[BIG]), allowed_by_all(each)
        assert len(others) > 0
        assert big[-1] < others[0]


def test_big_and_the_row_of_its_width_differ_by_what_the_table_does_not_have() -> None:
    big, wide = ROWS[BIG], ROWS["C-d_model-1024"]
    for vocabulary in (PAPER_VOCABULARY, FITTING_VOCABULARY):
        # Six layers of either side, two matrices of 1024 by 2048 more, and 2048 biases.
        difference = counted(big, vocabulary) - counted(wide, vocabulary)
        assert difference == 12 * (2 * 1024 * 2048 + 2048) == 50_356_224
    assert big.parameters is not None
    assert wide.parameters is not None
    assert big.parameters - wide.parameters == 45  # 44 to 46 before rounding


def test_the_formula_with_everything_in_it_is_the_models() -> None:
    for row in ROWS.values():
        if row.name == "E-learned":
            continue
        assert OURS.parameters(row.model(), 12_345) == reckoned(row, 12_345)


def test_learned_positions_round_to_base_up_to_a_length() -> None:
    most = learned_positions_within(FITTING_VOCABULARY)
    base = reckoned(ROWS["base"], FITTING_VOCABULARY)
    assert millions(base + 2 * most * 512) == 65
    assert millions(base + 2 * (most + 1) * 512) == 66
    assert most == 360


def test_halves_are_rounded_up() -> None:
    assert [millions(number) for number in (1_499_999, 1_500_000, 2_500_000)] == [1, 2, 3]
