"""Which runs were launched from here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.launch.records import Record, launched, open_target, read_record, write_record
from cluster.launch.remote import launched_elsewhere
from cluster.launch.target import Place
from data_shards.errors import UserError

PODS = Place(
    "kubernetes", "/mnt/babelray", context="gke", namespace="nmt", overlay="spot",
    components=("kueue", "s3"), nodes="1:4", gpus=8, image="registry/babelray@sha256:0",
)  # fmt: skip
RECORD = Record("one", PODS, "trainer:\n  max_steps: 7\n", 12.5)


def test_a_launch_is_found_again(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path)
    assert read_record("one", tmp_path) == RECORD
    assert [record.run for record in launched(tmp_path)] == ["one"]
    again = Record("one", Place("ray", "/shared", address="http://head:8265"), "", 13.0)
    write_record(again, tmp_path)
    assert read_record("one", tmp_path) == again


def test_no_launch(tmp_path: Path) -> None:
    assert read_record("one", tmp_path) is None
    assert launched(tmp_path / "nothing") == []


@pytest.mark.parametrize("content", ["", "[]", '{"place": {}}', '{"place": 3}', "{"])
def test_a_damaged_record_is_told(tmp_path: Path, content: str) -> None:
    write_record(RECORD, tmp_path)
    (tmp_path / ".launched" / "one.json").write_text(content)
    with pytest.raises(UserError, match=r"one\.json is damaged: remove it"):
        read_record("one", tmp_path)


def test_a_run_that_was_begun_here_is_not_elsewhere(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path)
    assert launched_elsewhere("one", tmp_path) == RECORD
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ray.json").write_text('{"is_local": true}')
    assert launched_elsewhere("one", tmp_path) is None
    assert launched_elsewhere("two", tmp_path) is None


def test_each_place_has_its_target() -> None:
    assert type(open_target(PODS)).__name__ == "KubernetesTarget"
    ray = Place("ray", "/shared", address="http://head:8265")
    assert type(open_target(ray)).__name__ == "RayJobsTarget"
