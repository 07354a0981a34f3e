"""Parallel text files as raw lines: plain or gzip, bounded memory, every fault named."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, BinaryIO, cast

from data_shards.errors import DataError

# A sentence kept has at most 65,000 pieces of 16 characters; what is longer need not be in memory.
_LONGEST_LINE_BYTES = 8 << 20
_SNIFFED_BYTES = 1 << 20
_MOST_UNDECODABLE = 0.1


def check_text(path: Path, key: str) -> None:
    """Refuse at once what is not a text file, rather than dropping its every line."""
    if not path.is_file():
        raise DataError(f"{key}: {path} is not a file. With data.corpus=files it names the text")
    try:
        with _open_text(path) as file:
            head = file.read(_SNIFFED_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if not head:
        raise DataError(f"{key}: {path} is empty")
    if b"\0" in head:
        hint = "it looks like UTF-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "is it binary?"
        raise DataError(f"{key}: {path} is not UTF-8 text ({hint}): give a UTF-8 text file")
    lines = head.split(b"\n")
    if len(head) == _SNIFFED_BYTES and len(lines) > 1:
        lines.pop()  # cut by the limit, perhaps inside a character
    undecodable = sum(not _is_utf8(line) for line in lines)
    if undecodable > _MOST_UNDECODABLE * len(lines):
        raise DataError(
            f"{key}: {path} is not UTF-8 text ({undecodable} of the first {len(lines)} lines "
            "cannot be decoded): convert it, for example with iconv -f ISO-8859-1 -t UTF-8"
        )


def read_pairs(source: Path, target: Path) -> Iterator[tuple[bytes, bytes]]:
    """Raw lines of two parallel files, plain or gzip, without line ends.

    Raises:
        DataError: the files have different numbers of lines, or one cannot be read.
    """
    return pair_lines(str(source), _lines(source), str(target), _lines(target))


def pair_lines(
    source_name: str, source: Iterable[bytes], target_name: str, target: Iterable[bytes]
) -> Iterator[tuple[bytes, bytes]]:
    """Lines of two parallel texts, whatever they are read from.

    Raises:
        DataError: one text has more lines than the other.
    """
    num_lines = [0, 0]
    for source_line, target_line in zip_longest(source, target):
        num_lines[0] += source_line is not None
        num_lines[1] += target_line is not None
        if source_line is not None and target_line is not None:
            yield source_line, target_line
    if num_lines[0] != num_lines[1]:
        raise DataError(
            f"source and target are not parallel: {source_name} has {num_lines[0]:,} lines, "
            f"{target_name} has {num_lines[1]:,}. Line n of one must translate line n of the other"
        )


def read_text(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Sentences of two parallel files that must be clean: those of a validation or test set.

    Raises:
        DataError: as :func:`read_pairs`; a line is not UTF-8; there is no line.
    """
    return decode_pairs(str(source), str(target), read_pairs(source, target))


def decode_pairs(
    source_name: str, target_name: str, pairs: Iterable[tuple[bytes, bytes]]
) -> Iterator[tuple[str, str]]:
    """The lines of a validation or test set as text.

    Raises:
        DataError: a line is not UTF-8; there is no line.
    """
    number = 0
    for number, lines in enumerate(pairs, start=1):
        decoded = []
        for name, line in zip((source_name, target_name), lines, strict=True):
            try:
                decoded.append(line.decode())
            except UnicodeDecodeError:
                raise DataError(
                    f"{name}, line {number}: not UTF-8. A test set is never filtered: mend the line"
                ) from None
        yield decoded[0], decoded[1]
    if number == 0:
        raise DataError(f"{source_name} has no line")


def _open_text(path: Path) -> BinaryIO:
    """The file's text as bytes, decompressed if its first bytes say gzip, whatever its name."""
    raw = path.open("rb")
    magic = raw.read(2)
    raw.seek(0)
    if magic != b"\x1f\x8b":
        return raw
    # Opened by path: GzipFile would leave a file that it was handed open.
    raw.close()
    unpacked = cast("io.RawIOBase", gzip.GzipFile(path, "rb"))
    return cast("BinaryIO", io.BufferedReader(unpacked, 1 << 20))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with _open_text(path) as file:
            yield from lines_of(file)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of an open text without line ends; what is beyond any sentence is cut."""
    read = partial(file.readline, _LONGEST_LINE_BYTES)
    first = True
    for line in iter(read, b""):
        if first:
            line = line.removeprefix(b"\xef\xbb\xbf")
            first = False
        if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            yield _cut(line)
            while line and not line.endswith(b"\n"):
                line = read()
            continue
        yield line.rstrip(b"\r\n")


def _cut(line: bytes) -> bytes:
    """A line cut at its limit, without the character that the cut went through."""
    return line.decode(errors="ignore").encode() if _ends_inside_character(line) else line


def _ends_inside_character(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.end == len(line) and error.reason == "unexpected end of data"
    return False


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error)
    return DataError(f"{path} cannot be read ({reason}): is it complete? Fetch or copy it again")
