"""Parts of a page are replaced, all else stays; what is missing is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.paper.pages import markdown_table, write_parts


def test_only_the_part_is_replaced_however_often(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Ours\n\n<!-- a: begin -->\nold\n<!-- a: end -->\n\n<!-- b: begin -->\n"
                    "kept\n<!-- b: end -->\nEnd.\n")  # fmt: skip
    for _ in range(2):
        write_parts(page, {"a": markdown_table(("kind", "BLEU"), [("LSTM", "31.2")])})
    assert page.read_text() == (
        "# Ours\n\n<!-- a: begin -->\n\n| kind | BLEU |\n| --- | ---: |\n| LSTM | 31.2 |\n\n"
        "<!-- a: end -->\n\n<!-- b: begin -->\nkept\n<!-- b: end -->\nEnd.\n"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no marks", "no part 'a'"),
        ("<!-- a: begin -->\nx", "no part 'a'"),
        (None, "cannot be read"),
    ],
)
def test_a_page_without_the_part_stays_as_it_is(
    tmp_path: Path, text: str | None, words: str
) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    with pytest.raises(UserError, match=words):
        write_parts(page, {"a": "new"})
    assert text is None or page.read_text() == text
