from __future__ import annotations

import gzip
from pathlib import Path

import pytest

import data_shards.text
from data_shards.errors import DataError
from data_shards.text import check_text, read_pairs, read_text


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def test_plain_and_gzip_read_alike(tmp_path: Path) -> None:
    source = write(tmp_path / "a.gz", b"one\ntwo\nthree")
    target = write(tmp_path / "b", b"\xef\xbb\xbfeins\r\nzwei\n drei \n")
    assert list(read_pairs(source, target)) == [
        (b"one", b"eins"),
        (b"two", b"zwei"),
        (b"three", b" drei "),
    ]


def test_gzip_is_known_by_its_content_not_its_name(tmp_path: Path) -> None:
    packed = tmp_path / "packed.txt"
    packed.write_bytes(gzip.compress(b"one\n"))
    assert list(read_pairs(packed, packed)) == [(b"one", b"one")]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    content = "a\u2028b\x0bc\x85d\re\n".encode()
    path = write(tmp_path / "a", content)
    assert list(read_pairs(path, path)) == [(content[:-1], content[:-1])]


@pytest.mark.parametrize(("source_lines", "target_lines"), [(3, 5), (5, 3), (0, 1)])
def test_unequal_line_counts_name_both_files_and_counts(
    tmp_path: Path, source_lines: int, target_lines: int
) -> None:
    source = write(tmp_path / "a.en", b"line\n" * source_lines)
    target = write(tmp_path / "a.de.gz", b"Zeile\n" * target_lines)
    with pytest.raises(DataError) as caught:
        list(read_pairs(source, target))
    message = str(caught.value)
    assert f"{source} has {source_lines} lines" in message
    assert f"{target} has {target_lines}" in message


def test_a_line_without_end_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_shards.text, "_LONGEST_LINE_BYTES", 9)
    # The limit falls inside an umlaut: what is left of the line must still be Unicode.
    path = write(tmp_path / "a", ("ä" * 40 + "\nnext\n").encode())
    assert list(read_pairs(path, path)) == [("ää".encode() * 2,) * 2, (b"next",) * 2]


def test_a_gzip_file_that_was_cut_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(bytes(range(48, 90)) * 500 + b"\n")
    path = tmp_path / "cut.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.gz cannot be read .*complete"):
        list(read_pairs(path, path))


def test_a_test_set_must_be_clean(tmp_path: Path) -> None:
    good = write(tmp_path / "good", b"one\ntwo\n")
    bad = write(tmp_path / "bad", b"eins\nzw\xe4i\n")
    assert list(read_text(good, good)) == [("one", "one"), ("two", "two")]
    with pytest.raises(DataError, match="bad, line 2: not UTF-8"):
        list(read_text(good, bad))
    empty = write(tmp_path / "empty", b"")
    with pytest.raises(DataError, match="empty has no line"):
        list(read_text(empty, empty))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x02\x00\x00\x00", "binary"),
        ("Guten Tag\n".encode("utf-16"), "UTF-16"),
        ("Schöne Grüße\n".encode("latin-1") * 50, "50 of the first 51 lines cannot be decoded"),
    ],
)
@pytest.mark.parametrize("name", ["text", "text.gz"])
def test_what_is_not_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        check_text(path, "data.source")
    assert str(path) in str(caught.value)
    assert "data.source" in str(caught.value)


def test_a_few_bad_lines_are_left_to_the_filters(tmp_path: Path) -> None:
    check_text(write(tmp_path / "text", b"good\n" * 50 + b"b\xe4d\n"), "data.source")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.target: .*nowhere is not a file"):
        check_text(tmp_path / "nowhere", "data.target")
