"""Table 1: its orders exactly, by counting; the fits on made-up data; the page from results.

Nothing is timed here: times are in the results, but no test looks at how long they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from cluster.cli import cli
from data_shards.errors import UserError
from tests.workplace import REPOSITORY
from trainer.paper import table1, table1_charts, table1_counts, table1_page, table1_tables
from trainer.paper.charts import Panel
from trainer.paper.results import write_result
from trainer.paper.table1_fit import crossing, fit_line, fit_power
from trainer.paper.table1_layers import LAYERS, Layer, banded_attention, make, make_stack
from trainer.paper.table1_page import PARTS, parts, write_page
from trainer.paper.timing import peak_bytes

TINY = table1.Sizes(
    count_n=(16, 32),
    count_d=(16, 32),
    count_at=32,
    windows=(3, 5),
    chain_n=(3, 6),
    path_n=(17, 33),
    dilated_n=(3, 9),
    strength_n=6,
    strength_d=8,
    seeds=1,
    time_n=(8, 16),
    time_d=(8, 16),
    at_n=16,
    at_d=8,
    crossing_n=(8, 16),
    crossing_d=(8, 16),
    upper_n=8,
    upper_d=8,
    rounds=1,
)
ALL = list(LAYERS.values())


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    said: list[str] = []
    found = table1.measure(TINY, said.append)
    assert any(line.startswith("times: round 1 of 1") for line in said)
    return found


@pytest.fixture(scope="module")
def file(result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("table1") / "new" / "table1.json"
    write_result(file, result)
    return file


# --- the layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ALL, ids=lambda layer: layer.name)
def test_a_layer_keeps_the_shape_and_sees_what_it_says(layer: Layer) -> None:
    inputs = torch.randn(2, 40, 6, requires_grad=True)
    output = make(layer, 6, window=5)(inputs)
    assert output.shape == inputs.shape
    (gradient,) = torch.autograd.grad(output[:, 20].sum(), inputs)
    seen = [int(place) for place in (gradient != 0).any(-1).any(0).nonzero()]
    expected = {"Self-Attention (restricted)": range(18, 23), "Convolutional": range(16, 21)}
    whole = range(21) if layer.forward else range(40)
    assert seen == list(expected.get(layer.paper_row, whole))


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("neighbourhood", [3, 9, 33])
def test_by_blocks_is_what_the_mask_gives(length: int, neighbourhood: int) -> None:
    inputs = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, length, 8, dtype=torch.float64)
    found = []
    for name in ("attention-banded", "attention-masked"):
        output = make(LAYERS[name], 8, window=neighbourhood)(inputs)
        found.append((output, *torch.autograd.grad(output, inputs, direction)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_hold_no_square() -> None:
    inputs = torch.randn(1, 512, 8)
    held = [
        peak_bytes(lambda n=n: banded_attention(*[inputs[:, :n]] * 3, radius=4))  # type: ignore[misc]
        for n in (256, 512)
    ]
    whole = peak_bytes(lambda: make(LAYERS["attention"], 8)(inputs))
    assert held[1] <= 2.1 * held[0]
    assert whole >= 2 * 512 * 512 * 4 > 4 * held[1]


# --- counted, as in the paper's table -------------------------------------------------------------

# Exponents of n, of d, and of r - 1 or k.
_EXPONENTS = {
    "attention": (2, 1, None),
    "attention-fused": (2, 1, None),
    "rnn": (1, 2, None),
    "gru": (1, 2, None),
    "lstm": (1, 2, None),
    "convolution": (1, 2, 1),
    "convolution-dilated": (1, 2, 1),
    "attention-banded": (1, 1, 1),
    "attention-masked": (2, 1, 0),
}


@pytest.mark.parametrize("name", _EXPONENTS)
def test_operations_grow_as_in_the_paper(name: str) -> None:
    layer, (of_n, of_d, of_window) = LAYERS[name], _EXPONENTS[name]
    window = layer.window and 9
    sizes = (8, 16, 32)
    by_n = [table1_counts.operations(layer, n, 8, window=window) for n in sizes]
    by_d = [table1_counts.operations(layer, 8, d, window=window) for d in sizes]
    assert fit_power(sizes, by_n).slope == pytest.approx(of_n, abs=1e-9)
    assert fit_power(sizes, by_d).slope == pytest.approx(of_d, abs=1e-9)
    if of_window is not None:
        widths = (3, 5, 9)
        by_window = [table1_counts.operations(layer, 16, 16, window=w) for w in widths]
        grows = [w - 1 for w in widths] if layer.name.startswith("attention") else widths
        assert fit_power(grows, by_window).slope == pytest.approx(of_window, abs=1e-9)


@pytest.mark.parametrize("layer", ALL, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("n", "d"), [(16, 8), (48, 32)])
def test_operations_are_counted_as_reckoned(layer: Layer, n: int, d: int) -> None:
    for window in (5, 9) if layer.window else (None,):
        counted = table1_counts.operations(layer, n, d, window=window)
        assert counted == layer.operations(n, d, window or 0)


@pytest.mark.parametrize("layer", ALL, ids=lambda layer: layer.name)
def test_only_recurrence_takes_steps_with_n(layer: Layer) -> None:
    lengths = [table1_counts.chain_length(layer, n) for n in (4, 8, 16)]
    if layer.cell is None:
        assert lengths[0] == lengths[1] == lengths[2] <= 6
    else:
        each = lengths[0] // 4
        assert each > 0
        assert lengths == [each * 4, each * 8, each * 16]


def test_the_steps_of_a_plain_recurrence_and_of_attention_by_hand() -> None:
    # A product, a sum and tanh a position; scores, their scale, softmax, the weighted sum.
    assert table1_counts.chain_length(LAYERS["rnn"], 5) == 15
    assert table1_counts.chain_length(LAYERS["attention"], 5) == 4
    assert table1_counts.chain_length(LAYERS["convolution"], 5) == 1


@pytest.mark.parametrize(
    ("name", "n", "window", "length"),
    [
        ("attention", 33, None, 1),
        ("attention-projected", 33, None, 1),
        ("rnn", 33, None, 33),
        ("gru", 9, None, 9),
        ("lstm", 9, None, 9),
        ("convolution", 33, 3, 16),
        ("convolution", 70, 9, 9),
        ("convolution-separable", 17, 5, 4),
        ("convolution-dilated", 27, 3, 3),
        ("convolution-dilated", 28, 3, 4),
        ("attention-banded", 33, 9, 8),
        ("attention-banded", 34, 9, 9),
        ("attention-masked", 33, 9, 8),
    ],
)
def test_the_longest_path_by_gradients(name: str, n: int, window: int | None, length: int) -> None:
    layer = LAYERS[name]
    assert table1_counts.path_length(layer, n, window=window) == length
    assert table1_counts.reckoned_path(layer, n, window=window) == length


def test_a_gradient_that_is_cut_off_reaches_so_many_inputs() -> None:
    for name in ("rnn", "lstm", "gru"):
        cell = LAYERS[name].cell
        assert cell is not None
        assert table1_counts.reach_of_recurrence(cell, 12, 5) == 5


def test_recurrence_forgets_and_attention_does_not() -> None:
    def falls(name: str) -> float:
        layer = LAYERS[name]
        values = table1_counts.strengths(lambda: make_stack(layer, 16, 1), 33, 16, seeds=4)
        assert len(values) == 33
        return values[32] / values[1]

    assert falls("rnn") < 1e-5
    assert falls("lstm") < 1e-3
    assert 0.05 < falls("attention-projected") < 20


# --- fits -----------------------------------------------------------------------------------------


def test_a_power_law_is_found_with_its_exponent_and_range() -> None:
    x = [1, 2, 4, 8, 16]
    fit = fit_power(x, [100, 100, 3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5], start=4)
    assert fit.slope == pytest.approx(1.5)
    assert math.exp(fit.intercept) == pytest.approx(3)
    assert fit.r_squared == pytest.approx(1)
    assert (fit.first, fit.last) == (4, 16)
    assert fit_power(x, [7, 7, 7, 7, 7]).r_squared == 1.0


def test_r_squared_tells_a_bad_fit() -> None:
    fit = fit_line([0, 1, 2, 3], [0, 1, 0, 1])
    assert (fit.slope, fit.r_squared) == (pytest.approx(0.2), pytest.approx(0.2))


@pytest.mark.parametrize(("x", "y"), [([1, 1], [1, 2]), ([2], [2]), ([1, 2], [0, 1])])
def test_no_fit_through_what_has_none(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needs|positive"):
        fit_power(x, y)


def test_where_curves_cross() -> None:
    n = [16, 64, 256]
    square, line = [x * x for x in n], [128 * x for x in n]
    assert crossing(n, square, line) == pytest.approx(128)
    assert crossing(n, [x * x for x in n], [1] * 3) == 0.0
    assert crossing(n, [1] * 3, square) is None


def test_the_crossing_by_operations() -> None:
    assert table1.reckoned_crossing("attention", "rnn", 512) == 512
    assert table1.reckoned_crossing("attention", "lstm", 512) == 2048
    assert table1.reckoned_crossing("attention-projected", "rnn", 512) == 0
    assert table1.reckoned_crossing("attention-projected", "lstm", 512) == 1024


# --- the result, its tables and its page ----------------------------------------------------------


def test_every_size_is_measured_and_fitted(result: dict[str, Any]) -> None:
    timed = [name for name, layer in LAYERS.items() if layer.timed]
    assert list(result["time_fits"]) == list(result["memory_fits"]) == timed
    assert all(row["lowest_s"] <= row["seconds"] <= row["highest_s"] for row in result["times"])
    assert all(row["bytes"] > 0 for row in result["memory"])
    assert len(result["crossings"]) == 2 * 2 * 2 * 2


def test_the_tables_say_the_papers_orders(result: dict[str, Any]) -> None:
    rows = {row[0]: row[1:] for row in table1_tables.orders(result).rows}
    assert rows["self-attention"] == ("O(n²·d)", "n² d", "O(1)", "1", "O(1)", "1")
    by_loop = "n, by construction"
    assert rows["recurrence (RNN)"] == ("O(n·d²)", "n d²", "O(n)", "n", "O(n)", by_loop)
    assert rows["convolution, separable"][0] == "O(k·n·d + n·d²), section 4"
    assert rows["convolution, dilated"][1:] == ("k n d²", "O(1)", "1", "O(log_k(n))", "log_k n")
    assert rows["convolution"][-1] == "n / k"
    assert rows["restricted self-attention, by blocks"][-1] == "n / r"


def test_the_page_is_written_from_the_results_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Sequence[Panel]] = {}
    monkeypatch.setattr(
        table1_charts,
        "write_charts",
        lambda file, panels, **_: drawn.update({file.relative_to(tmp_path).as_posix(): panels}),
    )
    page = tmp_path / "paper" / "page.md"
    page.parent.mkdir()
    read = table1.read_result(file)
    read["crossings"][0]["measured"] = 12345.0
    names = list(parts(read))
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names))
    written = write_page(read, page)
    text = page.read_text()
    for name, part in parts(read).items():
        assert part in text, name
    for name in ("orders", "operations", "steps", "paths", "strengths", "times", "crossings"):
        for row in getattr(table1_tables, name)(read).rows:
            assert f"| {' | '.join(row)} |" in text, name
    assert list(PARTS) == list(names)
    assert text.count("12,000") == 2
    assert "12,345" not in text
    assert "in the 6 cases of recurrence the path is n by construction" in text
    names = ("path", "gradient", "time", "crossing", "memory")
    for panel in (panel for panels in drawn.values() for panel in panels):
        assert len({(one.look, one.style) for one in panel.series}) == len(panel.series)
    looks = {(one.name, one.look) for ps in drawn.values() for p in ps for one in p.series}
    assert len({name for name, _ in looks}) == len(looks)
    assert list(drawn) == [f"images/paper/table1-{name}.svg" for name in names]
    assert [tmp_path / name for name in drawn] == written[1:]
    assert all(
        len(one.x) == len(one.y) > 0 for ps in drawn.values() for p in ps for one in p.series
    )
    time_panel = drawn["images/paper/table1-time.svg"][0]
    rows = [row for row in read["times"] if (row["layer"], row["d"]) == ("rnn", TINY.at_d)]
    expected = [row["seconds"] * 1e3 for row in rows if row["mode"] == "forward"]
    (rnn,) = [one for one in time_panel.series if one.name == "recurrence (RNN)"]
    assert (list(rnn.x), rnn.y) == (list(TINY.time_n), expected)


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    committed = (REPOSITORY / "docs" / "paper" / "table1.md").read_text()
    result = table1.read_result(REPOSITORY / "benchmarks" / "results" / "table1.json")
    for name, part in parts(result).items():
        assert f"<!-- {name}: begin -->\n\n{part}\n\n<!-- {name}: end -->" in committed, name
    for name in table1_charts.NAMES:
        assert f"(../images/paper/table1-{name}.svg)" in committed
        assert (REPOSITORY / "docs" / "images" / "paper" / f"table1-{name}.svg").is_file()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["table1", *map(str, arguments)])


def test_the_command_tells_measures_and_writes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = file.read_text()
    monkeypatch.setattr(table1, "measure", lambda sizes, say: json.loads(kept))
    wanted: list[tuple[object, Path]] = []
    monkeypatch.setattr(
        table1_page, "write_page", lambda result, page: wanted.append((result, page)) or [page]
    )
    output, page = tmp_path / "results" / "table1.json", tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in PARTS))
    done = run("--output", output, "--page", page)
    assert done.exit_code == 0, done.output
    assert "The paper's table 1" in done.stdout
    assert wanted == [(json.loads(kept), page)]
    assert "page.md" in done.stderr
    assert output.read_text() == kept
    told = run("--input", output, "--json")
    assert json.loads(told.stdout) == json.loads(kept)


def test_what_could_not_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table1, "measure", lambda sizes, say: pytest.fail("it is measured"))
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (("--output", tmp_path / "file" / "x.json"), "is no folder"),
        (("--page", tmp_path / "none.md"), "cannot be read"),
        (("--page", tmp_path / "file"), "no part 'machine'"),
        (("--quick", "--page", tmp_path / "file"), "no --page"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert words in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "no results"),
        ('{"format": 0}', "no results"),
        ('{"format": 1, "crossings": []}', "'machine' is missing"),
    ],
)
def test_results_that_cannot_be_read_are_told(
    tmp_path: Path, content: str | None, words: str
) -> None:
    source = tmp_path / "given.json"
    if content is not None:
        source.write_text(content)
    done = run("--input", source)
    assert done.exit_code == 2
    assert words in done.stderr
    assert "given.json" in done.stderr


def test_input_goes_with_no_measuring(tmp_path: Path) -> None:
    done = run("--input", tmp_path / "x.json", "--quick")
    assert done.exit_code == 2
    assert "no --quick" in done.stderr


def test_what_cannot_be_written_is_told(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "paper").write_text("a page without parts")
    with pytest.raises(UserError, match="no part 'machine'"):
        write_page(result, tmp_path / "paper")
    assert (tmp_path / "paper").read_text() == "a page without parts"
