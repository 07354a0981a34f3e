"""What heads do, as tables of a page: written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.errors import UserError
from trainer.attention import Kind
from trainer.grammar_heads import Finding
from trainer.heads import NAMED_SHARE, PLACES, Profile, most
from trainer.paper.pages import markdown_table, write_parts
from trainer.silenced_heads import HeadName, Needed, Right


def write_page(
    page: Path,
    run: str,
    profiles: Mapping[Kind, Profile],
    grammar: Sequence[Finding],
    needed: Needed | None,
) -> None:
    """Replace those parts "RUN places", "RUN grammar" and "RUN silenced" that the page has.

    Raises:
        UserError: the page cannot be read or written, has none of them, or has one of which
            nothing was measured.
    """
    parts = {f"{run} places": places_table(profiles)}
    if grammar:
        parts[f"{run} grammar"] = grammar_table(grammar)
    if needed is not None:
        parts[f"{run} silenced"] = silenced_table(needed)
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be read: {page}: {error.strerror}") from None
    present = {name: part for name, part in parts.items() if f"<!-- {name}: begin -->" in text}
    if not present:
        names = ", ".join(f"<!-- {name}: begin -->" for name in parts)
        raise UserError(f"{page} has none of the parts of this run: put in {names} and their ends")
    write_parts(page, present)


def places_table(profiles: Mapping[Kind, Profile]) -> str:
    """For each place the head that looks there most, and how many do for the most part."""
    rows = []
    for kind, profile in profiles.items():
        edge = "at the begin sign" if kind == "decoder" else "at the end sign"
        at = [*((PLACES[kind][key], share) for key, share in sorted(profile.at.items()))]
        for words, share_LH in (*at, (edge, profile.edge), ("at punctuation", profile.marks)):
            layer, head, share = most(share_LH)
            rows.append(
                (
                    f"{kind}: {words}",
                    _code(HeadName(kind, layer, head)),
                    percent(share),
                    f"{int((share_LH >= NAMED_SHARE).sum())} of {share_LH.numel()}",
                )
            )
    header = ("looks", "most of all", "its weight there", f"heads with {percent(NAMED_SHARE)}")
    return markdown_table(header, rows, text=2)


def grammar_table(grammar: Sequence[Finding]) -> str:
    """A row for each relation: its best head beside what knows no grammar."""
    rows = [
        (
            one.name,
            _code(HeadName(one.kind, one.layer, one.head)),
            f"{one.cases:,}",
            percent(one.weight),
            percent(one.strongest),
            percent(one.even),
            f"{percent(one.at_offset)} ({one.offset:+d})",
            beside(one),
        )
        for one in grammar
    ]
    header = (
        "relation", "best head", "words", "weight", "strongest", "even", "fixed place", "on a rival"
    )  # fmt: skip
    return markdown_table(header, rows, text=2)


def silenced_table(needed: Needed) -> str:
    """For each group of words the two heads without which most are lost."""
    rows = []
    for group, whole in needed.whole.items():
        without = sorted(
            ((right[group].right, str(name), name) for name, right in needed.silenced.items()),
        )[:2]
        rows.append(
            (
                group,
                f"{whole.cases:,}",
                _right(whole),
                *(
                    f"{_code(name)}: {_right(needed.silenced[name][group])}"
                    if right < whole.right
                    else "-"
                    for right, _, name in without
                ),
            )
        )
    return markdown_table(
        ("words", "cases", "all heads", "without the most needed", "and without the next"), rows
    )


def beside(one: Finding) -> str:
    """The weight on a rival, and on the partner in the same sentences."""
    if one.rival is None or one.beside_rival is None:
        return "-"
    return f"{percent(one.rival)} of {percent(one.beside_rival)}"


def percent(share: float) -> str:
    """Whole per cents."""
    return f"{100 * share:.0f} %"


def _right(right: Right) -> str:
    return f"{100 * right.right:.1f} %"


def _code(name: HeadName) -> str:
    return f"`{name}`"
