"""Whether the corpus of a configuration is there, or can be had: a quick look."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluster.checks import Check
from cluster.doctor.limits import TimedOutError, limited, number
from cluster.doctor.machine import existing
from data_shards.config import DataConfig
from data_shards.corpora import CATALOGUE, CatalogueEntry
from data_shards.errors import DataError
from data_shards.manifest import ManifestData, read_manifest

_PATIENCE_S = 8.0
_TIMEOUT_S = (3.0, 4.0)

# What preparing takes beside the text itself: the text once more, as ids and as held-out sets, and
# what is spooled meanwhile; gzip makes text about a third as large.
_TIMES, _TIMES_PACKED = 3, 9
_EMBEDDED_PAIR_BYTES = 400


def checks(config: DataConfig) -> Iterator[Check]:
    """The prepared folder if there is one, else what it would be made from."""
    folder = config.folder()
    try:
        limited(_PATIENCE_S, folder.exists)
    except TimedOutError:
        mend = "see whether its server is up, or mount it again"
        yield Check("corpus", "failure", f"{folder}: no answer within {_PATIENCE_S:g} s", mend)
        return
    if folder.exists() and any(folder.iterdir()):
        yield _prepared(folder, config)
    else:
        yield from _raw(folder, config)


def _prepared(folder: Path, config: DataConfig) -> Check:
    again = "remove the folder and run babelray data prepare, or set data.dir to another one"
    try:
        data, _ = read_manifest(folder)
    except DataError as error:
        return Check("corpus", "failure", str(error), again)
    if data.fingerprint != config.fingerprint():
        found = f"{folder} was prepared with another configuration"
        return Check("corpus", "failure", found, again)
    wrong = _wrong_sizes(folder, data, shards=config.shards_url is None)
    if wrong:
        more = f" and {len(wrong) - 2} more files" if len(wrong) > 2 else ""
        return Check("corpus", "failure", "; ".join(wrong[:2]) + more, again)
    num_bytes = sum(shard.bytes for shard in data.shards)
    there, option = "all there by size", ""
    if config.shards_url is not None:
        there = f"which lie at {config.shards_url}; the other files are there by size"
        option = f" --shards-url {config.shards_url}"
    found = (
        f"{folder}: {data.num_pairs:,} pairs in {len(data.shards)} shards ({number(num_bytes)}B), "
        f"{there} (babelray data verify {folder}{option} reads them)"
    )
    return Check("corpus", "ok", found)


def _wrong_sizes(folder: Path, data: ManifestData, *, shards: bool) -> list[str]:
    """Files that are missing or of another size than the manifest says."""
    sides = [side for entry in data.splits.values() for side in (entry.source, entry.target)]
    entries = [data.vocabulary, data.index.lengths, data.index.blocks, *sides]
    if shards:
        entries = [*data.shards, *entries]
    wrong = []
    for entry in entries:
        try:
            size = (folder / entry.file).stat().st_size
        except OSError as error:
            wrong.append(f"{folder / entry.file}: {error.strerror}")
        else:
            if size != entry.bytes:
                wrong.append(f"{folder / entry.file}: {size:,} bytes, should be {entry.bytes:,}")
    return wrong


def _raw(folder: Path, config: DataConfig) -> Iterator[Check]:
    if config.corpus == "embedded":
        found = "embedded: generated, needs no network"
        needed: int | None = config.embedded_pairs * _EMBEDDED_PAIR_BYTES
    elif config.corpus == "files":
        problem, needed = _files(config)
        if problem is not None:
            yield problem
            return
        found = "the text files are there"
    elif (entry := CATALOGUE.get(config.corpus)) is not None:
        check, needed = _catalogued(entry, config)
        if check.outcome != "ok":
            yield check
            return
        found = check.found
    else:
        known = ", ".join(["embedded", "files", *CATALOGUE])
        yield Check("corpus", "failure", f"unknown: {config.corpus!r}", f"data.corpus: {known}")
        return
    yield Check("corpus", "ok", f"{found}; train will prepare it in {folder}")
    if needed is not None:
        free = shutil.disk_usage(existing(folder)).free
        room = f"{number(free)}B free, preparing takes about {number(needed)}B"
        if free < needed:
            mend = "free some space, or set data.root to a folder with more"
            yield Check("corpus: room", "failure", room, mend)
        else:
            yield Check("corpus: room", "ok", room)


def _files(config: DataConfig) -> tuple[Check | None, int]:
    needed = 0
    for key in ("source", "target", "valid_source", "valid_target", "test_source", "test_target"):
        value = getattr(config, key)
        if value is None:
            continue
        try:
            size = Path(value).stat().st_size
            with Path(value).open("rb") as file:
                file.read(1)
        except OSError as error:
            found = f"data.{key}: {value}: {error.strerror}"
            return Check("corpus", "failure", found, f"correct data.{key}"), 0
        needed += size * (_TIMES_PACKED if value.endswith(".gz") else _TIMES)
    return None, needed


def _catalogued(entry: CatalogueEntry, config: DataConfig) -> tuple[Check, int | None]:
    names = [
        pattern.format(language=language)
        for pattern in entry.files.values()
        for language in (config.source, config.target)
    ]
    mirror = config.mirror
    if mirror is not None and not re.match(r"https?://", mirror):
        folder = Path(mirror.removeprefix("file://")).expanduser()
        sizes, absent = [], []
        for name in names:
            here = [path for path in (folder / name, folder / entry.name / name) if path.is_file()]
            absent += [] if here else [name]
            sizes += [path.stat().st_size for path in here[:1]]
        if absent:
            found = f"the mirror {folder} has no {', '.join(absent[:3])}"
            mend = f"put them there (or into {folder / entry.name}), or leave --mirror out"
            return Check("corpus", "failure", found, mend), None
        return Check("corpus", "ok", f"{entry.name}: mirrored in {folder}"), (
            sum(sizes) * _TIMES_PACKED
        )
    stored = config.root / "raw" / entry.name
    if all((stored / name).is_file() for name in names):
        size = sum((stored / name).stat().st_size for name in names)
        return Check("corpus", "ok", f"{entry.name}: fetched already, in {stored}"), (
            size * (_TIMES_PACKED - 1)
        )
    base = (mirror or entry.home).rstrip("/")
    urls = [f"{base}/{names[0]}"] + ([f"{base}/{entry.name}/{names[0]}"] if mirror else [])
    said, answered = "", None
    for url in urls:
        try:
            said, answered = limited(_PATIENCE_S, lambda: _head(url))  # noqa: B023
        except TimedOutError:
            said = f"no answer within {_PATIENCE_S:g} s"
        if answered is not None:
            break
    if answered is None:
        found = f"{entry.name}: {urls[0]}: {said}"
        mend = "let this machine reach it, or give --mirror DIR_OR_URL with the raw files"
        return Check("corpus", "failure", found, mend), None
    needed = answered * 2 * _TIMES_PACKED if answered else None  # the two sides; others are small
    return Check("corpus", "ok", f"{entry.name}: {base} answers"), needed


def _head(url: str) -> tuple[str, int | None]:
    """What the server says, and the file's bytes: 0 if it does not tell, None if it has none."""
    import requests

    try:
        answer = requests.head(url, timeout=_TIMEOUT_S, allow_redirects=True)
    except requests.RequestException as error:
        return f"cannot be reached ({type(error).__name__})", None
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.reason}", None
    return "", int(answer.headers.get("Content-Length", 0))
