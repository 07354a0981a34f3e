from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_shards.config import DATA_FORMAT, DataConfig
from data_shards.errors import DataError
from data_shards.manifest import BLOCK_DTYPE, Manifest, check_file


@pytest.fixture
def copy(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared[1].folder, tmp_path / "copy"))


def test_what_was_prepared_is_offered(prepared: tuple[DataConfig, Manifest]) -> None:
    config, manifest = prepared
    content = (manifest.folder / "manifest.json").read_bytes()
    assert manifest.sha256 == hashlib.sha256(content).hexdigest()
    assert manifest.data.fingerprint == config.fingerprint()
    assert (manifest.source_language, manifest.target_language) == ("en", "de")
    assert manifest.lengths.shape == (manifest.num_pairs, 2)
    assert manifest.lengths.dtype == np.uint16
    assert manifest.blocks.dtype == BLOCK_DTYPE
    assert manifest.lengths.sum(axis=0).tolist() == [
        manifest.data.source_tokens,
        manifest.data.target_tokens,
    ]
    assert manifest.vocabulary_path.is_file()
    assert manifest.vocabulary_size == 160
    shards = [manifest.shard_path(index) for index in range(len(manifest.data.shards))]
    assert all(Path(path).is_file() for path in shards)
    for split in ("valid", "test"):
        source, target = manifest.split_text(split)
        assert len(source) == len(target) == manifest.data.splits[split].num_pairs == 100


def test_manifests_format_is_the_documented_one(prepared: tuple[DataConfig, Manifest]) -> None:
    values = json.loads((prepared[1].folder / "manifest.json").read_text())
    assert values["format"] == DATA_FORMAT
    assert set(values) == {
        "format", "fingerprint", "corpus", "source_language", "target_language", "licence",
        "settings", "sentencepiece", "raw_files", "vocabulary", "num_pairs", "source_tokens",
        "target_tokens", "filters", "shards", "splits", "index",
    }  # fmt: skip
    assert set(values["shards"][0]) == {"file", "bytes", "sha256", "num_blocks", "num_pairs"}
    assert set(values["index"]) == {"lengths", "blocks"}


def test_it_can_be_sent_to_another_process(prepared: tuple[DataConfig, Manifest]) -> None:
    manifest = prepared[1]
    received = pickle.loads(pickle.dumps(manifest))
    assert received.data == manifest.data
    assert np.array_equal(received.lengths, manifest.lengths)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_nothing_prepared_names_the_command(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "data"
    make(folder)
    with pytest.raises(DataError, match=r"no prepared corpus at .*data .*babelray data prepare"):
        Manifest.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b"[]", b"\xff\xfe\x00"])
def test_an_unreadable_manifest_is_named(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is not a readable manifest") as caught:
        Manifest.load(copy)
    assert "babelray data prepare" in str(caught.value)


def test_another_format_is_refused_whatever_else_it_holds(copy: Path) -> None:
    (copy / "manifest.json").write_text('{"format": 99, "something": "new"}')
    with pytest.raises(DataError, match=f"format 99; this version reads format {DATA_FORMAT}"):
        Manifest.load(copy)


@pytest.mark.parametrize("name", ["lengths.npy", "blocks.npy"])
def test_a_damaged_index_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()

    path.write_bytes(content[:-1])
    expected = f"{name}: expected {len(content)} bytes, found {len(content) - 1}"
    with pytest.raises(DataError, match=expected):
        Manifest.load(copy)

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{name}: expected sha256"):
        Manifest.load(copy)

    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        Manifest.load(copy)


def test_an_index_that_contradicts_the_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_pairs": values["num_pairs"] - 1}))
    with pytest.raises(DataError, match=r"lengths\.npy does not fit"):
        Manifest.load(copy)
    path.write_text(json.dumps({**values, "shards": values["shards"][:-1]}))
    with pytest.raises(DataError, match=r"blocks\.npy does not fit"):
        Manifest.load(copy)


def test_an_altered_test_set_is_refused(copy: Path) -> None:
    manifest = Manifest.load(copy)
    with (copy / "test.target.txt").open("a") as file:
        file.write("one more\n")
    manifest.split_text("valid")
    with pytest.raises(DataError, match=r"test\.target\.txt: expected"):
        manifest.split_text("test")


def test_check_file_says_nothing_about_a_good_file(copy: Path) -> None:
    manifest = Manifest.load(copy)
    assert check_file(copy, manifest.data.vocabulary) is None
