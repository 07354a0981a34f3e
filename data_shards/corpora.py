"""Where text comes from: the catalogue of public corpora, the user's own files, the embedded one.

:func:`open_corpus` turns a configuration into a :class:`Corpus`: raw training pairs that can be
read once in order, and the raw held-out texts that come with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from data_shards.archived_corpora import ARCHIVED
from data_shards.archives import (
    Archive,
    ArchivedEntry,
    Split,
    open_heldout,
    open_parts,
    trust,
)
from data_shards.config import DataConfig
from data_shards.download import Expected, fetch
from data_shards.errors import DataError
from data_shards.manifest import RawFile, SplitName, file_sha256
from data_shards.text import check_text, read_pairs, read_text

SPLITS: tuple[SplitName, ...] = ("valid", "test")

EMBEDDED_HELDOUT_PAIRS = 500
_EMBEDDED_LANGUAGES = ("en", "de")

# Endings that are no language codes, though they look like some.
_NO_LANGUAGES = frozenset({"txt", "tsv", "csv", "raw", "tok", "src", "tgt", "trg", "bpe", "out"})


@dataclass(frozen=True)
class CatalogueEntry:
    """A public corpus of a file for each split and language; ``archived_corpora`` has the others.

    Attributes:
        name: what ``data.corpus`` calls it.
        languages: any two different ones make a direction.
        home: URL that the file names are appended to.
        files: for each split, the file's name with ``{language}`` in it.
        sha256: checksum of each file, by name.
        licence: under what terms, in a sentence.
        citation: whom to cite.
    """

    name: str
    languages: tuple[str, ...]
    home: str
    files: Mapping[Split, str]
    sha256: Mapping[str, str]
    licence: str
    citation: str


CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="multi30k",
            languages=("en", "de", "fr"),
            home="https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",
            files={
                "train": "train.{language}.gz",
                "valid": "val.{language}.gz",
                "test": "test_2016_flickr.{language}.gz",
            },
            sha256={
                "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
                "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
                "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
                "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
                "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
                "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
                "test_2016_flickr.en.gz": (
                    "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"
                ),
                "test_2016_flickr.de.gz": (
                    "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"
                ),
                "test_2016_flickr.fr.gz": (
                    "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90"
                ),
            },
            licence=(
                "made for research on captions of Flickr30k; non-commercial (CC BY-NC-SA 4.0 in "
                "the WMT multimodal tasks): see https://github.com/multi30k/dataset"
            ),
            citation="Elliott et al. 2016 (W16-3210); French: Elliott et al. 2017 (W17-4718)",
        ),
    )
}


@dataclass(frozen=True)
class Corpus:
    """Raw text, opened.

    Attributes:
        name: as in ``data.corpus``.
        train: gives raw lines of the training text, each time from the start.
        heldout: the validation and test sets that come with the corpus; a missing one is to be
            held out of the training text.
        licence: in a sentence; for the user's own files it says so.
        raw_files: what was read.
    """

    name: str
    source_language: str
    target_language: str
    licence: str
    train: Callable[[], Iterator[tuple[bytes, bytes]]]
    heldout: Mapping[SplitName, Callable[[], Iterator[tuple[str, str]]]]
    raw_files: tuple[RawFile, ...] = field(default=())


def open_corpus(config: DataConfig, *, progress: Callable[[str], None]) -> Corpus:
    """Find (and fetch, where needed) the raw files that the configuration names.

    Raises:
        DataError: an unknown corpus or language, a missing, unreadable, binary or altered file.
    """
    if config.corpus != "files" and (config.valid_source or config.test_source):
        raise DataError(
            f"data.valid_source and data.test_source belong to data.corpus=files; corpus "
            f"{config.corpus!r} brings its own validation and test sets: leave them out"
        )
    if config.corpus == "embedded":
        return _open_embedded(config)
    if config.corpus == "files":
        return _open_files(config)
    entry = CATALOGUE.get(config.corpus) or ARCHIVED.get(config.corpus)
    if entry is None:
        known = ["embedded", "files", *CATALOGUE, *ARCHIVED]
        close = get_close_matches(config.corpus, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"unknown data.corpus {config.corpus!r}; {hint}known: {', '.join(known)}")
    _check_languages(entry, config)
    if isinstance(entry, ArchivedEntry):
        return _open_archived(entry, config, progress)
    return _open_catalogued(entry, config, progress)


def _open_embedded(config: DataConfig) -> Corpus:
    pair = (config.source, config.target)
    if pair not in (_EMBEDDED_LANGUAGES, _EMBEDDED_LANGUAGES[::-1]):
        raise DataError(
            f"the embedded corpus is English-German: set data.source and data.target to en and de "
            f"(either way round), not {config.source!r} and {config.target!r}"
        )
    turned = pair != _EMBEDDED_LANGUAGES

    def generate_split(split: Split, num_pairs: int) -> Iterator[tuple[str, str]]:
        from data_shards.embedded import generate

        for english, german in generate(split, num_pairs, seed=1):
            yield (german, english) if turned else (english, german)

    def train() -> Iterator[tuple[bytes, bytes]]:
        for source, target in generate_split("train", config.embedded_pairs):
            yield source.encode(), target.encode()

    return Corpus(
        name="embedded",
        source_language=config.source,
        target_language=config.target,
        licence="generated by babelray from a grammar of its own; no rights of others",
        train=train,
        heldout={split: partial(generate_split, split, EMBEDDED_HELDOUT_PAIRS) for split in SPLITS},
    )


def _open_files(config: DataConfig) -> Corpus:
    named: dict[Split, tuple[str | None, str | None]] = {
        "train": (config.source, config.target),
        "valid": (config.valid_source, config.valid_target),
        "test": (config.test_source, config.test_target),
    }
    paths: dict[Split, tuple[Path, Path]] = {}
    raw_files = []
    for split, (source, target) in named.items():
        if source is None or target is None:
            continue
        prefix = "" if split == "train" else f"{split}_"
        for side, name in (("source", source), ("target", target)):
            path = Path(name)
            check_text(path, f"data.{prefix}{side}")
            raw_files.append(
                RawFile(file=name, bytes=path.stat().st_size, sha256=file_sha256(path))
            )
        paths[split] = (Path(source), Path(target))
    return Corpus(
        name="files",
        source_language=_language_of(config.source, "source"),
        target_language=_language_of(config.target, "target"),
        licence="the user's own files",
        train=partial(read_pairs, *paths["train"]),
        heldout={split: partial(read_text, *paths[split]) for split in SPLITS if split in paths},
        raw_files=tuple(raw_files),
    )


def _check_languages(entry: CatalogueEntry | ArchivedEntry, config: DataConfig) -> None:
    for key, language in (("source", config.source), ("target", config.target)):
        if language not in entry.languages:
            raise DataError(
                f"corpus {entry.name} has no language {language!r} (data.{key}); "
                f"it has {', '.join(entry.languages)}"
            )
    if config.source == config.target:
        raise DataError(
            f"data.source and data.target are both {config.source!r}: choose two of "
            f"{', '.join(entry.languages)}"
        )


def _open_catalogued(
    entry: CatalogueEntry, config: DataConfig, progress: Callable[[str], None]
) -> Corpus:
    paths: dict[Split, tuple[Path, Path]] = {}
    raw_files = []
    for split, pattern in entry.files.items():
        names = [pattern.format(language=language) for language in (config.source, config.target)]
        files = [
            _raw_file(
                name,
                entry.home + name,
                Expected(sha256=entry.sha256[name]),
                (entry.name,),
                config,
                progress,
            )
            for name in names
        ]
        for name, path in zip(names, files, strict=True):
            raw_files.append(
                RawFile(file=name, bytes=path.stat().st_size, sha256=entry.sha256[name])
            )
        paths[split] = (files[0], files[1])
    return Corpus(
        name=entry.name,
        source_language=config.source,
        target_language=config.target,
        licence=entry.licence,
        train=partial(read_pairs, *paths["train"]),
        heldout={split: partial(read_text, *paths[split]) for split in SPLITS},
        raw_files=tuple(raw_files),
    )


def _open_archived(
    entry: ArchivedEntry, config: DataConfig, progress: Callable[[str], None]
) -> Corpus:
    paths: dict[str, Path] = {}
    raw_files = []
    for archive in entry.archives:
        path = _raw_file(
            archive.file,
            archive.url,
            archive.expected,
            (entry.folder, entry.name),
            config,
            progress,
        )
        paths[archive.file] = path
        sha256 = _trust(entry, archive, path, config)
        raw_files.append(RawFile(file=archive.file, bytes=path.stat().st_size, sha256=sha256))
    languages = config.source, config.target
    return Corpus(
        name=entry.name,
        source_language=config.source,
        target_language=config.target,
        licence=entry.licence,
        train=open_parts(entry.parts["train"], paths, *languages),
        heldout={
            split: open_heldout(entry.parts[split], paths, *languages)
            for split in SPLITS
            if split in entry.parts
        },
        raw_files=tuple(raw_files),
    )


def _trust(entry: ArchivedEntry, archive: Archive, path: Path, config: DataConfig) -> str:
    """The archive's sha256: the published one, or the one that was seen first."""
    parts = tuple(
        part for parts in entry.parts.values() for part in parts if part.archive == archive.file
    )
    record = config.root / "raw" / entry.folder / f"{archive.file}.sha256"
    return trust(archive, path, parts, record)


def _raw_file(
    name: str,
    url: str,
    expected: Expected,
    folders: tuple[str, ...],
    config: DataConfig,
    progress: Callable[[str], None],
) -> Path:
    """A file of the catalogue as it is expected: from the mirror or from its home.

    ``folders``: what it is kept under, and what else a mirror may have it under.
    """
    mirror = config.mirror
    stored = config.root / "raw" / folders[0] / name
    if mirror is None:
        return fetch([url], stored, expected=expected, progress=progress)
    if re.match(r"https?://", mirror):
        base = mirror.rstrip("/")
        urls = [f"{base}/{name}", *(f"{base}/{folder}/{name}" for folder in folders)]
        return fetch(list(dict.fromkeys(urls)), stored, expected=expected, progress=progress)
    folder = Path(mirror.removeprefix("file://")).expanduser()
    candidates = [folder / name, *(folder / under / name for under in dict.fromkeys(folders))]
    for path in candidates:
        if path.is_file():
            problem = expected.problem(path)
            if problem is not None:
                raise DataError(
                    f"{path}: {problem}. The mirror's copy is "
                    "another version or was altered: replace it, or leave --mirror out"
                )
            return path
    raise DataError(
        f"the mirror has no {name}: looked for {' and '.join(map(str, candidates))}. Put it "
        "there, or leave --mirror out to download it"
    )


def _language_of(path: str, default: str) -> str:
    """``train.en.gz`` is English; a name that tells nothing leaves ``source`` or ``target``."""
    suffix = Path(path.removesuffix(".gz")).suffix.removeprefix(".")
    if suffix in _NO_LANGUAGES or not re.fullmatch(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?", suffix):
        return default
    return suffix
