from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.errors import UserError
from trainer.config import parse_config
from trainer.paper import table3_page, table3_summary
from trainer.paper.table3 import ROWS
from trainer.paper.table3_trial import Trial

NUM_SENTENCES = 60


def trial(nats_a_piece: float, matches: float) -> Trial:
    """A training with about so good a model: the same sentences, better or worse translated."""
    generator = np.random.default_rng(5)
    pieces = generator.integers(6, 20, NUM_SENTENCES)
    nll = pieces * nats_a_piece * generator.normal(1, 0.1, NUM_SENTENCES)
    totals = np.stack([np.maximum(pieces - n, 1) for n in range(4)], 1)
    counts = np.round(totals * matches ** np.arange(1, 5))
    rows = np.column_stack([counts, totals, pieces, pieces]).astype(int).tolist()
    return Trial(
        steps=600,
        parameters=123_456,
        target_tokens=500_000,
        seconds=100.0,
        nll=nll.tolist(),
        pieces=pieces.tolist(),
        counts={"valid": rows, "test": rows},
        signature="nrefs:1|...",
        machine={"cpu": "a CPU", "cores": 2, "memory_bytes": 1, "gpu": None},
        versions={"torch": "2", "ray": "2", "deepspeed": "0"},
    )


def base_config() -> Any:
    return parse_config(
        {
            "model": {"d_model": 128, "d_ff": 512, "encoder_layers": 3, "decoder_layers": 3},
            "data": {"root": "/a/place/of/mine", "mirror": "/another"},
        },
        where="test",
    )


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    trials = {
        ("base", 1): trial(2.00, 0.60),
        ("base", 2): trial(2.01, 0.61),
        ("base", 3): trial(1.99, 0.59),
        ("C-2-layers", 1): trial(2.30, 0.40),  # worse, as in the paper
        ("C-2-layers", 2): trial(2.31, 0.41),
        ("C-d_ff-4096", 1): trial(2.40, 0.30),  # worse, but better in the paper
        ("A-4-heads", 1): trial(2.005, 0.60),  # as good; a little worse in the paper
        ("E-learned", 1): trial(2.005, 0.60),  # as good, as in the paper
    }
    return table3_summary.summarise(trials, base_config())


def row(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in summary["rows"] if row["row"] == name)


def test_rows_stand_in_the_papers_order_with_their_seeds(summary: dict[str, Any]) -> None:
    assert [row["row"] for row in summary["rows"]] == [
        "base", "A-4-heads", "C-2-layers", "C-d_ff-4096", "E-learned",
    ]  # fmt: skip
    assert row(summary, "base")["seeds"] == [1, 2, 3]
    assert row(summary, "C-2-layers")["model"] == {"encoder_layers": 1, "decoder_layers": 1}


def test_a_difference_is_that_of_the_means_and_is_paired_by_sentence(
    summary: dict[str, Any],
) -> None:
    base, worse = row(summary, "base"), row(summary, "C-2-layers")
    for metric in table3_summary.METRICS:
        difference = worse[metric]["difference"]
        assert difference["mean"] == pytest.approx(worse[metric]["mean"] - base[metric]["mean"])
        low, high = difference["sentences"]
        assert low < difference["mean"] < high
    # The same sentences are hard for both, so the difference is surer than either score.
    low, high = worse["perplexity"]["difference"]["sentences"]
    own_low, own_high = worse["perplexity"]["sentences"]
    assert high - low < own_high - own_low
    assert base["perplexity"]["difference"] is None


def test_seeds_widen_what_one_training_says(summary: dict[str, Any]) -> None:
    assert summary["seed_noise"]["perplexity"]["freedom"] == 3
    three, one = row(summary, "base")["perplexity"], row(summary, "E-learned")["perplexity"]
    assert one["seeds"] == pytest.approx(three["seeds"] * 3**0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("C-2-layers", "agrees"),
        ("C-d_ff-4096", "disagrees"),
        ("A-4-heads", "undecided"),
        ("E-learned", "agrees"),
    ],
)
def test_verdicts(summary: dict[str, Any], name: str, expected: str) -> None:
    for metric in ("perplexity", "bleu_valid"):
        assert table3_page.verdict(row(summary, name), metric) == expected


def test_the_base_has_no_verdict(summary: dict[str, Any]) -> None:
    assert table3_page.verdict(row(summary, "base"), "perplexity") is None
    lines = table3_page.verdict_lines(summary)
    assert lines[0] == (
        "perplexity, of 4 rows: 2 agree (C-2-layers, E-learned); 1 disagrees (C-d_ff-4096); "
        "1 is undecided (A-4-heads)"
    )


def test_where_no_row_has_two_seeds_nothing_is_sure() -> None:
    trials = {("base", 1): trial(2.0, 0.6), ("C-2-layers", 1): trial(2.3, 0.4)}
    found = table3_summary.summarise(trials, base_config())
    assert row(found, "C-2-layers")["perplexity"]["seeds"] is None
    assert table3_page.verdict(row(found, "C-2-layers"), "perplexity") == "undecided"
    assert " to " in table3_page.score_cells(found)[0][4]  # over sentences only
    assert "no row has two seeds" in "".join(table3_page.setting_lines(found))


def test_rows_without_a_base_are_shown_without_differences() -> None:
    found = table3_summary.summarise({("big", 1): trial(2.0, 0.6)}, base_config())
    assert table3_page.difference_cells(found) == []
    assert [cells[0] for cells in table3_page.score_cells(found)] == ["big"]


def test_a_result_survives_its_file_and_names_no_place(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "sub" / "table3.json"
    table3_summary.write(summary, file)
    assert table3_summary.read(file) == json.loads(json.dumps(summary))
    assert "/a/place" not in file.read_text()
    assert "/another" not in file.read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "no such result"), ("[1]", "holds no result"), ("{", "cannot be read")],
)
def test_a_file_that_is_no_result_is_told(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "table3.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told):
        table3_summary.read(file)


def test_nothing_done_is_told() -> None:
    with pytest.raises(UserError, match="no training of Table 3 is done"):
        table3_summary.summarise({}, base_config())


def test_the_page_is_written_from_the_result_and_only_between_its_marks(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    page, image = tmp_path / "table3.md", tmp_path / "images" / "table3.svg"
    parts = ("sizes", "architectures", "setting", "scores", "differences", "verdicts", "seeds")
    marks = "\n".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->" for name in parts)
    page.write_text(f"# By hand\n{marks}\nlast\n")
    table3_page.write(summary, page, image)
    text = page.read_text()
    assert text.startswith("# By hand\n")
    assert text.endswith("last\n")
    assert "old" not in text
    for name in ("base", "C-d_ff-4096"):
        assert f"| {name} |" in text
    assert "40,932 to 41,160" in text
    svg = image.read_text()
    assert all(row["row"] in svg for row in summary["rows"] if row["row"] != "base")


def test_every_row_of_the_table_has_words_for_its_verdict() -> None:
    for each in ROWS.values():
        for metric in ("perplexity", "bleu_valid"):
            assert isinstance(table3_page.paper_difference(each, metric), float)
