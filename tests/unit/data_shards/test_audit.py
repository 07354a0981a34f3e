from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_shards.audit import format_statistics, statistics, verify
from data_shards.blocks import describe_file
from data_shards.config import DataConfig
from data_shards.errors import DataError
from data_shards.manifest import Manifest


@pytest.fixture
def copy(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared[1].folder, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def only_problem(folder: Path) -> str:
    [problem] = verify(folder)
    assert str(folder) in problem
    assert "prepare it again" in problem or "babelray data prepare" in problem
    return problem


def test_a_whole_folder_has_no_problem(prepared: tuple[DataConfig, Manifest]) -> None:
    assert verify(prepared[1].folder) == []


def test_a_missing_shard_is_named(copy: Path) -> None:
    path = copy / "shards" / "train-000001.tar"
    num_bytes = path.stat().st_size
    path.unlink()
    assert f"{path}: missing (expected {num_bytes} bytes)" in only_problem(copy)


def test_a_shard_cut_short_is_named(copy: Path) -> None:
    path = copy / "shards" / "train-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    assert f"{path}: expected {len(content)} bytes, found 5000" in only_problem(copy)


def test_shards_that_lie_elsewhere(copy: Path, serve: Callable[[Path], str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl, through which WebDataset reads http, is not installed")
    url = serve(copy)
    assert verify(copy, url) == []
    path = copy / "shards" / "train-000001.tar"
    flip(path, 700)
    [problem] = verify(copy, url)
    sha256 = Manifest.load(copy).data.shards[1].sha256
    assert f"{url}/shards/train-000001.tar cannot be fetched" in problem
    assert f"its sha256 is {sha256}" in problem
    assert f"--shards-url {url}`" in problem
    assert "upload shards/train-000001.tar again" in problem
    shutil.rmtree(copy / "shards")
    [problem] = verify(copy)
    assert "none of the 3 shards is there" in problem
    assert "--shards-url" in problem


def test_an_altered_block_is_named_and_no_other(copy: Path) -> None:
    blocks = Manifest.load(copy).blocks
    flip(copy / "shards" / "train-000001.tar", int(blocks[70]["offset"]) + 600)
    assert int(blocks[70]["shard"]) == 1
    problem = only_problem(copy)
    assert "train-000001.tar, block 70: expected sha256" in problem
    assert blocks[70]["sha256"].decode() in problem


def test_an_altered_end_of_a_shard_is_seen(copy: Path) -> None:
    path = copy / "shards" / "train-000002.tar"
    flip(path, path.stat().st_size - 1)
    assert "train-000002.tar: expected sha256" in only_problem(copy)


@pytest.mark.parametrize("name", ["vocabulary.model", "valid.source.txt", "test.target.txt"])
def test_every_other_file_is_checked(copy: Path, name: str) -> None:
    flip(copy / name, 10)
    assert f"{name}: expected sha256" in only_problem(copy)


def test_several_problems_are_all_told(copy: Path) -> None:
    for name in ("shards/train-000000.tar", "shards/train-000002.tar", "vocabulary.model"):
        (copy / name).unlink()
    assert len(verify(copy)) == 3


def test_what_is_no_prepared_corpus_is_one_problem(copy: Path, tmp_path: Path) -> None:
    assert "no prepared corpus" in only_problem(tmp_path / "nowhere")
    flip(copy / "lengths.npy", -1)
    assert "lengths.npy: expected sha256" in only_problem(copy)


def replace_index(folder: Path, name: str, array: np.ndarray) -> None:
    """An index that fits its checksum and not the shards: what a bug would write."""
    np.save(folder / name, array)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["index"][name.removesuffix(".npy")] = describe_file(folder, name).model_dump()
    path.write_text(json.dumps(values))


def test_lengths_that_disagree_with_the_block_are_seen(copy: Path) -> None:
    lengths = np.array(Manifest.load(copy).lengths)
    lengths[20, 1] += 1
    replace_index(copy, "lengths.npy", lengths)
    assert "block 1: its lengths differ from the index" in only_problem(copy)


def test_blocks_in_another_order_are_seen(copy: Path) -> None:
    blocks = np.array(Manifest.load(copy).blocks)
    blocks[[3, 4]] = blocks[[4, 3]]
    replace_index(copy, "blocks.npy", blocks)
    problems = verify(copy)
    assert [problem.split(". ")[0].split(", ")[1] for problem in problems] == [
        "block 3: expected key 000000003",
        "block 4: expected key 000000004",
    ]


def test_statistics_count_what_is_there(prepared: tuple[DataConfig, Manifest]) -> None:
    manifest = prepared[1]
    stats = statistics(manifest.folder)
    assert stats.num_pairs == manifest.num_pairs == stats.filters["kept"]
    assert stats.num_blocks == len(manifest.blocks)
    # All but what an evaluation may have left beside them.
    counts = manifest.folder / "target-words.json"
    on_disk = [p for p in manifest.folder.rglob("*") if p.is_file() and p != counts]
    assert stats.num_bytes == sum(path.stat().st_size for path in on_disk)
    for percent, values in stats.length_percentiles.items():
        expected = np.percentile(manifest.lengths, percent, axis=0, method="inverted_cdf")
        assert values == tuple(expected.astype(int))
    assert {name: split.num_pairs for name, split in stats.splits.items()} == {
        "valid": 100,
        "test": 100,
    }
    assert all(split.unknown_rate == (0.0, 0.0) for split in stats.splits.values())


def test_unknown_pieces_of_a_test_set_are_counted(copy: Path) -> None:
    (copy / "test.source.txt").write_text("漢 漢 漢 漢\n" * 100)
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    values["splits"]["test"]["source"] = describe_file(copy, "test.source.txt").model_dump()
    path.write_text(json.dumps(values))
    split = statistics(copy).splits["test"]
    assert split.unknown_rate == (0.5, 0.0)  # a blank and an unknown character by turns
    assert split.num_tokens[0] == 100 * 9


def test_statistics_are_readable(prepared: tuple[DataConfig, Manifest]) -> None:
    text = format_statistics(statistics(prepared[1].folder))
    assert "2,800 pairs of 3,000 read; dropped: 200 held out" in text
    assert "en to de" in text
    assert "vocabulary   160 pieces" in text
    assert max(len(line) for line in text.splitlines()) < 160


def test_statistics_of_nothing_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="babelray data prepare"):
        statistics(tmp_path)
