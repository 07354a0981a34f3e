"""The file by which Prometheus finds a run's machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import targets


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1:9400"]),
        ("0.0.0.0", ["10.0.0.1:9400", "10.0.0.2:9400", "[fd00::1]:9400"]),
    ],
)
def test_it_names_each_machine_once(tmp_path: Path, host: str, expected: list[str]) -> None:
    run_dir = tmp_path / "runs" / "demo"
    run_dir.mkdir(parents=True)
    nodes = ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]
    targets.write(run_dir, nodes, host=host, port=9400)
    file = tmp_path / "runs" / ".prometheus" / "demo.json"
    assert json.loads(file.read_text()) == [{"targets": expected, "labels": {}}]


def test_it_follows_the_machines_and_goes_with_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    targets.write(run_dir, ["10.0.0.1", "10.0.0.2"], host="0.0.0.0", port=1)
    targets.write(run_dir, ["10.0.0.2"], host="0.0.0.0", port=1)
    assert json.loads(targets.targets_path(run_dir).read_text())[0]["targets"] == ["10.0.0.2:1"]
    targets.remove(run_dir)
    targets.remove(run_dir)
    assert not targets.targets_path(run_dir).exists()
