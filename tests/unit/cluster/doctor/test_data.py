"""The corpus: prepared, damaged, of another configuration, or still to be made."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.checks import Check
from cluster.doctor import data as doctor
from data_shards.config import DataConfig
from data_shards.manifest import Manifest

_FILES = ["train", "val", "test_2016_flickr"]


def look(config: DataConfig) -> list[Check]:
    return list(doctor.checks(config))


def test_a_prepared_corpus(prepared: tuple[DataConfig, Manifest]) -> None:
    [check] = look(prepared[0])
    assert check.outcome == "ok"
    assert "2,800 pairs in 3 shards" in check.found
    assert "babelray data verify" in check.found


def test_a_damaged_corpus(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> None:
    config = prepared[0].model_copy(update={"dir": tmp_path / "copy"})
    shutil.copytree(prepared[1].folder, tmp_path / "copy")
    shard, other, *_ = sorted((tmp_path / "copy" / "shards").iterdir())
    shard.unlink()
    other.write_bytes(b"cut")
    [check] = look(config)
    assert check.outcome == "failure"
    assert f"{shard}: No such file" in check.found
    assert f"{other}: 3 bytes, should be" in check.found
    (tmp_path / "copy" / "manifest.json").write_text("{")
    assert look(config)[0].outcome == "failure"


def test_shards_that_lie_elsewhere(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> None:
    shutil.copytree(prepared[1].folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "shards")
    update = {"dir": tmp_path / "copy", "shards_url": "s3://corpora/one"}
    [check] = look(prepared[0].model_copy(update=update))
    assert check.outcome == "ok"
    assert f"verify {tmp_path / 'copy'} --shards-url s3://corpora/one" in check.found
    (tmp_path / "copy" / "lengths.npy").unlink()
    assert look(prepared[0].model_copy(update=update))[0].outcome == "failure"


def test_a_corpus_of_another_configuration(prepared: tuple[DataConfig, Manifest]) -> None:
    update = {"dir": prepared[1].folder, "vocabulary_size": 161}
    [check] = look(prepared[0].model_copy(update=update))
    assert check.outcome == "failure"
    assert "another configuration" in check.found


def test_one_that_is_generated(tmp_path: Path) -> None:
    corpus, room = look(DataConfig(root=tmp_path / "data"))
    assert (corpus.outcome, room.outcome) == ("ok", "ok")
    assert not (tmp_path / "data").exists()


def test_no_room(tmp_path: Path) -> None:
    config = DataConfig(root=tmp_path, embedded_pairs=10**12)
    assert look(config)[1].outcome == "failure"


def test_texts_that_are_not_there(tmp_path: Path, toy_text: tuple[Path, Path]) -> None:
    source, target = map(str, toy_text)
    config = DataConfig(corpus="files", source=source, target=target, root=tmp_path)
    assert [check.outcome for check in look(config)] == ["ok", "ok"]
    [check] = look(config.model_copy(update={"target": "/none/text.de"}))
    assert check.outcome == "failure"
    assert check.found == "data.target: /none/text.de: No such file or directory"


def test_a_name_that_no_catalogue_has(tmp_path: Path) -> None:
    [check] = look(DataConfig(corpus="multi40k", root=tmp_path))
    assert check.outcome == "failure"
    assert "multi30k" in (check.mend or "")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server's URL and the folder it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", folder
        serving.shutdown()


def test_mirrors(tmp_path: Path, server: tuple[str, Path]) -> None:
    url, folder = server
    config = DataConfig(corpus="multi30k", root=tmp_path / "data", mirror=url)
    [check] = look(config)
    assert check.outcome == "failure"
    assert "404" in check.found
    [check] = look(config.model_copy(update={"mirror": str(folder)}))
    assert check.outcome == "failure"
    assert "has no train.en.gz, train.de.gz, val.en.gz" in check.found
    (folder / "multi30k").mkdir()
    for name in _FILES:
        for language in ("en", "de"):
            (folder / "multi30k" / f"{name}.{language}.gz").write_bytes(bytes(100))
    for mirror in (url, str(folder)):
        found = look(config.model_copy(update={"mirror": mirror}))
        assert [check.outcome for check in found] == ["ok", "ok"], found
    gone = config.model_copy(update={"mirror": "http://127.0.0.1:1"})
    [check] = look(gone)
    assert check.outcome == "failure"
    assert "cannot be reached" in check.found
