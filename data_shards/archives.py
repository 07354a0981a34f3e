"""Corpora that come as archives of many files: which members are the text, and how it is read.

Nothing is unpacked onto the disk. A part of the corpus is one member for each side, read from the
archive line by line; the parts follow one another in the order in which the entry lists them.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Literal, cast

from data_shards.download import Expected
from data_shards.errors import DataError
from data_shards.manifest import file_sha256
from data_shards.text import decode_pairs, lines_of, pair_lines

Split = Literal["train", "valid", "test"]

_SEGMENT = re.compile(rb"<seg\b[^>]*>(.*?)</seg>", re.DOTALL | re.IGNORECASE)
_SEGMENT_BEGIN = re.compile(rb"<seg\b", re.IGNORECASE)
# Of a text of segments; the largest of WMT has less than a megabyte.
_MOST_SEGMENT_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of TED talks: what is spoken is in lines without a tag; title and description are text too.
_TALK_TEXT = re.compile(rb"\s*<(title|description)>(.*?)(</\1>)?\s*$")
_TALK_OTHER = re.compile(rb"\s*</?(url|talkid|keywords|speaker|reviewer|translator|doc)\b")


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: its home; the last part is its name, here and in a mirror.
        expected: its checksum as far as anybody has published one.
        checksum_source: who did.
    """

    url: str
    expected: Expected
    checksum_source: str

    @property
    def file(self) -> str:
        """Its name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Part:
    """A parallel text: two members of an archive.

    Attributes:
        archive: file name of the archive.
        member: name of the member, without folders; ``{language}`` is the side's, ``{role}`` is
            ``src`` or ``ref``. One that ends in .gz is unpacked.
        form: ``lines``: a sentence a line; ``segments``: what stands between <seg> and </seg>;
            ``talks``: lines, with tagged ones about the talk between them.
    """

    archive: str
    member: str
    form: Literal["lines", "segments", "talks"] = "lines"


@dataclass(frozen=True)
class PublishedStatistics:
    """How large a corpus is once it is prepared, as others have counted.

    Attributes:
        num_pairs: pairs to train on.
        mean_pieces: of each language, pieces a sentence, end sign included.
        source: who counted, with which vocabulary, and what is an estimate.
    """

    num_pairs: int
    mean_pieces: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class ArchivedEntry:
    """A public corpus made of members of archives.

    Attributes:
        name: what ``data.corpus`` calls it.
        languages: two; either may be the source.
        folder: what the raw files lie under; corpora that share archives share it.
        archives: the files to download.
        parts: of each split, in order. A split without parts is held out of the training text.
        licence: under what terms, in a sentence.
        citation: whom to cite.
        statistics: of the prepared corpus.
    """

    name: str
    languages: tuple[str, str]
    folder: str
    archives: tuple[Archive, ...]
    parts: Mapping[Split, tuple[Part, ...]]
    licence: str
    citation: str
    statistics: PublishedStatistics

    def archive(self, file: str) -> Archive:
        """The archive of this file name."""
        return next(archive for archive in self.archives if archive.file == file)


def open_parts(
    parts: tuple[Part, ...], archives: Mapping[str, Path], source: str, target: str
) -> Callable[[], Iterator[tuple[bytes, bytes]]]:
    """The parts one after another, as raw lines of source and target, each time from the start.

    Raises (while it is read):
        DataError: an archive is damaged or lacks a member; the two sides of a part differ in
            length.
    """

    def read() -> Iterator[tuple[bytes, bytes]]:
        for part in parts:
            yield from _read_part(part, archives[part.archive], source, target)

    return read


def open_heldout(
    parts: tuple[Part, ...], archives: Mapping[str, Path], source: str, target: str
) -> Callable[[], Iterator[tuple[str, str]]]:
    """As :func:`open_parts`, for a validation or test set: decoded, nothing passed over."""

    def read() -> Iterator[tuple[str, str]]:
        for part in parts:
            archive = archives[part.archive]
            labels = _labels(part, archive, source, target)
            yield from decode_pairs(*labels, _read_part(part, archive, source, target))

    return read


def trust(archive: Archive, path: Path, parts: tuple[Part, ...], record: Path) -> str:
    """The archive's sha256, if it may be used: trust on first use where none is published.

    What was seen first is written to ``record``, and another file is refused from then on.

    Args:
        archive: what is known of it; a published checksum has been compared already.
        path: where it lies.
        parts: those whose members it must have before it is trusted for the first time.
        record: file that keeps the sha256.

    Raises:
        DataError: it is not the file seen before, or not a whole archive with all members.
    """
    if archive.expected.sha256 is not None:
        return archive.expected.sha256
    actual = file_sha256(path)
    seen = _recorded(record)
    if seen is not None:
        if seen != actual:
            raise DataError(
                f"{path}: no sha256 of this file is published, and the first one seen here was "
                f"{seen}; now it is {actual}. Put the old file back, or remove {record} to trust "
                "the new one"
            )
        return actual
    _check_members(path, parts)
    record.parent.mkdir(parents=True, exist_ok=True)
    # Never half a record: a run that is killed here leaves none.
    draft = record.with_name(f"{record.name}.{os.getpid()}.part")
    draft.write_text(f"{actual}  {archive.file}\n", encoding="utf-8")
    draft.replace(record)
    return actual


def _recorded(record: Path) -> str | None:
    """The sha256 in a record; None where there is no record, or no sha256 in it."""
    if not record.exists():
        return None
    first = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0].strip()
    return first if _SHA256.fullmatch(first) else None


def member_names(part: Part, source: str, target: str) -> tuple[str, str]:
    """The part's members for a direction."""
    return (
        part.member.format(language=source, role="src"),
        part.member.format(language=target, role="ref"),
    )


def _read_part(
    part: Part, archive: Path, source: str, target: str
) -> Iterator[tuple[bytes, bytes]]:
    names = member_names(part, source, target)
    # Each side has its own handle, so that two members can be read in step.
    sides = [_read_member(archive, name, part.form) for name in names]
    labels = _labels(part, archive, source, target)
    return pair_lines(labels[0], sides[0], labels[1], sides[1])


def _labels(part: Part, archive: Path, source: str, target: str) -> tuple[str, str]:
    """What messages call the two sides."""
    names = member_names(part, source, target)
    return f"{names[0]} in {archive}", f"{names[1]} in {archive}"


def _read_member(archive: Path, name: str, form: str) -> Iterator[bytes]:
    try:
        with tarfile.open(archive) as tar:
            file: IO[bytes] = _find(tar, archive, name)
            if name.endswith(".gz"):
                file = cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb"))
            with file:
                if form == "segments":
                    yield from _segments(file.read(_MOST_SEGMENT_BYTES), f"{name} in {archive}")
                elif form == "talks":
                    yield from _talk_lines(lines_of(file))
                else:
                    yield from lines_of(file)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(archive, error) from None


def _find(tar: tarfile.TarFile, archive: Path, name: str) -> IO[bytes]:
    """The member of this name, whatever folder it is in. Stops there: an archive is large."""
    others = []
    for member in tar:
        own = member.name.rsplit("/", 1)[-1]
        if own == name and member.isfile():
            file = tar.extractfile(member)
            assert file is not None  # it is a file
            return file
        others.append(own)
    close = get_close_matches(name, others, n=3) or others[:3]
    raise DataError(
        f"{archive} has no member {name} (it has {len(others)}"
        f"{', such as ' + ', '.join(close) if close else ''}): it is not the archive that the "
        "catalogue means. Remove it and run the command again, or correct the mirror"
    )


def _check_members(path: Path, parts: tuple[Part, ...]) -> None:
    """Read the whole archive once: it must not be cut short, and must have all that is needed."""
    patterns = {
        re.escape(part.member).replace(r"\{language\}", r"\w+").replace(r"\{role\}", r"\w+")
        for part in parts
    }
    try:
        with tarfile.open(path) as tar:
            names = [member.name.rsplit("/", 1)[-1] for member in tar]
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    for pattern in sorted(patterns):
        if not any(re.fullmatch(pattern, name) for name in names):
            raise DataError(
                f"{path} has no member like {pattern} (it has {', '.join(names[:5])}): it is not "
                "the archive that the catalogue means. Remove it and run the command again, or "
                "correct the mirror"
            )


def _check_end(tar: tarfile.TarFile) -> None:
    """Behind the last member: tarfile takes an archive that is cut there for a whole one.

    Raises:
        TarError, OSError, EOFError, zlib.error: it does not end as it should.
    """
    file = tar.fileobj
    assert file is not None  # the archive is open
    if isinstance(file, io.BufferedReader):
        # Not compressed: an empty block tells the end.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end of archive")
        return
    # The checksum of what was compressed stands behind it.
    while file.read(_READ_BYTES):
        pass


def _segments(text: bytes, label: str) -> Iterator[bytes]:
    """What stands between the tags, white space made blanks; entities stay as they are.

    WMT's .sgm files are no SGML that a parser would take: a bare & is common. sacreBLEU reads them
    in the same way, so the test set here and the one it knows by name are the same sentences.
    """
    found = _SEGMENT.findall(text)
    if len(found) != len(_SEGMENT_BEGIN.findall(text)):
        raise DataError(
            f"{label}: {len(_SEGMENT_BEGIN.findall(text))} segments begin, {len(found)} end: the "
            "file is damaged. Fetch the archive again"
        )
    for segment in found:
        yield b" ".join(segment.split())


def _talk_lines(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if tagged := _TALK_TEXT.match(line):
            yield tagged[2].strip()
        elif not _TALK_OTHER.match(line):
            yield line.strip()


def _damaged(archive: Path, error: Exception) -> DataError:
    # tarfile lists every kind of compression that it tried, a line each.
    reason = (getattr(error, "strerror", None) or str(error)).partition("\n")[0].rstrip(":")
    return DataError(
        f"{archive} cannot be read as an archive ({reason}): it is cut short or damaged. Remove it "
        "and run the command again, or correct the mirror"
    )
