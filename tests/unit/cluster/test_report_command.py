from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster import naming
from cluster.cli import cli
from trainer.config import RunConfig


@pytest.fixture
def runs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        config = RunConfig(data={"root": str(tmp_path / "data")}, trainer={"seed": len(name)})
        (tmp_path / "runs" / name / "config.json").write_text(config.to_json())
    return tmp_path / "runs"


def _report(runs, *words):
    return CliRunner().invoke(cli, ["report", *words, "--runs", str(runs)])


def test_a_page_of_one_run_and_of_several(runs, tmp_path):
    assert _report(runs, "one").output.strip() == str(runs / "one" / "report.html")
    both = _report(runs, "one", "two", "--price", "2.5", "--currency", "EUR")
    assert Path(both.output.strip()) == runs / "report-one-two.html"
    assert "0.00 EUR" in (runs / "report-one-two.html").read_text()
    output = tmp_path / "new" / "page.html"
    assert _report(runs, "one", "two", "--output", str(output)).output.strip() == str(output)
    assert output.is_file()


def test_numbers_instead_of_a_page(runs):
    with naming.claim(runs / "two"):
        found = json.loads(_report(runs, "one", "two", "--json").output)
    assert [run["state"]["word"] for run in found["runs"]] == ["not started", "running"]
    assert found["configuration_differences"] == {}
    assert json.loads(_report(runs, "one", "--json").output)["run"] == "one"
    assert not list(runs.rglob("*.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "--price", "-1"], "--price -1"),
        (["one", "--output", "page.html"], "--output is for several runs"),
        (["one", "one"], "given twice"),
        (["one", "tow"], "did you mean two?"),
    ],
)
def test_what_cannot_be_is_said(runs, words, message):
    result = _report(runs, *words)
    assert result.exit_code == 2
    assert message in result.output
