"""Pages whose tables are written from results: text by hand, and parts between two marks.

A part begins with ``<!-- NAME: begin -->`` and ends with ``<!-- NAME: end -->``, on lines of their
own; what lies between is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_shards.errors import UserError
from trainer.paper.results import check_place
from trainer.storage import write_atomically


def check_page(page: Path, names: Iterable[str], images: Path) -> None:
    """That a page and its plots can be written, before minutes of measuring.

    Args:
        names: of the parts that it must have.
        images: the plots' folder; it may be missing.

    Raises:
        UserError: they cannot.
    """
    _replaced(page, _text(page), dict.fromkeys(names, ""))
    check_place(page)
    check_place(images / "plot.svg")


def write_parts(page: Path, parts: Mapping[str, str]) -> None:
    """Replace parts of a Markdown page.

    Raises:
        UserError: the page is not there, cannot be written, or lacks a part's marks; it then stays
            as it was.
    """
    text = _replaced(page, _text(page), parts)
    try:
        write_atomically(page, text)
    except OSError as error:
        raise UserError(f"the page cannot be written: {page}: {error.strerror}") from None


def _text(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be read: {page}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the page cannot be read: {page}: this is no text in UTF-8") from None


def _replaced(page: Path, text: str, parts: Mapping[str, str]) -> str:
    for name, content in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, ends, after = rest.partition(end)
        if not found or not ends:
            raise UserError(
                f"{page} has no part {name!r}: put the lines {begin.strip()} and {end} where it "
                "is to stand"
            )
        text = f"{before}{begin}\n{content.strip()}\n\n{end}{after}"
    return text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first ``text`` columns are words and the others numbers."""
    signs = ["---" if index < text else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, signs, *rows))
