"""Checkpoints in an object store: s3:// for real, spoken to moto's server on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards.shards import prepare
from tests.integration.test_checkpoint_kills import events, make_config, rows
from tests.ranks import Job, run_ranks
from tests.saves import Group, assert_holds, open_storage
from trainer.checkpoint import COMMIT, MANIFEST, Checkpoints
from trainer.parts import WEIGHTS
from trainer.run import load_model
from trainer.storage import StorageError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """What a client needs in its environment."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    running.stop()


@pytest.fixture
def bucket(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket."""
    import s3fs

    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()  # one of them may know another server
    name = tmp_path.name.replace("_", "-")[-60:].strip("-")
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def test_checkpoints_are_saved_verified_read_and_dropped(bucket: str, tmp_path: Path) -> None:
    checkpoints = open_storage(f"{bucket}/runs/demo", tmp_path / "copies")
    group = Group(checkpoints, 2, keep=2, staging=tmp_path / "staging")
    for step in (1, 2, 3):
        group.save(step, best=1)
    assert (checkpoints.committed(), checkpoints.best()) == ([1, 2, 3], 1)
    assert checkpoints.find_trusted() == (3, {})
    assert_holds(checkpoints, 3, group.engines[0])
    names = checkpoints.storage.names(checkpoints.folder(3))
    assert names == sorted([*checkpoints.manifest(3)["files"], MANIFEST, COMMIT])
    assert [path for path in (tmp_path / "staging").rglob("*") if path.is_file()] == []
    group.save(4, best=4)
    assert checkpoints.committed() == [3, 4]

    # The newest is damaged in its place: it is passed over by name.
    where = f"{checkpoints.folder(4)}/{WEIGHTS}"
    content = bytearray(checkpoints.storage.read(where))
    content[-1] ^= 1
    checkpoints.storage.write(where, bytes(content))
    step, passed_over = checkpoints.find_trusted()
    assert step == 3
    assert passed_over[4] == [f"{bucket}/runs/demo/{where} differs from what was written (sha256)"]
    # An attempt that is over cannot commit; the new one clears up.
    new = Group(checkpoints, 1, token="11111111", keep=2)
    group.begin(5)
    assert "a newer attempt" in str(group.wait()[0].error)
    new.save(6)
    assert 6 in checkpoints.committed()
    assert 5 not in checkpoints.committed()


def test_a_bucket_that_is_not_there_is_told(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://absent/.*bucket does not exist"):
        open_storage("s3://absent/runs/demo", tmp_path).begin_attempt("11111111")


def train_there(config: Any, run_dir: Path, **place: Any) -> str:
    """Trains; what the client needs comes by a file (processes have the fork server's settings)."""
    from trainer.attempt import train

    os.environ.update(json.loads((run_dir.parent / "environment.json").read_text()))
    return train(config, run_dir, **place)


def test_a_run_goes_on_from_an_object_store_at_another_size(
    bucket: str, server: dict[str, str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    environment = {**server, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (runs / "environment.json").write_text(json.dumps(environment))
    root = tmp_path / "data"
    part, whole = (
        make_config(root, max_steps=end, checkpoint_every=4, recovery={"storage": f"{bucket}/all"})
        for end in (6, 10)
    )
    prepare(whole.data)
    jobs = [
        Job(part, runs / "demo", train=train_there),
        Job(whole, runs / "whole", train=train_there),
    ]
    assert run_ranks(2, jobs) == ["max_steps", "max_steps"]
    [end] = run_ranks(1, [Job(whole, runs / "demo", resume=True, train=train_there)])
    assert end == "max_steps"
    assert [event["step"] for event in events(runs / "demo", "resumed")] == [6]
    found, expected = rows(runs / "demo"), rows(runs / "whole")
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], rel=1e-4)
    assert [row[3] for row in found] == [row[3] for row in expected]
    assert not (runs / "demo" / "checkpoints").exists()
    checkpoints = Checkpoints.of(runs / "demo", whole.recovery)
    assert checkpoints.where(10) == f"{bucket}/all/demo/checkpoints/step-00000010"
    # Who has the run's folder can evaluate it, too.
    (runs / "demo" / "config.json").write_text(whole.to_json())
    assert load_model(runs / "demo", "last").step == 10
