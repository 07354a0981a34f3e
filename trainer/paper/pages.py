"""Pages whose tables are written from results: text by hand, and parts between two marks.

A part begins with ``<!-- NAME: begin -->`` and ends with ``<!-- NAME: end -->``, on lines of their
own; what lies between is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.errors import UserError


def write_parts(page: Path, parts: Mapping[str, str]) -> None:
    """Replace parts of a Markdown page.

    Raises:
        UserError: the page is not there, cannot be written, or lacks a part's marks.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be read: {page}: {error.strerror}") from None
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
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be written: {page}: {error.strerror}") from None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first ``text`` columns are words and the others numbers."""
    signs = ["---" if index < text else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, signs, *rows))
