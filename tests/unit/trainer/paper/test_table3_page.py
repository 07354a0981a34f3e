from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.errors import UserError
from trainer.config import parse_config
from trainer.paper import table3_page, table3_result, table3_summary
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


def test_a_row_stands_to_the_base_as_the_means_do_and_is_paired_by_sentence(
    summary: dict[str, Any],
) -> None:
    base, worse = row(summary, "base"), row(summary, "C-2-layers")
    ratio = worse["perplexity"]["mean"] / base["perplexity"]["mean"]
    assert worse["perplexity"]["against_base"]["mean"] == pytest.approx(ratio)
    for metric in ("bleu_valid", "bleu_test"):
        difference = worse[metric]["mean"] - base[metric]["mean"]
        assert worse[metric]["against_base"]["mean"] == pytest.approx(difference)
    for metric in table3_summary.METRICS:
        found = worse[metric]["against_base"]
        low, high = found["sentences"]
        assert found["both"][0] < low < found["mean"] < high < found["both"][1]
        assert base[metric]["against_base"] is None
    # The same sentences are hard for both, so the ratio is surer than either score.
    low, high = worse["perplexity"]["against_base"]["sentences"]
    own_low, own_high = worse["perplexity"]["sentences"]
    assert high / low < own_high / own_low


def logarithms(interval: list[float]) -> tuple[float, float]:
    """The middle of an interval of perplexities, and half of it."""
    low, high = map(math.log, interval)
    return (low + high) / 2, (high - low) / 2


def test_perplexity_is_averaged_and_pooled_in_logarithms(summary: dict[str, Any]) -> None:
    three, one = row(summary, "base"), row(summary, "E-learned")
    nats = np.log(three["perplexity_of_seeds"])
    middle, half = logarithms(three["perplexity"]["seeds"])
    assert three["perplexity"]["mean"] == pytest.approx(math.exp(nats.mean()))
    assert middle == pytest.approx(nats.mean())
    assert logarithms(one["perplexity"]["seeds"])[1] == pytest.approx(half * 3**0.5)
    # Squares about the means, in logarithms: of the base's three seeds and of two of another row.
    other = np.log(row(summary, "C-2-layers")["perplexity_of_seeds"])
    squares = ((nats - nats.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum()
    noise = summary["seed_noise"]["perplexity"]
    assert noise == {"deviation": pytest.approx(math.sqrt(squares / 3)), "freedom": 3}
    assert half == pytest.approx(3.182 * noise["deviation"] / math.sqrt(3))


def test_an_interval_is_over_sentences_and_seeds_together(summary: dict[str, Any]) -> None:
    judged = row(summary, "E-learned")["perplexity"]
    _, sentences = logarithms(judged["sentences"])
    _, seeds = logarithms(judged["seeds"])
    middle, both = logarithms(judged["both"])
    assert math.exp(middle) == pytest.approx(judged["mean"])
    assert both == pytest.approx(math.hypot(sentences, seeds))


def test_bleu_is_averaged_as_it_is(summary: dict[str, Any]) -> None:
    three = row(summary, "base")
    assert three["bleu_valid"]["mean"] == pytest.approx(np.mean(three["bleu_valid_of_seeds"]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("C-2-layers", "agrees"),
        ("C-d_ff-4096", "disagrees"),
        ("A-4-heads", "undecided"),
        ("E-learned", "undecided"),  # no difference, but less sure than the margin
    ],
)
def test_verdicts(summary: dict[str, Any], name: str, expected: str) -> None:
    for metric in ("perplexity", "bleu_valid"):
        assert table3_page.verdict(row(summary, name), metric) == expected


def test_the_base_has_no_verdict(summary: dict[str, Any]) -> None:
    assert table3_page.verdict(row(summary, "base"), "perplexity") is None
    lines = table3_page.verdict_lines(summary)
    assert lines[0] == (
        "perplexity, of 4 rows: 1 agrees (C-2-layers); 1 disagrees (C-d_ff-4096); "
        "2 are undecided (A-4-heads, E-learned)"
    )


def judged(name: str, metric: str, low: float, high: float) -> str | None:
    """The verdict of a row that stands so to the base."""
    against = {"mean": (low + high) / 2, "both": [low, high]}
    return table3_page.verdict({"row": name, metric: {"against_base": against}}, metric)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.992, 1.008, "agrees"),
        (1.002, 1.008, "agrees"),  # surely different, and surely by less than the margin
        (0.990, 1.008, "undecided"),
        (0.5, 2.0, "undecided"),  # the noisier the row, the less it agrees
        (1.008, 1.020, "undecided"),
        (1.010, 1.020, "disagrees"),
        (0.970, 0.990, "disagrees"),
    ],
)
def test_as_good_as_the_base_is_a_whole_interval_within_the_margin(
    low: float, high: float, expected: str
) -> None:
    for name in ("E-learned", "A-16-heads"):
        assert judged(name, "perplexity", low, high) == expected
    # The margin's ends are a hundredth of perplexity from 1 and 0.2 BLEU from 0.
    points = [(end - 1) * 0.2 / (math.sqrt(5.01 / 4.92) - 1) for end in (low, high)]
    assert judged("E-learned", "bleu_valid", *points) == expected


def test_the_margin_is_half_of_the_smallest_loss_that_the_paper_names() -> None:
    low, high = table3_page.as_good("perplexity")
    assert high**2 == pytest.approx(5.01 / 4.92)
    assert low * high == pytest.approx(1)
    assert table3_page.as_good("bleu_valid") == pytest.approx((-0.2, 0.2))
    assert "0.991 to 1.009 of base's, BLEU within 0.2" in table3_page.margin_line()


def test_intervals_of_rows_with_one_seed_are_marked(summary: dict[str, Any]) -> None:
    for cells in table3_page.score_cells(summary):
        is_one = cells[2] == "1"
        assert [cell.endswith("†") for cell in cells[4:7]] == [is_one] * 3
    marked = {cells[0]: [cells[i].endswith("†") for i in (1, 4, 7)]
              for cells in table3_page.against_cells(summary)}  # fmt: skip
    assert marked["C-2-layers"] == [False] * 3
    assert marked["E-learned"] == [True] * 3
    assert "† one seed" in table3_page.text(summary)[2][-1]


def test_where_no_row_has_two_seeds_nothing_is_sure() -> None:
    trials = {("base", 1): trial(2.0, 0.6), ("C-2-layers", 1): trial(2.3, 0.4)}
    found = table3_summary.summarise(trials, base_config())
    assert row(found, "C-2-layers")["perplexity"]["seeds"] is None
    assert table3_page.verdict(row(found, "C-2-layers"), "perplexity") == "undecided"
    low, high = row(found, "base")["perplexity"]["sentences"]
    assert table3_page.score_cells(found)[0][4].endswith(f"({low:.2f} to {high:.2f})")
    assert "no row has two seeds" in "".join(table3_page.setting_lines(found))


def test_rows_without_a_base_are_shown_without_differences() -> None:
    found = table3_summary.summarise({("big", 1): trial(2.0, 0.6)}, base_config())
    assert table3_page.against_cells(found) == []
    assert [cells[0] for cells in table3_page.score_cells(found)] == ["big"]


def test_a_result_survives_its_file_and_names_no_place(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "sub" / "table3.json"
    table3_result.write(summary, file)
    assert table3_result.read(file) == json.loads(json.dumps(summary))
    assert "/a/place" not in file.read_text()
    assert "/another" not in file.read_text()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("[1]", "no results of table3"),
        ("{", "is not JSON"),
        ('{"rows": [], "seed_noise": {}, "config": {}}', "no results of table3"),
    ],
)
def test_a_file_that_is_no_result_is_told(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "table3.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told):
        table3_result.read(file)


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda found: found["rows"].clear(), "'rows' is missing or empty"),
        (lambda found: found.pop("signature"), "signature: Field required"),
        (lambda found: found["seed_noise"].clear(), "seed_noise.perplexity: Field required"),
        (lambda found: found["rows"][1]["seeds"].clear(), "rows.1.seeds: "),
        (lambda found: found["rows"][0]["seconds"].clear(), "rows.0: .* seconds and seeds"),
        (lambda found: found["rows"][0].update(row="F"), "rows.0: .* no row 'F'"),
        (
            lambda found: found["rows"][1]["bleu_test"]["against_base"].pop("both"),
            "rows.1.bleu_test.against_base.both: Field required",
        ),
        (lambda found: found["rows"][0]["perplexity"]["both"].pop(), "rows.0.perplexity.both: "),
        (lambda found: found["config"].update(model=3), "configuration .*table3.json.*model"),
    ],
)
def test_a_result_that_lacks_something_is_told_before_anything_is_made(
    summary: dict[str, Any], tmp_path: Path, damage: Damage, told: str
) -> None:
    file = tmp_path / "table3.json"
    table3_result.write(summary, file)
    found = json.loads(file.read_text())
    damage(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=told):
        table3_result.read(file)


def test_nothing_done_is_told() -> None:
    with pytest.raises(UserError, match="no training of Table 3 is done"):
        table3_summary.summarise({}, base_config())


def test_the_page_is_written_from_the_result_and_only_between_its_marks(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    page, image = tmp_path / "table3.md", tmp_path / "images" / "table3.svg"
    marks = "\n".join(
        f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->" for name in table3_page.PARTS
    )
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
            assert isinstance(table3_page.against_base(each, metric), float)
