from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_shards import corpora
from data_shards.config import DataConfig
from data_shards.corpora import CATALOGUE, CatalogueEntry, Corpus, open_corpus
from data_shards.errors import DataError


def open_quietly(config: DataConfig) -> Corpus:
    return open_corpus(config, progress=lambda message: None)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A corpus of the catalogue, ``tiny``, whose files lie in the folder returned."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    sums = {}
    for language, words in {"en": b"one\ntwo\n", "de": b"eins\nzwei\n", "fr": b"un\n"}.items():
        for split in ("train", "valid", "test"):
            path = folder / f"{split}.{language}.gz"
            path.write_bytes(gzip.compress(words, mtime=0))
            sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = CatalogueEntry(
        name="tiny",
        languages=("en", "de", "fr"),
        home="http://127.0.0.1:9/unused/",
        files={split: f"{split}.{{language}}.gz" for split in ("train", "valid", "test")},
        sha256=sums,
        licence="none",
        citation="nobody",
    )
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return folder


def config_of(mirror: Path | str | None, root: Path, **values: object) -> DataConfig:
    mirror = None if mirror is None else str(mirror)
    return DataConfig.model_validate({"corpus": "tiny", "mirror": mirror, "root": root} | values)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scheme", ["", "file://", "http"])
def test_a_mirror_is_a_folder_or_a_url_or_has_one_named_after_the_corpus(
    tiny: Path, tmp_path: Path, serve: Callable[[Path], str], scheme: str, nested: bool
) -> None:
    if nested:
        shutil.move(tiny, tmp_path / "parent" / "tiny")
        tiny = tmp_path / "parent"
    mirror = serve(tiny) if scheme == "http" else f"{scheme}{tiny}"
    corpus = open_quietly(config_of(mirror, tmp_path / "root"))
    assert list(corpus.train()) == [(b"one", b"eins"), (b"two", b"zwei")]
    assert {split: list(read()) for split, read in corpus.heldout.items()} == {
        "valid": [("one", "eins"), ("two", "zwei")],
        "test": [("one", "eins"), ("two", "zwei")],
    }
    # Only what came over the network is stored.
    assert (tmp_path / "root" / "raw" / "tiny" / "train.en.gz").exists() == (scheme == "http")


def test_without_a_mirror_the_home_is_asked(
    tiny: Path,
    tmp_path: Path,
    serve: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = CATALOGUE["tiny"]
    moved = CatalogueEntry(**{**vars(entry), "home": serve(tiny) + "/"})
    monkeypatch.setitem(CATALOGUE, "tiny", moved)
    corpus = open_quietly(config_of(None, tmp_path, source="de", target="en"))
    assert next(corpus.train()) == (b"eins", b"one")
    assert (corpus.source_language, corpus.target_language) == ("de", "en")
    names = [raw.file for raw in corpus.raw_files]
    assert names[:2] == ["train.de.gz", "train.en.gz"]
    assert all(raw.sha256 == entry.sha256[raw.file] for raw in corpus.raw_files)


def test_a_mirror_without_the_file_says_where_it_looked(tiny: Path, tmp_path: Path) -> None:
    (tiny / "valid.de.gz").unlink()
    with pytest.raises(DataError) as caught:
        open_quietly(config_of(tiny, tmp_path))
    assert str(tiny / "valid.de.gz") in str(caught.value)
    assert str(tiny / "tiny" / "valid.de.gz") in str(caught.value)


def test_an_altered_file_of_a_mirror_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "train.de.gz"
    path.write_bytes(gzip.compress(b"eins\ndrei\n"))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        open_quietly(config_of(tiny, tmp_path))
    message = str(caught.value)
    assert str(path) in message
    assert CATALOGUE["tiny"].sha256["train.de.gz"] in message
    assert actual in message


def test_wrong_names_are_explained(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data\.corpus 'multi30'; did you mean 'multi30k'"):
        open_quietly(config_of(None, tmp_path, corpus="multi30"))
    with pytest.raises(DataError, match=r"tiny has no language 'es' \(data\.target\).*en, de, fr"):
        open_quietly(config_of(tiny, tmp_path, target="es"))
    with pytest.raises(DataError, match="are both 'de'"):
        open_quietly(config_of(tiny, tmp_path, source="de"))
    with pytest.raises(DataError, match="embedded corpus is English-German"):
        open_quietly(config_of(None, tmp_path, corpus="embedded", target="fr"))
    with pytest.raises(DataError, match="brings its own validation and test sets"):
        open_quietly(config_of(tiny, tmp_path, valid_source="a", valid_target="b"))


def test_the_embedded_corpus_reads_either_way(tmp_path: Path) -> None:
    config = config_of(None, tmp_path, corpus="embedded", embedded_pairs=100)
    corpus = open_quietly(config)
    pairs = list(corpus.train())
    assert len(pairs) == 100

    turned = open_quietly(config.model_copy(update={"source": "de", "target": "en"}))
    assert list(turned.train()) == [(german, english) for english, german in pairs]
    english, german = next(corpus.heldout["test"]())
    assert next(turned.heldout["test"]()) == (german, english)


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("train.en", "en"),
        ("news.de.gz", "de"),
        ("a.pt_BR", "pt_BR"),
        ("a.zh-Hans", "zh-Hans"),
        ("train.txt", "source"),
        ("train.src.gz", "source"),
        ("train", "source"),
    ],
)
def test_the_users_files_tell_their_language_if_they_can(
    tmp_path: Path, name: str, language: str
) -> None:
    (tmp_path / name).write_text("text\n")
    path = str(tmp_path / name)
    corpus = open_quietly(DataConfig(corpus="files", source=path, target=path))
    assert corpus.source_language == language
    assert corpus.heldout == {}


def test_the_users_files_may_have_test_sets(tmp_path: Path) -> None:
    paths = {}
    for name in ("source", "target", "test_source", "test_target"):
        paths[name] = str(tmp_path / name)
        (tmp_path / name).write_text(f"{name} one\n{name} two\n")
    corpus = open_quietly(DataConfig(corpus="files", **paths))
    assert list(corpus.heldout) == ["test"]
    assert list(corpus.heldout["test"]()) == [
        ("test_source one", "test_target one"),
        ("test_source two", "test_target two"),
    ]
    assert {raw.file for raw in corpus.raw_files} == set(paths.values())


def test_a_language_where_a_path_is_meant_is_explained() -> None:
    with pytest.raises(DataError, match=r"data\.source: en is not a file"):
        open_quietly(DataConfig(corpus="files"))


def test_multi30k_is_what_its_catalogue_says(multi30k: Path, tmp_path: Path) -> None:
    for target in ("de", "fr"):
        config = config_of(multi30k.parent, tmp_path, corpus="multi30k", target=target)
        corpus = open_quietly(config)
        assert sum(1 for _ in corpus.train()) == 29_000
        assert [len(list(corpus.heldout[split]())) for split in corpora.SPLITS] == [1014, 1000]
    assert not list(tmp_path.iterdir())
