from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from cluster import naming
from cluster.cli import cli
from trainer.config import load_config
from trainer.paper.table3 import DEFAULT_ROWS

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "benchmarks" / "results"
CONFIG = {
    "model": {"d_model": 64, "d_ff": 64, "num_heads": 8, "encoder_layers": 3, "decoder_layers": 3},
    "trainer": {"max_steps": 30},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def table3(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["table3", "--config", "toy.yaml", *map(str, arguments)])


def shown(*arguments: object) -> Result:
    """Without training."""
    return CliRunner().invoke(cli, ["table3", *map(str, arguments)])


@pytest.mark.usefixtures("folder")
def test_a_dry_run_shows_every_training_and_makes_nothing() -> None:
    found = table3("--dry-run", "--rows", "base:2,C-2-layers", "--steps", 70)
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.output.splitlines()]
    assert [line[0] for line in lines[1:]] == [
        "table3-base-1", "table3-C-2-layers-1", "table3-base-2",
    ]  # fmt: skip
    assert all(line[-2:] == ["70", "no"] for line in lines[1:])
    assert not Path("runs").exists()


@pytest.mark.usefixtures("folder")
def test_by_default_the_rows_of_the_page() -> None:
    found = table3("--dry-run")
    assert found.exit_code == 0, found.output
    assert len(found.output.splitlines()) == 1 + sum(DEFAULT_ROWS.values())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rows", "A-3-heads"), "Table 3 has no such row"),
        (("--rows", "base:0"), "give a number of seeds, such as base:3"),
        (("--rows", "base:many"), "give a number of seeds"),
        (("--prefix", "a/b"), "run name 'a/b'"),
        (("--set", "model.num_heads=4", "--rows", "A-1-head"), "that is 0.5"),
        (("--only-done", "--rows", "base"), "no training of Table 3 is done"),
        (("--set", "trainer.max_steps=null", "--set", "trainer.max_minutes=1"), "give --steps"),
    ],
)
def test_what_is_wrong_is_told_with_the_mend(arguments: tuple[str, ...], told: str) -> None:
    found = table3(*arguments)
    assert found.exit_code == 2, found.output
    assert told in found.output
    assert "Traceback" not in found.output


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "void",
    [
        ("--config", "toy.yaml"), ("--set", "trainer.seed=2"), ("--rows", "base"), ("--seeds", 2),
        ("--steps", 40), ("--parallel", 2), ("--prefix", "toy"), ("--runs", "elsewhere"),
        ("--mirror", "."), ("--dashboard-port", 8300), ("--output", "other.json"),
        ("--only-done",), ("--dry-run",),
    ],
)  # fmt: skip
def test_a_result_that_is_there_is_of_no_other_training(void: tuple[object, ...]) -> None:
    found = shown("--input", RESULTS / "table3.json", *void)
    assert found.exit_code == 2, found.output
    assert f"--input: it is a result that is there, and trains nothing: leave out {void[0]}" in (
        found.output
    )


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dry-run", "--output", "x.json", "--json"), "no result: leave out --output, --json"),
        (("--dry-run", "--only-done"), "it makes no result: leave out --only-done"),
        (("--only-done", "--parallel", "2"), "it trains nothing: leave out --parallel"),
        (("--part", "post-norm"), "give --page, too"),
        (("--output", "toy.yaml/x.json"), "toy.yaml is no folder"),
        (("--image", "toy.yaml/x.svg"), "toy.yaml is no folder"),
        (("--page", "nowhere.md"), "the page cannot be read: nowhere.md"),
        (("--page", "toy.yaml"), "toy.yaml has no part 'sizes'"),
        (("--page", "toy.yaml", "--part", "mine"), "toy.yaml has no part 'mine'"),
    ],
)
def test_what_could_not_be_written_is_told_before_the_training(
    arguments: tuple[str, ...], told: str
) -> None:
    found = table3("--rows", "base", *arguments)
    assert found.exit_code == 2, found.output
    assert told in found.output
    assert not Path("runs").exists()


def test_a_run_of_other_steps_or_of_another_model_is_not_taken_for_this_one(folder: Path) -> None:
    config = naming.absolute(load_config(folder / "toy.yaml"))
    naming.write_config(config, folder / "runs" / "table3-base-1")
    longer = table3("--dry-run", "--rows", "base", "--steps", 40)
    assert longer.exit_code == 2
    assert "is one of 30 steps, not of 40: give --steps 30, or another --prefix" in longer.output
    other = table3("--dry-run", "--rows", "base", "--set", "model.d_ff=128")
    assert other.exit_code == 2
    assert "model.d_ff: 64 in the run, 128 now" in other.output
    assert "--prefix" in other.output
    assert table3("--dry-run", "--rows", "base").exit_code == 0


def test_a_damaged_result_of_a_trial_is_told(folder: Path) -> None:
    run_dir = folder / "runs" / "table3-base-1"
    naming.write_config(naming.absolute(load_config(folder / "toy.yaml")), run_dir)
    (run_dir / "table3.json").write_text('{"steps": 1}')
    found = table3("--dry-run", "--rows", "base")
    assert found.exit_code == 2
    assert "table3.json holds no result of a trial" in found.output
    assert "remove it" in found.output


def test_a_result_can_be_shown_again(folder: Path) -> None:
    committed = RESULTS / "table3.json"
    found = shown("--input", committed, "--image", folder / "table3.svg")
    assert found.exit_code == 0, found.output
    result = json.loads(committed.read_text())
    assert all(row["row"] in found.output for row in result["rows"])
    assert "against base" in found.output
    assert (folder / "table3.svg").exists()
    again = shown("--input", committed, "--json")
    assert {"format": 2, **json.loads(again.output)} == result


@pytest.mark.usefixtures("folder")
def test_a_missing_or_empty_result_is_told() -> None:
    empty = {"format": 2, "rows": [], "seed_noise": {}, "config": {}}
    Path("empty.json").write_text(json.dumps(empty))
    for file, told in (("nowhere.json", "No such file"), ("empty.json", "'rows' is missing")):
        found = shown("--input", file)
        assert found.exit_code == 2
        assert f"--input {file}: {told}" in found.output


def test_the_page_is_the_one_that_the_committed_results_give(folder: Path) -> None:
    committed = (REPOSITORY / "docs" / "paper" / "table3.md").read_text()
    page = folder / "page.md"
    page.write_text(committed)
    assert shown("--input", RESULTS / "table3.json", "--page", page).exit_code == 0
    post_norm = shown(
        "--input", RESULTS / "table3-post-norm.json", "--page", page, "--part", "post-norm"
    )
    assert post_norm.exit_code == 0
    assert page.read_text() == committed
