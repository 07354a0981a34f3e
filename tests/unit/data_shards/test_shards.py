from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_shards import shards
from data_shards.blocks import decode_block
from data_shards.config import EOS_ID, DataConfig
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.shards import prepare, statistics, verify
from data_shards.vocabulary import Vocabulary
from tests.conftest import toy_pairs

REPOSITORY = Path(__file__).resolve().parents[3]


def toy_config(text: tuple[Path, Path], root: Path, **values: object) -> DataConfig:
    """A corpus that is prepared in about 0.2 s."""
    settings = {
        "corpus": "files",
        "source": str(text[0]),
        "target": str(text[1]),
        "root": root,
        "heldout_pairs": 20,
        "vocabulary_size": 120,
        "max_length": 64,
        "tokens_per_step": 2048,
    }
    return DataConfig.model_validate(settings | values)


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    paths = folder / "text.en", folder / "text.de"
    for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pairs(tmp_path_factory.mktemp("text"), toy_pairs(600))


def training_text(manifest: Manifest) -> list[tuple[str, str]]:
    """The pairs in the shards, decoded; checks the end signs on the way."""
    vocabulary = Vocabulary.load(manifest.vocabulary_path)
    pairs: list[tuple[str, str]] = []
    for row in manifest.blocks:
        with Path(manifest.shard_path(int(row["shard"]))).open("rb") as file:
            file.seek(int(row["offset"]))
            block = decode_block(file.read(int(row["bytes"])))
        sides = []
        for side, ids in enumerate((block.source_ids, block.target_ids)):
            cuts = np.cumsum(block.lengths[:, side], dtype=np.int64)[:-1]
            sentences = [part.tolist() for part in np.split(ids, cuts)]
            assert all(sentence.index(EOS_ID) == len(sentence) - 1 for sentence in sentences)
            sides.append(vocabulary.decode(sentences))
        pairs += zip(*sides, strict=True)
    return pairs


def held_out(manifest: Manifest) -> set[tuple[str, str]]:
    texts = [manifest.split_text(split) for split in ("valid", "test")]
    return {pair for text in texts for pair in zip(*text, strict=True)}


def test_every_clean_pair_is_in_the_shards_or_held_out(
    text: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    folder = prepare(toy_config(text, tmp_path), progress=said.append)
    manifest = Manifest.load(folder)
    held = held_out(manifest)
    assert len(held) == 40
    assert training_text(manifest) == [pair for pair in toy_pairs(600) if pair not in held]
    assert verify(folder) == []
    assert [line.split()[0] for line in said] == ["cleaned", "learnt", "wrote"]
    assert "560 left, dropped 40 held_out" in said[0]


def test_dirty_text_is_filtered_and_every_pair_accounted_for(tmp_path: Path) -> None:
    pairs = toy_pairs(400)
    long = " ".join(["ka"] * 70)
    dirty = [
        *pairs,
        ("", "leer"),
        (long, long),
        ("bell \x07", "Glocke"),
        ("a", "ein ganz anderer Satz"),
        ("▁ ▁", "leer"),
        *pairs[:5],
    ]
    source, target = write_pairs(tmp_path, dirty)
    with source.open("ab") as a, target.open("ab") as b:
        a.write(b"caf\xe9\n")
        b.write(b"Kaffee\n")
    folder = prepare(toy_config((source, target), tmp_path))
    filters = Manifest.load(folder).data.filters
    assert filters == {
        "read": 411,
        "not_unicode": 1,
        "control_characters": 1,
        "empty": 2,
        "length_ratio": 1,
        "too_long": 1,
        "duplicate": 5,
        "held_out": 40,
        "kept": 360,
    }
    assert filters["read"] == sum(filters.values()) - filters["read"]


def test_the_longest_pair_kept_is_of_max_length(tmp_path: Path) -> None:
    pairs = toy_pairs(400)
    config = toy_config(write_pairs(tmp_path, pairs), tmp_path, max_length=12)
    manifest = Manifest.load(prepare(config))
    assert manifest.data.filters["too_long"] > 0
    assert manifest.lengths.max() == 12
    vocabulary = Vocabulary.load(manifest.vocabulary_path)
    kept = set(training_text(manifest))
    held = held_out(manifest)
    for pair in pairs:
        longest = 1 + max(len(ids) for ids in vocabulary.encode(pair))
        assert (pair in kept) == (longest <= 12 and pair not in held)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(
    text: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    contents = []
    for root in (tmp_path / "one", tmp_path / "two"):
        folder = prepare(toy_config(text, root, vocabulary_type=kind, vocabulary_size=90))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        contents.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "blocks.npy", "lengths.npy", "manifest.json", "shards/train-000000.tar",
        "test.source.txt", "test.target.txt", "valid.source.txt", "valid.target.txt",
        "vocabulary.model",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_pairs", "block_pairs"),
    [(1, 16), (16 * 512, 16), (29_000, 56), (512 * 1024, 1024), (36_000_000, 1024)],
)
def test_small_corpora_get_small_blocks(num_pairs: int, block_pairs: int) -> None:
    assert shards._choose_block_pairs(num_pairs) == block_pairs


def test_blocks_and_shards_are_of_the_size_asked_for(
    text: tuple[Path, Path], tmp_path: Path
) -> None:
    config = toy_config(text, tmp_path, block_pairs=25, shard_pairs=200)
    manifest = Manifest.load(prepare(config))
    assert manifest.blocks["num_pairs"].tolist() == [25] * 22 + [10]
    assert [shard.num_pairs for shard in manifest.data.shards] == [200, 200, 160]


def test_a_prepared_folder_is_returned_at_once(text: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(text, tmp_path)
    folder = prepare(config)
    before = (folder / "manifest.json").stat()
    said: list[str] = []
    reading_differs = config.model_copy(update={"lanes": 2, "prefetch_steps": 1})
    assert prepare(reading_differs, progress=said.append) == folder
    assert (folder / "manifest.json").stat() == before
    assert said == [f"{folder} is prepared already"]


def test_a_folder_of_another_configuration_is_left_alone(
    text: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    prepare(toy_config(text, tmp_path, dir=folder))
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"vocabulary_size \(there 120, asked for 110\)") as caught:
        prepare(toy_config(text, tmp_path, dir=folder, vocabulary_size=110))
    assert "data.dir" in str(caught.value)
    assert (folder / "manifest.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(text: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    prepare(toy_config(text, tmp_path, dir=folder))  # an empty one is welcome
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(DataError, match="other exists and is not a prepared corpus"):
        prepare(toy_config(text, tmp_path, dir=other))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_text_that_changed_since_is_noticed(tmp_path: Path) -> None:
    pairs = toy_pairs(300)
    source, target = write_pairs(tmp_path, pairs)
    config = toy_config((source, target), tmp_path)
    folder = prepare(config)
    source.touch()
    assert prepare(config) == folder  # touched, but the same
    content = source.read_bytes()
    source.write_bytes(content.swapcase())
    with pytest.raises(DataError, match=r"text\.en has changed since"):
        prepare(config)
    source.write_bytes(content + b"\n")
    with pytest.raises(DataError, match=r"text\.en has changed since"):
        prepare(config)
    source.unlink()
    assert prepare(config) == folder  # a prepared folder travels without its text


def test_a_failure_leaves_nothing_behind(text: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"set data\.vocabulary_size=\d+ or less"):
        prepare(toy_config(text, root, vocabulary_size=50_000))
    assert list(root.iterdir()) == []


def test_files_that_are_not_parallel_are_refused(tmp_path: Path) -> None:
    source, target = write_pairs(tmp_path, toy_pairs(300))
    with target.open("a") as file:
        file.write("one more\n")
    with pytest.raises(DataError, match=r"text\.en has 300 lines, .*text\.de has 301"):
        prepare(toy_config((source, target), tmp_path / "root"))


def test_nothing_left_to_train_on_says_why(tmp_path: Path) -> None:
    text = write_pairs(tmp_path, [("a", "ein langer Satz")] * 30)
    keys = ("valid_source", "valid_target", "test_source", "test_target")
    heldout = dict.fromkeys(keys, str(text[0]))
    with pytest.raises(DataError, match=r"no training pair .* 30 read \(dropped: 30 length_ratio"):
        prepare(toy_config(text, tmp_path / "root", **heldout))


def test_a_folder_that_cannot_be_written_is_one_message(
    text: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot prepare .*data\.root"):
        prepare(toy_config(text, tmp_path / "file" / "root"))


PREPARE = """
import os, signal, sys
from data_shards.config import DataConfig
from data_shards.shards import prepare

config, kill_at = DataConfig.model_validate_json(sys.argv[1]), int(sys.argv[2])
events = 0

def count(event, arguments):
    global events
    if event in ("open", "os.mkdir", "os.rename", "os.remove"):
        events += 1
        if event == "os.rename":
            print(events)
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
prepare(config, progress=lambda message: None)
print(events)
"""


def start(config: DataConfig, kill_at: int = 0) -> subprocess.Popen[str]:
    """Prepare in another process, which kills itself before its ``kill_at``-th file operation."""
    command = [sys.executable, "-c", PREPARE, config.model_dump_json(), str(kill_at)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_looks_finished(
    text: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = toy_config(text, tmp_path / "whole")
    output, _ = start(whole).communicate()
    rename, total = (int(number) for number in output.split())
    expected = (whole.folder() / "manifest.json").read_bytes()

    config = toy_config(text, tmp_path / "killed")
    folder = config.folder()
    for kill_at in (total // 3, total // 2, rename - 2, rename):
        process = start(config, kill_at)
        process.communicate()
        assert process.returncode == -9
        assert not folder.exists()
        with pytest.raises(DataError, match="no prepared corpus"):
            Manifest.load(folder)
    # What the last one left is the work of a dead process, and goes.
    assert list(config.root.glob(".*.partial-*"))
    prepare(config)
    assert (folder / "manifest.json").read_bytes() == expected
    assert verify(folder) == []
    assert list(config.root.iterdir()) == [folder]


def test_two_processes_at_once_prepare_one_folder(text: tuple[Path, Path], tmp_path: Path) -> None:
    config = toy_config(text, tmp_path / "root")
    processes = [start(config) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # The one that came second waited and then found the folder: it renamed nothing.
    assert sorted(len(output.split()) for output in outputs) == [1, 2]
    assert verify(config.folder()) == []
    assert list(config.root.iterdir()) == [config.folder()]


def test_where_another_host_was_first_its_folder_stays(
    text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(text, tmp_path / "root")
    monkeypatch.setattr(shards.fcntl, "flock", lambda file, flags: None)  # no locks over hosts
    others: list[Path] = []

    def finish_first(message: str) -> None:
        if message.startswith("wrote") and not others:
            monkeypatch.setattr(shards.socket, "gethostname", lambda: "other-host")
            others.append(config.folder())
            prepare(config)
            (config.folder() / "mark").touch()

    assert prepare(config, progress=finish_first) == others[0]
    assert (config.folder() / "mark").exists()
    assert list(config.root.iterdir()) == [config.folder()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    # The high-water mark of this program alone: getrusage's includes the process it came from.
    script = PREPARE + "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    peaks = []
    for count in (10_000, 40_000):
        folder = tmp_path / str(count)
        text = write_pairs(folder, toy_pairs(count))
        config = toy_config(text, folder, vocabulary_sample=1000, shard_pairs=10_000)
        command = [sys.executable, "-c", script, config.model_dump_json(), "0"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    # Keeping 30,000 more pairs takes some 6 MiB as text and 10 MiB as lists of ids.
    assert peaks[1] - peaks[0] < 4, f"peak memory in MiB: {peaks}"


def test_multi30k_is_prepared_whole(multi30k: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus="multi30k", mirror=str(multi30k.parent), root=tmp_path)
    folder = prepare(config)
    assert folder.name == f"multi30k-en-de-{config.fingerprint()}"
    assert verify(folder) == []
    stats = statistics(folder)
    assert (stats.num_pairs, stats.vocabulary_size) == (28_995, 8000)
    assert stats.num_blocks >= 512
    assert {name: split.num_pairs for name, split in stats.splits.items()} == {
        "valid": 1014,
        "test": 1000,
    }
    assert max(rate for split in stats.splits.values() for rate in split.unknown_rate) < 1e-4
    recorded = json.loads((folder / "manifest.json").read_text())["raw_files"]
    assert [raw["file"] for raw in recorded][:2] == ["train.en.gz", "train.de.gz"]


def test_the_embedded_corpus_is_prepared(tmp_path: Path) -> None:
    config = DataConfig(
        corpus="embedded", embedded_pairs=600, vocabulary_size=300, source="de", target="en",
        root=tmp_path,
    )  # fmt: skip
    manifest = Manifest.load(prepare(config))
    assert (manifest.source_language, manifest.target_language) == ("de", "en")
    assert manifest.num_pairs > 400
    assert len(manifest.split_text("test")[0]) == 500
