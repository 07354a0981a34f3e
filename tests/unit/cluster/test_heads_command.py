from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli import cli
from cluster.commands.heads import _aligned, _grammar_lines
from tests.runs import make_run
from trainer.grammar_heads import Finding


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("seen"), steps=(20,))


def heads(run_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["heads", str(run_dir), "--sentences", "5", *arguments])


def test_a_line_for_each_head(trained: Path) -> None:
    result = heads(trained)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "demo, step 20: 5 sentences of the test set"
    found = [line.split()[:2] for line in lines if line.startswith(("cross", "enc", "dec"))]
    assert len(found) == 20
    assert found[0] == ["cross", "1.1"]
    assert "silenced" not in result.stdout
    assert "follows" not in result.stdout  # nobody knows these sentences' grammar


def test_what_is_lost_as_numbers_and_as_a_picture(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "lost.svg"
    result = heads(trained, "--silence", "--json", "--output", str(file))
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{file}\n"
    found = json.loads(result.stdout)
    assert (found["step"], found["sentences"], found["grammar"]) == (20, 5, [])
    assert [one["head"] for one in found["heads"]][-1] == "decoder 2.4"
    assert len(found["silenced"]) == 20
    whole = found["all_heads"]["every piece"]
    assert 0 < whole["nats"] < 10
    assert found["run"] == "demo"
    # Chosen on the validation set: the two heads whose silencing loses most of its pieces.
    validation = {
        head: groups["every piece"]["right"]
        for head, groups in found["validation"]["silenced"].items()
    }
    [group] = found["most_needed"]
    assert (group["group"], group["cases"]) == ("every piece", whole["cases"])
    assert [validation[one["head"]] for one in group["heads"]] == sorted(validation.values())[:2]
    for one in group["heads"]:
        measured = found["silenced"][one["head"]]["every piece"]
        assert one["right"] == measured["right"]
        changed = round((whole["right"] - measured["right"]) * whole["cases"])
        assert one["lost"] - one["won"] == changed
    picture = file.read_text(encoding="utf-8")
    assert ">decoder 2.4</text>" in picture
    assert "share of the words lost" in picture
    text = heads(trained, "--silence").stdout
    assert sum(line.startswith("encoder 1.") for line in text.splitlines()) >= 2 * 4
    assert f"every piece ({whole['cases']})" in text


def test_relations_are_set_beside_chance() -> None:
    plain = Finding("a → b", "cross", 0, 2, 1234, 0.96, 0.98, 0.1, -2, 0.37, 0.01, 0.95)
    alone = Finding("c → d", "encoder", 1, 0, 7, 0.5, 0.5, 0.25, 1, 0.5, None, None)
    _, first, second, *_ = _grammar_lines([plain, alone])
    assert first.split("  ")[0] == "cross 1.3"
    for part in ("96 %", "98 %", "10 %", "37 % at -2", "1 % of 95 %", "1,234", "a → b"):
        assert part in first
    assert "encoder 2.1" in second
    assert " -  " in second
    assert _grammar_lines([]) == []


def test_columns_stand_under_each_other() -> None:
    assert _aligned([("a", "1", "x"), ("bb", "22", "yyy")]) == ["a    1  x", "bb  22  yyy"]
    assert _aligned([("a", "1"), ("b", "22")], text_last=False) == ["a   1", "b  22"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--output", "a.gif"], "ends in .png, .svg, .pdf"),
        (["--checkpoint", "7"], "no checkpoint of step 7"),
        (["--sentences", "0"], "0 is not in the range"),
        (["--page", "none.md"], "cannot be read: none.md"),
    ],
)
def test_wrong_input_is_told(trained: Path, arguments: list[str], part: str) -> None:
    result = heads(trained, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_without_heads(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.silenced_heads.heads_of", lambda _: {})
    result = heads(trained, "--silence")
    assert result.exit_code == 2
    assert "demo: a model of kind transformer has no heads of which one can be" in result.stderr
    assert heads(trained).exit_code == 0


def test_a_page_is_looked_at_before_anything_is_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.silenced_heads.words_to_write", None)
    page = tmp_path / "page.md"
    page.write_text("<!-- demo silenced: begin -->\n<!-- demo silenced: end -->\n")
    result = heads(trained, "--page", str(page))
    assert result.exit_code == 2
    assert "put in <!-- demo places: begin --> and their ends" in result.stderr


def test_a_pages_tables(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- demo places: begin -->\n<!-- demo places: end -->\n")
    result = heads(trained, "--page", str(page))
    assert result.exit_code == 0, result.output
    assert "| cross: at the same place of the source | `cross " in page.read_text()
