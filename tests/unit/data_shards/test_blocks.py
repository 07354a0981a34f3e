from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.autodecode import Decoder
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_shards.blocks import (
    ArrayWriter,
    Block,
    ShardWriter,
    decode_block,
    encode_block,
    id_dtype,
)

SENTENCE = st.lists(st.integers(3, 999), max_size=5).map(lambda ids: [*ids, 2])


def make_pairs(count: int) -> list[tuple[list[int], list[int]]]:
    generator = random.Random(5)

    def sentence() -> list[int]:
        return [*generator.choices(range(4, 500), k=generator.randint(1, 9)), 2]

    return [(sentence(), sentence()) for _ in range(count)]


def write(folder: Path, pairs: list[tuple[list[int], list[int]]], **values: int) -> ShardWriter:
    sizes = {"vocabulary_size": 500, "block_pairs": 8, "shard_pairs": 30} | values
    writer = ShardWriter(folder, **sizes)
    for source, target in pairs:
        writer.add(source, target)
    writer.close()
    return writer


def sentences(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=8))
@settings(max_examples=30)
def test_a_block_is_read_as_it_was_written(pairs: list[tuple[list[int], list[int]]]) -> None:
    block = Block(
        "000000007",
        np.array([piece for source, _ in pairs for piece in source], dtype="<u2"),
        np.array([piece for _, target in pairs for piece in target], dtype="<u2"),
        np.array([[len(source), len(target)] for source, target in pairs], dtype="<u2"),
    )
    content = encode_block(block)
    assert len(content) % 512 == 0
    read = decode_block(content)
    assert read.key == "000000007"
    assert sentences(read.source_ids, read.lengths[:, 0]) == [source for source, _ in pairs]
    assert sentences(read.target_ids, read.lengths[:, 1]) == [target for _, target in pairs]


def test_what_is_not_one_block_is_refused(tmp_path: Path) -> None:
    write(tmp_path, make_pairs(16))
    blocks = np.load(tmp_path / "blocks.npy")
    content = (tmp_path / "shards" / "train-000000.tar").read_bytes()
    size = int(blocks["bytes"][0])
    for wrong in (b"", bytes(512), content[: size // 2], content[512:size], content[: 2 * size]):
        with pytest.raises(ValueError, match=r"not a tar|expected the members|EOF|file"):
            decode_block(wrong)


def test_the_index_finds_every_block(tmp_path: Path) -> None:
    pairs = make_pairs(75)
    writer = write(tmp_path, pairs)
    blocks, lengths = np.load(tmp_path / "blocks.npy"), np.load(tmp_path / "lengths.npy")
    assert lengths.tolist() == [[len(source), len(target)] for source, target in pairs]
    assert lengths.dtype == np.uint16
    assert blocks["num_pairs"].tolist() == [8] * 9 + [3]
    assert blocks["first_pair"].tolist() == list(range(0, 75, 8))
    # A shard ends with the block that brings it to 30 pairs or more.
    assert blocks["shard"].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert [(shard.num_blocks, shard.num_pairs) for shard in writer.shards] == [
        (4, 32),
        (4, 32),
        (2, 11),
    ]
    read: list[tuple[list[int], list[int]]] = []
    for index, row in enumerate(blocks):
        shard = (tmp_path / writer.shards[row["shard"]].file).read_bytes()
        content = shard[int(row["offset"]) :][: int(row["bytes"])]
        assert hashlib.sha256(content).hexdigest() == row["sha256"].decode()
        block = decode_block(content)
        assert block.key == f"{index:09d}"
        read += zip(
            sentences(block.source_ids, block.lengths[:, 0]),
            sentences(block.target_ids, block.lengths[:, 1]),
            strict=True,
        )
    assert read == pairs
    assert writer.num_tokens == lengths.sum(axis=0).tolist()


def test_shards_are_plain_tars_that_webdataset_reads(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    writer = write(tmp_path, pairs)
    urls = []
    for shard in writer.shards:
        path = tmp_path / shard.file
        content = path.read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 3 * shard.num_blocks
        urls.append(str(path))
    decode = Decoder([])
    samples = []
    for url in urls:
        # Opened here: WebDataset's own opener leaves closing the file to the collector.
        with Path(url).open("rb") as file:
            stream = tar_file_expander([{"url": url, "stream": file}])
            samples += [decode(sample) for sample in group_by_keys(stream)]
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(5)]
    first = samples[0]
    assert sentences(first["source.npy"], first["lengths.npy"][:, 0]) == [
        source for source, _ in pairs[:8]
    ]


def test_a_blocks_byte_range_can_be_read_as_a_tar_of_its_own(tmp_path: Path) -> None:
    writer = write(tmp_path, make_pairs(40))
    row = np.load(tmp_path / "blocks.npy")[2]
    shard = (tmp_path / writer.shards[0].file).read_bytes()
    content = shard[int(row["offset"]) :][: int(row["bytes"])]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == [
            "000000002.source.npy",
            "000000002.target.npy",
            "000000002.lengths.npy",
        ]


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_the_smallest_type(tmp_path: Path, size: int, dtype: str) -> None:
    assert id_dtype(size) == np.dtype(dtype)
    writer = write(tmp_path, [([size - 1, 2], [4, 2])], vocabulary_size=size)
    row = np.load(tmp_path / "blocks.npy")[0]
    shard = (tmp_path / writer.shards[0].file).read_bytes()
    block = decode_block(shard[: int(row["bytes"])])
    assert block.source_ids.tolist() == [size - 1, 2]
    assert block.target_ids.dtype == np.dtype(dtype)


def test_an_array_grows_in_parts(tmp_path: Path) -> None:
    writer = ArrayWriter(tmp_path / "a.npy", np.dtype("<u2"), (2,))
    rows = np.arange(30, dtype="<u2").reshape(15, 2)
    for part in (rows[:4], rows[4:4], rows[4:]):
        writer.append(part)
    writer.close()
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
