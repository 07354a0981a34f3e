from __future__ import annotations

import pytest

from data_shards.errors import UserError
from model.presets import PRESETS
from trainer.config import RunConfig, parse_config
from trainer.paper.table3 import (
    BASE,
    DEFAULT_ROWS,
    ROWS,
    chosen_rows,
    order,
    scaled,
    with_steps,
)


def base(**model: object) -> RunConfig:
    small = {
        "d_model": 128, "d_ff": 512, "num_heads": 8, "encoder_layers": 3, "decoder_layers": 3,
    }  # fmt: skip
    trainer = {"max_steps": 600, "peak_learning_rate": 3e-3, "max_minutes": 5}
    return parse_config({"model": small | model, "trainer": trainer}, where="test")


def test_every_preset_of_the_table_is_a_row_and_the_other_rows_change_no_model() -> None:
    presets = set(PRESETS["transformer"]) - {"tiny"}
    assert {row.preset for row in ROWS.values()} == presets
    assert {name for name in ROWS if name not in presets} == {"D-smoothing-0", "D-smoothing-0.2"}
    for row in ROWS.values():
        assert (row.label_smoothing != 0.1) == row.name.startswith("D-smoothing")


def test_the_table_is_the_papers() -> None:
    # Summed by hand over the published table: a figure mistyped moves a sum.
    assert len(ROWS) == 20
    assert round(sum(row.perplexity for row in ROWS.values()), 2) == 101.87
    assert round(sum(row.bleu for row in ROWS.values()), 1) == 507.7
    listed = [row.parameters for row in ROWS.values() if row.parameters is not None]
    assert sorted(listed) == sorted([65, 58, 60, 36, 50, 80, 28, 168, 53, 90, 213])
    assert {row.name: row.steps for row in ROWS.values() if row.steps != 100_000} == {
        "big": 300_000
    }


@pytest.mark.parametrize(
    ("row", "field", "full", "small"),
    [
        ("A-1-head", "num_heads", 1, 1),
        ("A-32-heads", "num_heads", 32, 32),
        ("A-32-heads", "key_width", 16, 4),
        ("B-d_k-16", "key_width", 16, 4),
        ("B-d_k-16", "value_width", 64, 16),
        ("C-2-layers", "encoder_layers", 2, 1),
        ("C-8-layers", "decoder_layers", 8, 4),
        ("C-d_model-1024", "d_model", 1024, 256),
        ("C-d_model-1024", "value_width", 128, 32),
        ("C-d_ff-1024", "d_ff", 1024, 256),
        ("D-dropout-0.2", "dropout", 0.2, 0.2),
        ("E-learned", "positions", "learned", "learned"),
        ("big", "d_ff", 4096, 1024),
        ("big", "dropout", 0.3, 0.3),
    ],
)
def test_a_scaled_row_changes_its_base_in_the_papers_ratio(
    row: str, field: str, full: object, small: object
) -> None:
    assert getattr(ROWS[row].model(), field) == full
    assert getattr(scaled(ROWS[row], base()).model, field) == small


def test_a_scaled_row_changes_nothing_else() -> None:
    own = base(norm="pre", max_positions=777)
    assert scaled(ROWS[BASE], own) == own
    changed = scaled(ROWS["D-smoothing-0"], own)
    assert changed.trainer == own.trainer.model_copy(update={"label_smoothing": 0.0})
    assert changed.model == own.model
    learned = scaled(ROWS["E-learned"], own)
    assert learned.model == own.model.model_copy(update={"positions": "learned"})
    assert learned.trainer == own.trainer


def test_the_peak_rate_falls_with_the_width_as_the_papers_does() -> None:
    wide, narrow = (scaled(ROWS[f"C-d_model-{width}"], base()) for width in (1024, 256))
    assert wide.trainer.peak_learning_rate == pytest.approx(3e-3 / 2**0.5)
    assert narrow.trainer.peak_learning_rate == pytest.approx(3e-3 * 2**0.5)


def test_a_base_that_is_too_small_for_a_row_is_told() -> None:
    with pytest.raises(UserError, match=r"row A-1-head has num_heads 1 .* that is 0\.5.*--rows"):
        scaled(ROWS["A-1-head"], base(num_heads=4))


def test_rows_end_by_steps_and_never_by_the_clock() -> None:
    config = with_steps(base(), seed=7, steps=50)
    assert (config.trainer.seed, config.trainer.max_steps) == (7, 50)
    assert config.trainer.max_minutes is None
    endless = parse_config({"trainer": {"max_steps": None, "max_minutes": 5}}, where="test")
    with pytest.raises(UserError, match="--steps"):
        with_steps(endless, seed=1, steps=None)


def test_rows_are_chosen_by_name_with_their_seeds() -> None:
    def chosen(*asked: tuple[str, int | None], seeds: int | None = None) -> dict[str, int]:
        return {row.name: number for row, number in chosen_rows(asked, seeds)}

    assert chosen() == DEFAULT_ROWS
    assert chosen(seeds=2) == dict.fromkeys(DEFAULT_ROWS, 2)
    assert chosen(("base", 3), ("big", None)) == {"base": 3, "big": 1}
    assert chosen(("base", 3), ("big", None), seeds=2) == {"base": 3, "big": 2}
    assert chosen(("all", None), ("base", 3)) == dict.fromkeys(ROWS, 1) | {"base": 3}
    with pytest.raises(UserError, match=r"--rows A-2-heads: .* did you mean A-32-heads\?"):
        chosen(("A-2-heads", None))


def test_the_default_rows_are_eight_at_least_and_four_have_three_seeds() -> None:
    assert len(DEFAULT_ROWS) >= 8
    assert sum(seeds >= 3 for seeds in DEFAULT_ROWS.values()) >= 4
    assert DEFAULT_ROWS[BASE] >= 3


def test_all_first_seeds_come_before_the_second_ones() -> None:
    rows = [(ROWS["base"], 3), (ROWS["A-1-head"], 1), (ROWS["big"], 2)]
    assert [(row.name, seed) for row, seed in order(rows)] == [
        ("base", 1), ("A-1-head", 1), ("big", 1), ("base", 2), ("big", 2), ("base", 3),
    ]  # fmt: skip
