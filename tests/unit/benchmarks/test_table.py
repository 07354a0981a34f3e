"""The table of all benchmarks: what counts as worse, what is compared, what is said."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def table(scripts: None) -> ModuleType:
    return importlib.import_module("table")


@pytest.fixture(scope="module")
def bench(scripts: None) -> ModuleType:
    return importlib.import_module("bench")


def row(what: str = "tiny, bf16", **values: Any) -> dict[str, Any]:
    return {
        "benchmark": "train",
        "what": what,
        "value": 13_000.0,
        "spread": [12_000.0, 14_000.0],
        "unit": "tokens/CPU s",
        "ratio": 3.0,
        "ratio_spread": [2.9, 3.1],
        "against": "plain fp32 loop",
        "goal": 3.0,
        "higher_is_better": True,
        **values,
    }


def test_a_ratio_below_all_turns_of_the_baseline_is_worse(table: ModuleType) -> None:
    slower = row(ratio=2.6, ratio_spread=[2.5, 2.7])
    found = table.compare([slower], [row()], same_machine=True)
    assert [change.worse for change in found.changes] == [True]
    assert str(found.regressions[0]) == (
        "WORSE: train: tiny, bf16: 2.6 x plain fp32 loop, was 3 x plain fp32 loop"
    )


def test_where_less_is_better_a_rise_is_worse(table: ModuleType) -> None:
    kill = row(ratio=0.4, ratio_spread=[0.38, 0.42], higher_is_better=False)
    slower = {**kill, "ratio": 0.5, "ratio_spread": [0.48, 0.52]}
    assert table.compare([slower], [kill], same_machine=True).regressions
    assert not table.compare([kill], [slower], same_machine=True).regressions
    assert len(table.compare([kill], [slower], same_machine=True).changes) == 1


@pytest.mark.parametrize(
    ("ratio", "spread"),
    [
        pytest.param(2.6, [2.5, 2.95], id="one turn as fast as the baseline's slowest"),
        pytest.param(2.88, [2.87, 2.89], id="within a twentieth"),
    ],
)
def test_what_may_be_chance_is_no_change(
    table: ModuleType, ratio: float, spread: list[float]
) -> None:
    slower = row(ratio=ratio, ratio_spread=spread)
    assert not table.compare([slower], [row()], same_machine=True).changes


def test_a_row_without_a_spread_is_taken_to_vary_by_some(table: ModuleType) -> None:
    memory = row("memory", value=100.0, spread=None, ratio=None, ratio_spread=None, against=None)
    memory |= {"higher_is_better": False}
    assert not table.compare([{**memory, "value": 110.0}], [memory], same_machine=True).changes
    assert table.compare([{**memory, "value": 150.0}], [memory], same_machine=True).regressions


def test_values_of_another_machine_are_not_compared(table: ModuleType) -> None:
    value = row("plan", ratio=None, ratio_spread=None, against=None, goal=None)
    halved = {**value, "value": 6_000.0, "spread": [5_900.0, 6_100.0]}
    slower = row(ratio=2.6, ratio_spread=[2.5, 2.7])
    here = table.compare([slower, halved], [row(), value], same_machine=True)
    assert (len(here.regressions), here.compared, here.values_left_out) == (2, 2, 0)
    elsewhere = table.compare([slower, halved], [row(), value], same_machine=False)
    assert (len(elsewhere.regressions), elsewhere.compared) == (1, 1)
    assert elsewhere.values_left_out == 1


def test_rows_of_one_only_are_named(table: ModuleType) -> None:
    found = table.compare(
        [row(), row("big")], [row(), row("small"), {**row("x"), "benchmark": "decode"}],
        same_machine=True,
    )  # fmt: skip
    assert found.new == ("train: big",)
    # That decode was not run does not mean that its rows are gone.
    assert found.gone == ("train: small",)


def test_the_table_shows_goal_and_baseline(table: ModuleType) -> None:
    head, first, second = table.lines(
        [row(), row("base", ratio=2.0, goal=2.3)], [row(ratio=2.3, ratio_spread=[2.2, 2.4])]
    )
    assert "before" in head
    assert first.split("  ")[0] == "train"
    assert "13,000 tokens/CPU s" in first
    assert " ≥ 3 " in first
    assert " met" in first
    assert first.endswith("2.3")
    assert second.startswith("     ")  # the benchmark is named once
    assert "NOT met" in second


def test_machines_have_names_for_files(table: ModuleType) -> None:
    assert table.machine_slug("Intel(R) Xeon(R) Processor", 2) == "intel-xeon-2-cores"
    assert (
        table.machine_slug("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", 12)
        == "intel-core-i7-8700-12-cores"
    )


def baseline(cpu: str) -> dict[str, Any]:
    return {
        "format": "babelray bench 1",
        "machine": {"cpu": cpu, "cores": 2},
        "benchmarks": {},
    }


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_the_baseline_is_the_newest_committed_one_of_this_machine(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    for name in ("a-2-cores-2026-11-01", "a-2-cores-2026-11-20", "b-4-cores-2026-11-22"):
        (tmp_path / f"{name}.json").write_text(json.dumps(baseline(name)))
    (tmp_path / "a-2-cores-2026-11-23-quick.json").write_text("{}")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "results")
    # Neither what was changed since nor what is new counts.
    (tmp_path / "a-2-cores-2026-11-20.json").write_text(json.dumps(baseline("changed")))
    (tmp_path / "a-2-cores-2026-11-23.json").write_text(json.dumps(baseline("new")))
    name, found = bench.load_baseline(None, "a-2-cores")
    assert name == "a-2-cores-2026-11-20.json"
    assert found["machine"]["cpu"] == "a-2-cores-2026-11-20"
    # A machine without one is compared with another's.
    assert bench.load_baseline(None, "c-8-cores")[0] == "b-4-cores-2026-11-22.json"


def test_without_git_and_without_results_there_is_no_baseline(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert bench.load_baseline(None, "a-2-cores") == ("", None)
    (tmp_path / "a-2-cores-2026-11-01.json").write_text(json.dumps(baseline("a")))
    assert bench.load_baseline(None, "a-2-cores")[0] == "a-2-cores-2026-11-01.json"


def test_a_baseline_that_is_none_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": "else"}')
    with pytest.raises(SystemExit, match=r"not a result of benchmarks/bench\.py"):
        bench.load_baseline(tmp_path / "other.json", "a")
    with pytest.raises(SystemExit, match=r"--baseline .*No such file"):
        bench.load_baseline(tmp_path / "missing.json", "a")


SCRIPT = """
import argparse, json, sys
parser = argparse.ArgumentParser()
parser.add_argument("--output")
parser.add_argument("--corpora")
print("measuring")
{body}
"""


def main(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_is_joined_compared_and_its_regression_decides_the_exit_status(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writes = "json.dump({{'command': 'x', 'summary': [{row!r}]}}, open(a.output, 'w'))"
    good, bad = row(), row(ratio=2.0, ratio_spread=[1.9, 2.1])
    (tmp_path / "works.py").write_text(
        SCRIPT.format(body="a = parser.parse_args(); " + writes.format(row=good))
    )
    (tmp_path / "fails.py").write_text(SCRIPT.format(body="sys.exit('no model')"))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    chosen = (bench.Benchmark("works"), bench.Benchmark("fails"), bench.Benchmark("absent"))
    monkeypatch.setattr(bench, "BENCHMARKS", chosen)
    output = tmp_path / "out.json"

    assert main(bench, monkeypatch, "--only", "works", "--output", str(output)) == 0
    assert "no baseline to compare with" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["benchmarks"]["works"]["rows"][0]["ratio"] == 3.0

    worse = tmp_path / "works.py"
    worse.write_text(SCRIPT.format(body="a = parser.parse_args(); " + writes.format(row=bad)))
    then = tmp_path / "then.json"
    output.rename(then)
    arguments = ("--output", str(output), "--baseline", str(then))
    assert main(bench, monkeypatch, "--only", "works", *arguments) == 1
    assert "WORSE: works: tiny, bf16: 2 x plain fp32 loop, was 3 x" in capsys.readouterr().out

    # One that fails is said with its last words; the others' rows of the day are kept.
    assert main(bench, monkeypatch, "--only", "fails", *arguments) == 1
    assert "FAILED: ended with 1: no model" in capsys.readouterr().out
    assert [*json.loads(output.read_text())["benchmarks"]] == ["works"]


def test_a_result_says_how_it_was_made_but_not_where(
    scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = importlib.import_module("common")
    script = str(ROOT / "benchmarks" / "peers" / "compare.py")
    arguments = ["--venvs", "/home/me/venvs", "--shapes", "tiny", "--output", "/home/me/out.json"]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    assert common._command() == ["benchmarks/peers/compare.py", "--shapes", "tiny"]
