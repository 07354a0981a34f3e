"""Table 2: the paper's numbers by its own method, ours beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.commands.table2 import table2
from data_shards.errors import UserError
from trainer.config import load_config
from trainer.paper.hardware import make_hardware
from trainer.paper.lengths import corpus_size
from trainer.paper.plan import reckon
from trainer.paper.table2 import PAPER, RECIPES, count
from trainer.paper.table2_page import parts

ROOT = Path(__file__).resolve().parents[4]
PAGE = "".join(f"<!-- {part}: begin -->\n<!-- {part}: end -->\n" for part in
               ("table", "counted", "runs"))  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_papers_cost_is_reproduced_by_its_method(recipe) -> None:
    counted = count(recipe)
    assert f"{counted.method_flops:.1e}" == f"{recipe.paper_flops:.1e}"
    # What a P100 sustains was not all the model's own work, and not next to nothing of it.
    assert 0.2 < counted.utilisation < 0.6


def test_the_count_is_that_of_the_configuration() -> None:
    config = load_config(ROOT / "configs" / "wmt14-en-de-big.yaml")
    dry = reckon(config, make_hardware(8, "P100"), corpus_size(config.data, prepared=False))
    assert count(RECIPES[1]).flops == pytest.approx(dry.flops)


def test_the_papers_rows() -> None:
    rows = {row.model: row for row in PAPER}
    assert len(rows) == 10
    assert rows["Transformer (big)"].bleu_en_de == "28.4"
    for name, recipe in (
        ("Transformer (base model)", RECIPES[0]),
        ("Transformer (big)", RECIPES[1]),
    ):
        assert float(rows[name].flops_en_de or 0) == recipe.paper_flops
        assert float(rows[name].flops_en_fr or 0) == recipe.paper_flops
    # 5.1 of the paper's claims: better than every ensemble at a fraction of the cost.
    others = [row for row in PAPER if not row.model.startswith("Transformer")]
    assert max(float(row.bleu_en_de or 0) for row in others) < 28.4
    assert min(float(row.flops_en_de or 1e99) for row in others) > 3.3e18


def test_the_papers_digits_are_kept() -> None:
    written = parts({"paper": [asdict(row) for row in PAPER], "counted": [], "runs": []})["table"]
    assert "| Deep-Att + PosUnk | – | 39.2 | – | 1.0·10²⁰ |" in written
    assert "| GNMT + RL Ensemble | 26.30 | 41.16 | 1.8·10²⁰ | 1.1·10²¹ |" in written


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a log of 100 steps on two workers and one evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    (folder / "evaluation").mkdir(parents=True)
    config = load_config(None, ["model.preset=tiny", "trainer.max_steps=100"])
    (folder / "config.json").write_text(config.to_json())
    events = [
        {"event": "started", "step": 0, "time": 1.0, "world_size": 2, "parameters": 2_000_000,
         "sustained_flops": 4e12},
        {"event": "step", "step": 100, "time": 51.0, "elapsed_s": 50.0, "flops": 2e13,
         "world_size": 2},
        {"event": "finished", "step": 100, "time": 51.0, "elapsed_s": 50.0, "flops": 2e13},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_run_by_both_methods(run: Path) -> None:
    result = CliRunner().invoke(table2, ["one", "--runs", str(run.parent), "--json"])
    (row,) = json.loads(result.output)["runs"]
    assert row["counted_flops"] == 2e13
    assert row["method_flops"] == 50 * 4e12
    assert row["utilisation"] == pytest.approx(0.1)
    assert (row["steps"], row["devices"], row["bleu"]) == (100, 2, None)


def test_a_page_is_written_from_the_stored_numbers(run: Path, tmp_path: Path) -> None:
    stored, page = tmp_path / "new" / "table2.json", tmp_path / "page.md"
    page.write_text(PAGE)
    words = ["one", "--runs", str(run.parent), "--output", str(stored), "--page", str(page)]
    assert CliRunner().invoke(table2, words).exit_code == 0
    written = page.read_text()
    assert "| Transformer (big) | 28.4 | 41.8 | 2.3·10¹⁹ | 2.3·10¹⁹ |" in written
    assert "| one | tiny | embedded en-de | 2M | 100 | 50.0 s | 2 |" in written
    page.write_text(PAGE)
    again = CliRunner().invoke(table2, ["--input", str(stored), "--page", str(page)])
    assert again.exit_code == 0
    assert page.read_text() == written


def test_the_page_in_docs_is_of_the_stored_numbers(tmp_path: Path) -> None:
    committed = ROOT / "docs" / "paper" / "table2.md"
    page = tmp_path / "table2.md"
    page.write_text(committed.read_text())
    stored = ROOT / "benchmarks" / "results" / "table2.json"
    assert CliRunner().invoke(table2, ["--input", str(stored), "--page", str(page)]).exit_code == 0
    assert page.read_text() == committed.read_text()
    found = json.loads(stored.read_text())
    assert found["paper"] == [asdict(row) for row in PAPER]
    for recipe, row in zip(RECIPES, found["counted"], strict=True):
        assert row["flops"] == pytest.approx(count(recipe).flops)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "--input", "x.json"], "leave RUN out"),
        (["--input", "x.json"], "no such file"),
        (["--input", __file__], "not written by"),
        (["other"], "other"),
    ],
)
def test_what_cannot_be_is_said(run: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(table2, [*words, "--runs", str(run.parent)])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_without_runs_the_papers_table_is_printed(run: Path) -> None:
    output = CliRunner().invoke(table2, ["--runs", str(run.parent)]).output
    assert "| ByteNet | 23.75 |" in output
    assert "No run was named." in output
