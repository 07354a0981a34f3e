"""Corpora in archives, on small made-up ones of the real ones' structure."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from data_shards.archived_corpora import ARCHIVED, IWSLT14, WMT14_EN_DE, WMT14_EN_FR
from data_shards.archives import Archive, ArchivedEntry, Part, open_heldout
from data_shards.config import DataConfig
from data_shards.corpora import Corpus, open_corpus
from data_shards.download import Expected
from data_shards.errors import DataError

SGM = '<refset trglang="x">\n<doc docid="d">\n<p>\n{segments}</p>\n</doc>\n</refset>\n'


def sgm(*sentences: str) -> bytes:
    segments = "".join(f'<seg id="{n}">{s}</seg>\n' for n, s in enumerate(sentences, start=1))
    return SGM.format(segments=segments).encode()


def make_archive(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar, gzipped if its name says so; folders have entries of their own, as in WMT's."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        folders = {name.rpartition("/")[0] for name in members} - {""}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


WMT_MEMBERS: dict[str, dict[str, bytes]] = {
    "training-parallel-europarl-v7.tgz": {
        "training/europarl-v7.cs-en.cs": b"jiny\n",
        "training/europarl-v7.de-en.de": b"Wiederaufnahme\nzwei\n",
        "training/europarl-v7.de-en.en": b"Resumption\ntwo\n",
        "training/europarl-v7.fr-en.en": b"Resumption\n",
        "training/europarl-v7.fr-en.fr": b"Reprise\n",
    },
    "training-parallel-commoncrawl.tgz": {
        "commoncrawl.de-en.de": "Straße\n".encode(),
        "commoncrawl.de-en.en": b"street\n",
        "commoncrawl.de-en.annotation": b"http://example.org\n",
        "commoncrawl.fr-en.en": b"street\n",
        "commoncrawl.fr-en.fr": b"rue\n",
    },
    "training-parallel-nc-v9.tgz": {
        "training/news-commentary-v9.de-en.de": b"Gold\n",
        "training/news-commentary-v9.de-en.en": b"gold\n",
        "training/news-commentary-v9.fr-en.en": b"gold\n",
        "training/news-commentary-v9.fr-en.fr": b"or\n",
    },
    "training-parallel-un.tgz": {
        "un/undoc.2000.fr-en.en": b"resolution\n",
        "un/undoc.2000.fr-en.fr": "résolution\n".encode(),
    },
    "training-giga-fren.tar": {
        "giga-fren.release2.fixed.en.gz": gzip.compress(b"giant\n"),
        "giga-fren.release2.fixed.fr.gz": gzip.compress("géant\n".encode()),
    },
    "test.tgz": {
        "test/newstest2013-src.en.sgm": sgm("A valid  sentence", "AT&T and &quot;you&quot;"),
        "test/newstest2013-src.de.sgm": sgm("Ein gültiger Satz", "AT&T und &quot;du&quot;"),
        "test/newstest2013-src.fr.sgm": sgm("Une phrase", "AT&T et &quot;vous&quot;"),
    },
    "test-full.tgz": {
        "test-full/newstest2014-deen-src.en.sgm": sgm("A test"),
        "test-full/newstest2014-deen-ref.de.sgm": sgm("Ein Test"),
        "test-full/newstest2014-deen-src.de.sgm": sgm("Ein Test"),
        "test-full/newstest2014-deen-ref.en.sgm": sgm("A test, back"),
        "test-full/newstest2014-fren-src.en.sgm": sgm("A test"),
        "test-full/newstest2014-fren-ref.fr.sgm": sgm("Un test"),
    },
}

TALK_TAGS = "<url>http://ted.com/1</url>\n<talkid>1</talkid>\n<keywords>talks, x</keywords>\n"
IWSLT_MEMBERS = {
    "de-en.tgz": {
        "de-en/train.tags.de-en.de": (
            TALK_TAGS + "<title>Eine Überschrift</title>\n<description>TED Talk</description>\n"
            " Vielen Dank. \n<reviewer></reviewer>\nBis < bald.\n"
        ).encode(),
        "de-en/train.tags.de-en.en": (
            TALK_TAGS + "<title>A title</title>\n<description>TED talk</description>\n"
            " Thank you. \n<reviewer></reviewer>\nSee < you.\n"
        ).encode(),
        **{
            f"de-en/IWSLT14.{talks}.de-en.{language}.xml": sgm(f" {talks} {language} ")
            for talks in (
                "TED.dev2010",
                "TEDX.dev2012",
                "TED.tst2010",
                "TED.tst2011",
                "TED.tst2012",
            )
            for language in ("de", "en")
        },
    }
}


def served(entry: ArchivedEntry, home: str) -> ArchivedEntry:
    """The entry with another home, and nothing known of its files."""
    archives = tuple(
        Archive(f"{home}/{archive.file}", Expected(), "nobody") for archive in entry.archives
    )
    return replace(entry, archives=archives)


def known(entry: ArchivedEntry, folder: Path) -> ArchivedEntry:
    """The entry with the checksums of the files in a folder."""
    archives = tuple(
        replace(
            archive,
            expected=Expected(
                sha256=hashlib.sha256((folder / archive.file).read_bytes()).hexdigest(),
                num_bytes=(folder / archive.file).stat().st_size,
            ),
        )
        for archive in entry.archives
    )
    return replace(entry, archives=archives)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with made-up archives of all three corpora."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, members in (WMT_MEMBERS | IWSLT_MEMBERS).items():
        make_archive(folder / name, members)
    return folder


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[ArchivedEntry], ArchivedEntry]:
    """Put an entry into the catalogue in place of its namesake."""

    def put(entry: ArchivedEntry) -> ArchivedEntry:
        monkeypatch.setitem(ARCHIVED, entry.name, entry)
        return entry

    return put


Use = Callable[[ArchivedEntry], ArchivedEntry]
Serve = Callable[[Path], str]


def open_(
    entry: ArchivedEntry, root: Path, mirror: Path | str | None = None, **more: str
) -> Corpus:
    source, target = entry.languages
    config = DataConfig.model_validate(
        {"corpus": entry.name, "source": source, "target": target, "root": root}
        | {"mirror": None if mirror is None else str(mirror)}
        | more
    )
    return open_corpus(config, progress=lambda message: None)


def test_the_parts_follow_one_another_in_a_fixed_order(
    files: Path, serve: Serve, use: Use, tmp_path: Path
) -> None:
    entry = use(known(served(WMT14_EN_DE, serve(files)), files))
    corpus = open_(entry, tmp_path)
    german = [target.decode() for _, target in corpus.train()]
    assert german == ["Wiederaufnahme", "zwei", "Straße", "Gold"]
    assert list(corpus.train())[1] == (b"two", b"zwei")
    assert list(corpus.heldout["valid"]()) == [
        ("A valid sentence", "Ein gültiger Satz"),
        ("AT&T and &quot;you&quot;", "AT&T und &quot;du&quot;"),
    ]
    assert list(corpus.heldout["test"]()) == [("A test", "Ein Test")]
    assert [raw.file for raw in corpus.raw_files] == [a.file for a in WMT14_EN_DE.archives]
    assert (tmp_path / "raw" / "wmt14" / "test-full.tgz").is_file()


def test_the_other_direction_has_its_own_test_set(files: Path, use: Use, tmp_path: Path) -> None:
    corpus = open_(use(known(WMT14_EN_DE, files)), tmp_path, files, source="de", target="en")
    assert next(corpus.train()) == (b"Wiederaufnahme", b"Resumption")
    assert list(corpus.heldout["test"]()) == [("Ein Test", "A test, back")]


@pytest.mark.parametrize("nested", ["", "wmt14", "wmt14-en-fr"])
def test_french_comes_from_five_archives_of_a_mirror(
    files: Path, use: Use, tmp_path: Path, nested: str
) -> None:
    mirror = files
    if nested:
        mirror = tmp_path / "mirror"
        mirror.mkdir()
        files.rename(mirror / nested)
        files = mirror / nested
    corpus = open_(use(known(WMT14_EN_FR, files)), tmp_path / "root", mirror)
    assert [target.decode() for _, target in corpus.train()] == [
        "Reprise", "rue", "résolution", "or", "géant",
    ]  # fmt: skip
    assert next(corpus.heldout["test"]()) == ("A test", "Un test")
    assert not (tmp_path / "root").exists()  # nothing was downloaded, nothing had to be trusted


def test_talks_leave_out_what_is_about_them(files: Path, use: Use, tmp_path: Path) -> None:
    corpus = open_(use(known(IWSLT14, files)), tmp_path, files)
    assert list(corpus.train()) == [
        ("Eine Überschrift".encode(), b"A title"),
        (b"TED Talk", b"TED talk"),
        (b"Vielen Dank.", b"Thank you."),
        (b"Bis < bald.", b"See < you."),
    ]
    assert [source for source, _ in corpus.heldout["test"]()] == [
        "TED.dev2010 de", "TEDX.dev2012 de", "TED.tst2010 de", "TED.tst2011 de", "TED.tst2012 de",
    ]  # fmt: skip
    assert "valid" not in corpus.heldout  # it is held out of the training text


def test_what_nobody_has_published_is_trusted_once(
    files: Path, serve: Serve, use: Use, tmp_path: Path
) -> None:
    entry = use(served(IWSLT14, serve(files)))
    seen = hashlib.sha256((files / "de-en.tgz").read_bytes()).hexdigest()
    assert open_(entry, tmp_path).raw_files[0].sha256 == seen
    record = tmp_path / "raw" / "iwslt14" / "de-en.tgz.sha256"
    assert record.read_text() == f"{seen}  de-en.tgz\n"

    # Another one comes later, from a mirror as well as from its home.
    make_archive(files / "de-en.tgz", {**IWSLT_MEMBERS["de-en.tgz"], "de-en/README": b"new"})
    with pytest.raises(DataError, match=f"first one seen here was {seen}") as caught:
        open_(entry, tmp_path, files)
    assert str(record) in str(caught.value)
    (tmp_path / "raw" / "iwslt14" / "de-en.tgz").unlink()
    with pytest.raises(DataError, match=f"first one seen here was {seen}"):
        open_(entry, tmp_path)
    record.unlink()
    assert open_(entry, tmp_path).raw_files[0].sha256 != seen


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Expected(sha256="0" * 64), r"expected sha256 0{64}, {} [0-9a-f]{64}"),
        (Expected(md5="0" * 32), r"expected md5 0{32}, {} [0-9a-f]{32}"),
        (Expected(num_bytes=7), r"expected 7 bytes, {} \d+"),
    ],
)
def test_another_file_than_the_published_one_is_refused(
    files: Path,
    serve: Serve,
    use: Use,
    tmp_path: Path,
    expected: Expected,
    message: str,
) -> None:
    entry = served(IWSLT14, serve(files))
    entry = use(replace(entry, archives=(replace(entry.archives[0], expected=expected),)))
    with pytest.raises(DataError, match=message.replace("{}", "received", 1)):
        open_(entry, tmp_path)
    assert not list((tmp_path / "raw" / "iwslt14").iterdir())
    with pytest.raises(DataError, match=message.replace("{}", "found", 1) + r"\. The mirror's"):
        open_(entry, tmp_path, files)


def test_a_known_md5_is_checked_and_the_sha256_kept(files: Path, use: Use, tmp_path: Path) -> None:
    content = (files / "de-en.tgz").read_bytes()
    archive = replace(IWSLT14.archives[0], expected=Expected(md5=hashlib.md5(content).hexdigest()))
    corpus = open_(use(replace(IWSLT14, archives=(archive,))), tmp_path, files)
    assert corpus.raw_files[0].sha256 == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "raw" / "iwslt14" / "de-en.tgz.sha256").is_file()


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_archive_is_never_trusted(
    files: Path, use: Use, tmp_path: Path, kept: float
) -> None:
    path = files / "de-en.tgz"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))] or b"<html>log in first</html>")
    entry = use(replace(served(IWSLT14, "http://127.0.0.1:9")))
    with pytest.raises(DataError, match=r"cannot be read as an archive .*damaged") as caught:
        open_(entry, tmp_path, files)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "raw").exists()


def _cut_behind_last_member(path: Path) -> bytes:
    """A tar without what tells its end."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    return path.read_bytes()[:end]


@pytest.mark.parametrize("damage", ["cut", "sum", "plain"])
def test_an_archive_that_ends_before_its_end_is_never_trusted(
    files: Path, use: Use, tmp_path: Path, damage: str
) -> None:
    path = files / "de-en.tgz"
    # All members are there; the checksum behind them is missing or wrong, or the tar has no end.
    if damage == "plain":
        path.write_bytes(_cut_behind_last_member(unpacked(path)))
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-8] + (b"" if damage == "cut" else b"\1" * 8))
    entry = use(served(IWSLT14, "http://127.0.0.1:9"))
    with pytest.raises(DataError, match=r"cannot be read as an archive .*damaged"):
        open_(entry, tmp_path, files)
    assert not (tmp_path / "raw").exists()


def test_a_tar_that_is_not_compressed_is_trusted(files: Path, use: Use, tmp_path: Path) -> None:
    unpacked(files / "de-en.tgz").replace(files / "de-en.tgz")
    corpus = open_(use(served(IWSLT14, "http://127.0.0.1:9")), tmp_path, files)
    assert next(corpus.train())[1] == b"A title"


def unpacked(path: Path) -> Path:
    """The gzipped tar without its compression, beside it."""
    plain = path.with_suffix(".tar")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return plain


@pytest.mark.parametrize("half", [b"", b"0123abc", b"\xff\xfe", b"g" * 64])
def test_half_a_record_is_none(files: Path, use: Use, tmp_path: Path, half: bytes) -> None:
    record = tmp_path / "raw" / "iwslt14" / "de-en.tgz.sha256"
    record.parent.mkdir(parents=True)
    record.write_bytes(half)
    open_(use(served(IWSLT14, "http://127.0.0.1:9")), tmp_path, files)
    seen = hashlib.sha256((files / "de-en.tgz").read_bytes()).hexdigest()
    assert record.read_text() == f"{seen}  de-en.tgz\n"
    assert list(record.parent.iterdir()) == [record]


def test_a_part_of_what_has_no_checksum_is_not_taken_up(
    files: Path, serve: Serve, use: Use, tmp_path: Path
) -> None:
    part = tmp_path / "raw" / "iwslt14" / "de-en.tgz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of another file")
    corpus = open_(use(served(IWSLT14, serve(files))), tmp_path)
    assert next(corpus.train()) == ("Eine Überschrift".encode(), b"A title")


def test_a_member_that_is_missing_is_named(files: Path, use: Use, tmp_path: Path) -> None:
    members = dict(WMT_MEMBERS["training-parallel-nc-v9.tgz"])
    del members["training/news-commentary-v9.de-en.de"]
    make_archive(files / "training-parallel-nc-v9.tgz", members)
    corpus = open_(use(known(WMT14_EN_DE, files)), tmp_path, files)
    with pytest.raises(DataError, match=r"no member news-commentary-v9\.de-en\.de .*such as"):
        list(corpus.train())
    # Where the checksum says nothing, this is seen before anything is trusted.
    make_archive(files / "de-en.tgz", {"de-en/README": b"read me"})
    with pytest.raises(DataError, match="no member like"):
        open_(use(served(IWSLT14, "http://127.0.0.1:9")), tmp_path, files)
    assert not (tmp_path / "raw").exists()


def test_sides_that_differ_in_length_are_named(files: Path, use: Use, tmp_path: Path) -> None:
    name = "training-parallel-commoncrawl.tgz"
    members = {**WMT_MEMBERS[name], "commoncrawl.de-en.de": b"eins\nzwei\n"}
    make_archive(files / name, members)
    corpus = open_(use(known(WMT14_EN_DE, files)), tmp_path, files)
    with pytest.raises(DataError, match=r"commoncrawl\.de-en\.en in .* has 1 lines, .*2"):
        list(corpus.train())


def test_segments_that_do_not_end_are_damage(files: Path, use: Use, tmp_path: Path) -> None:
    members = dict(WMT_MEMBERS["test-full.tgz"])
    members["test-full/newstest2014-deen-ref.de.sgm"] += b'<seg id="2">cut'
    make_archive(files / "test-full.tgz", members)
    corpus = open_(use(known(WMT14_EN_DE, files)), tmp_path, files)
    with pytest.raises(DataError, match="2 segments begin, 1 end"):
        list(corpus.heldout["test"]())


def test_a_line_of_a_test_set_is_named_by_member_and_its_number_there(
    files: Path, tmp_path: Path
) -> None:
    members = {
        "a.de": b"eins\nzwei\n",
        "a.en": b"one\ntwo\n",
        "b.de": b"drei\n\xff\n",
        "b.en": b"three\nfour\n",
    }
    make_archive(files / "two.tgz", members)
    parts = (Part("two.tgz", "a.{language}"), Part("two.tgz", "b.{language}"))
    read = open_heldout(parts, {"two.tgz": files / "two.tgz"}, "de", "en")
    with pytest.raises(DataError) as caught:
        list(read())
    assert f"b.de in {files / 'two.tgz'}, line 2: not UTF-8" in str(caught.value)
    assert list(islice(read(), 3))[2] == ("drei", "three")


def test_a_language_that_the_corpus_has_not_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wmt14-en-de has no language 'fr' \(data\.target\)"):
        open_(WMT14_EN_DE, tmp_path, target="fr")


def test_segments_are_read_as_sacrebleu_reads_them(files: Path, tmp_path: Path) -> None:
    from sacrebleu.dataset.fake_sgml import FakeSGMLDataset

    from data_shards.archives import open_parts

    text = WMT_MEMBERS["test.tgz"]["test/newstest2013-src.de.sgm"]
    raw, plain = tmp_path / "raw.sgm", tmp_path / "plain.txt"
    raw.write_bytes(text)
    FakeSGMLDataset("x")._convert_format(str(raw), str(plain))
    ours = open_parts(WMT14_EN_DE.parts["valid"], {"test.tgz": files / "test.tgz"}, "de", "en")
    assert [source.decode() for source, _ in ours()] == plain.read_text().splitlines()


def test_the_catalogue_is_of_one_piece() -> None:
    from sacrebleu.dataset import DATASETS

    for entry in ARCHIVED.values():
        needed = {part.archive for parts in entry.parts.values() for part in parts}
        assert needed == {archive.file for archive in entry.archives}
        assert set(entry.statistics.mean_pieces) == set(entry.languages)
        for archive in entry.archives:
            assert archive.expected.has_checksum
            assert archive.checksum_source
    # Where sacreBLEU knows an archive, its checksum is the same.
    archives = {archive.file: archive for archive in WMT14_EN_DE.archives}
    for name, file in (("wmt13", "test.tgz"), ("wmt14/full", "test-full.tgz")):
        assert archives[file].expected.md5 == DATASETS[name].md5[0]


def test_a_corpus_is_prepared_from_its_archives(files: Path, use: Use, tmp_path: Path) -> None:
    from data_shards.manifest import Manifest
    from data_shards.shards import prepare

    talks = [f"{n} talks and {n * n} more {'abcdefg'[n % 7]}" for n in range(300)]
    members = dict(IWSLT_MEMBERS["de-en.tgz"])
    for language in ("de", "en"):
        text = "".join(f"{line} {language}\n" for line in talks)
        members[f"de-en/train.tags.de-en.{language}"] = (TALK_TAGS + text).encode()
    make_archive(files / "de-en.tgz", members)
    use(known(IWSLT14, files))
    config = DataConfig.model_validate(
        {
            "corpus": "iwslt14", "source": "de", "target": "en", "root": tmp_path,
            "mirror": str(files), "vocabulary_size": 60, "heldout_pairs": 20, "max_length": 64,
        }
    )  # fmt: skip
    manifest = Manifest.load(prepare(config, progress=lambda line: None))
    assert manifest.num_pairs == 280
    assert {name: split.num_pairs for name, split in manifest.data.splits.items()} == {
        "valid": 20,
        "test": 5,
    }
    (raw,) = manifest.data.raw_files
    assert raw.file == "de-en.tgz"
    assert raw.sha256 == hashlib.sha256((files / "de-en.tgz").read_bytes()).hexdigest()
