from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from data_shards.errors import DataError
from data_shards.manifest import Manifest
from trainer.breakdown import words
from trainer.frequency import COUNTS_NAME, training_words


@pytest.fixture
def manifest(prepared, tmp_path):
    fresh = shutil.ignore_patterns(COUNTS_NAME)  # as an evaluation may have left it
    folder = shutil.copytree(prepared[1].folder, tmp_path / "corpus", ignore=fresh)
    return Manifest.load(folder)


def test_counts_are_those_of_the_corpus_text(manifest, toy_text):
    # Pieces joined to words. A pair is trained on or held out; duplicates are dropped.
    found = training_words(manifest)
    held_out = {
        pair
        for split in manifest.data.splits
        for pair in zip(*manifest.split_text(split), strict=True)
    }
    lines = [path.read_text().splitlines() for path in toy_text]
    kept = dict.fromkeys(pair for pair in zip(*lines, strict=True) if pair not in held_out)
    expected = Counter(word for _, target in kept for word in words(target))
    assert found.counted_pairs == found.num_pairs == manifest.num_pairs == len(kept)
    assert found.counts == dict(expected)
    assert found.note == f"counted in all {manifest.num_pairs:,} training pairs"


def test_the_second_time_they_are_read_from_the_file_beside_the_corpus(manifest):
    first = training_words(manifest)
    shutil.rmtree(manifest.folder / "shards")
    assert training_words(manifest) == first


def test_a_file_of_another_corpus_is_not_believed(manifest):
    first = training_words(manifest)
    file = manifest.folder / COUNTS_NAME
    values = json.loads(file.read_text())
    for wrong in ({**values, "manifest": "0" * 64, "counts": {"x": 1}}, [], {"format": 1}):
        file.write_text(json.dumps(wrong))
        assert training_words(manifest) == first


def test_a_large_corpus_is_sampled_evenly_and_says_so(manifest):
    found = training_words(manifest, sampled_pairs=manifest.num_pairs // 4)
    share = found.counted_pairs / manifest.num_pairs
    assert 0.2 < share < 0.3
    assert "in a sample of" in found.note
    everything = training_words(manifest)
    common = max(everything.counts, key=everything.counts.__getitem__)
    assert found.counts[common] / everything.counts[common] == pytest.approx(share, rel=0.3)


def test_remote_shards_are_not_fetched_for_it(manifest):
    file = manifest.folder / "manifest.json"
    values = json.loads(file.read_text())
    for shard in values["shards"]:
        shard["file"] = f"http://127.0.0.1:9/{shard['file']}"
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="remote"):
        training_words(Manifest.load(manifest.folder))


def test_a_damaged_shard_is_told(manifest):
    for shard in (manifest.folder / "shards").iterdir():
        shard.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        training_words(manifest)
