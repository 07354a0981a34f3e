"""Test sets by name: the corpus' own, and sacreBLEU's from its cache or a mirror."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile

import pytest
from sacrebleu.dataset import DATASETS

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer.run import read_config
from trainer.test_sets import open_test_sets, public_names, read_test_set, reopen

SOURCES = ["A red dog.", "It's &amp; was <b>.", "Three  houses"]
REFERENCES = ["Ein roter Hund.", "Es ist &amp; war <b>.", "Drei Häuser"]


def sgml(lines):
    segments = "".join(f'<seg id="{n}">{line}</seg>\n' for n, line in enumerate(lines, start=1))
    return f'<srcset setid="x">\n<doc docid="d" origlang="en">\n{segments}</doc>\n</srcset>'


@pytest.fixture
def manifest(trained_run, tmp_path):
    """Of a corpus that knows its languages."""
    folder = read_config(trained_run).data.folder()
    copy = shutil.copytree(folder, tmp_path / "corpus")
    file = copy / "manifest.json"
    values = {**json.loads(file.read_text()), "source_language": "en", "target_language": "de"}
    file.write_text(json.dumps(values))
    return Manifest.load(copy)


@pytest.fixture
def wmt14(tmp_path, monkeypatch):
    """sacreBLEU's wmt14/full with a cache of our own and an archive of three sentences."""
    dataset = DATASETS["wmt14/full"]
    source, reference = dataset.langpairs["en-de"]
    archive = tmp_path / "home" / "test-full.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, lines in ((source, SOURCES), (reference, REFERENCES)):
            content = sgml(lines).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    cache = tmp_path / "cache" / "wmt14" / "full"
    monkeypatch.setattr(dataset, "_outdir", str(cache))
    monkeypatch.setattr(dataset, "_rawdir", str(cache / "raw"))
    monkeypatch.setattr(dataset, "md5", [hashlib.md5(archive.read_bytes()).hexdigest()])
    monkeypatch.setattr(dataset, "data", ["http://127.0.0.1:9/wmt14/test-full.tgz"])
    return archive


def test_splits_of_the_corpus(manifest):
    valid, test = open_test_sets(["valid", "test", "valid"], manifest)
    assert (valid.name, test.name) == ("valid", "test")
    assert (len(valid.sources), len(test.sources)) == (20, 30)
    assert (test.sources, test.references) == manifest.split_text("test")
    assert valid.sha256() != test.sha256()


def test_unknown_names_come_in_one_message_with_what_there_is(manifest):
    with pytest.raises(UserError) as caught:
        open_test_sets(["test", "wtm14", "tset"], manifest)
    message = str(caught.value)
    assert "'wtm14' (did you mean wmt14" in message
    assert "'tset' (did you mean test" in message
    assert "the run's corpus has valid, test; sacreBLEU has, for en-de, " in message
    assert "wmt14/full" in message
    assert "\n" not in message


def test_a_test_set_of_other_languages(manifest):
    with pytest.raises(
        UserError, match=r"'wmt16/tworefs' for en-de \(sacreBLEU has it for en-fi\)"
    ):
        open_test_sets(["wmt16/tworefs"], manifest)


def test_public_names_follow_the_languages(manifest, trained_run):
    assert {"wmt14", "wmt14/full", "wmt19"} <= set(public_names(manifest))
    assert "wmt16/tworefs" not in public_names(manifest)


def test_from_a_mirror_and_then_from_the_cache(wmt14, manifest):
    (found,) = open_test_sets(["wmt14/full"], manifest, mirror=str(wmt14.parent))
    assert found.sources == ["A red dog.", "It's &amp; was <b>.", "Three houses"]
    assert found.references == REFERENCES
    assert found.stem == "wmt14-full"
    wmt14.unlink()
    assert open_test_sets(["wmt14/full"], manifest) == [found]
    assert reopen("wmt14/full", None, manifest) == found


def test_an_archive_put_into_the_cache_by_hand(wmt14, manifest, tmp_path):
    place = tmp_path / "cache" / "wmt14" / "full" / "raw" / "wmt14_full.test-full.tgz"
    place.parent.mkdir(parents=True)
    shutil.copy(wmt14, place)
    assert open_test_sets(["wmt14/full"], manifest)[0].references == REFERENCES


def test_what_cannot_be_fetched_says_what_to_put_where(wmt14, manifest, tmp_path):
    with pytest.raises(UserError) as caught:
        open_test_sets(["wmt14/full"], manifest)
    message = str(caught.value)
    place = tmp_path / "cache" / "wmt14" / "full" / "raw" / "wmt14_full.test-full.tgz"
    for part in (place, "http://127.0.0.1:9/wmt14/test-full.tgz", "--mirror", "refused"):
        assert str(part) in message
    assert not place.exists()


def test_a_mirror_without_the_file(wmt14, manifest, tmp_path):
    with pytest.raises(UserError, match=r"file:///.*/empty/test-full\.tgz cannot be fetched"):
        open_test_sets(["wmt14/full"], manifest, mirror=str(tmp_path / "empty"))


def test_an_altered_archive(wmt14, manifest):
    wmt14.write_bytes(wmt14.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is not the archive of wmt14/full \(expected md5"):
        open_test_sets(["wmt14/full"], manifest, mirror=str(wmt14.parent))


def test_a_stored_evaluations_text_is_found_again(manifest, tmp_path):
    files = tmp_path / "a.en", tmp_path / "a.de"
    files[0].write_text("one\n")
    files[1].write_text("eins\n")
    assert reopen("a.en", files, None) == read_test_set(*files)
    assert reopen("valid", None, manifest).name == "valid"
    assert reopen("valid", None, None) is None
