"""What heads do, as tables of a page: written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.errors import UserError
from trainer.attention import Kind
from trainer.grammar_heads import Finding
from trainer.heads import NAMED_SHARE, PLACES, Profile, most
from trainer.needed_heads import Cost, Costs
from trainer.paper.pages import markdown_table, write_parts
from trainer.silenced_heads import HeadName


def parts_of(page: Path, run: str, parts: Sequence[str]) -> list[str]:
    """Those parts ("places", "grammar", "silenced") of a run that a page has.

    Raises:
        UserError: the page cannot be read, or has none of them.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be read: {page}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the page cannot be read: {page}: not UTF-8 text") from None
    present = [part for part in parts if f"<!-- {run} {part}: begin -->" in text]
    if not present:
        names = ", ".join(f"<!-- {run} {part}: begin -->" for part in parts)
        raise UserError(f"{page} has none of the parts of this run: put in {names} and their ends")
    return present


def write_page(
    page: Path,
    run: str,
    profiles: Mapping[Kind, Profile],
    grammar: Sequence[Finding],
    needed: Sequence[Costs],
) -> None:
    """Replace those parts "RUN places", "RUN grammar" and "RUN silenced" that the page has.

    Raises:
        UserError: the page cannot be read or written, has none of them, or has one of which
            only the beginning is there.
    """
    parts = {"places": places_table(profiles)}
    if grammar:
        parts["grammar"] = grammar_table(grammar)
    if needed:
        parts["silenced"] = silenced_table(needed)
    present = parts_of(page, run, list(parts))
    write_parts(page, {f"{run} {part}": parts[part] for part in present})


def places_table(profiles: Mapping[Kind, Profile]) -> str:
    """For each place the head that looks there most, and how many do for the most part."""
    rows = []
    for kind, profile in profiles.items():
        edge = "at the begin sign" if kind == "decoder" else "at the end sign"
        at = [*((PLACES[kind][key], share) for key, share in sorted(profile.at.items()))]
        elsewhere = [
            (edge, profile.edge),
            ("at punctuation", profile.marks),
            ("at its strongest piece, wherever that stands", profile.sharpest),
        ]
        for words, share_LH in (*at, *elsewhere):
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


def silenced_table(needed: Sequence[Costs]) -> str:
    """For each group of words the heads it needs most; a group's name stands in its first row."""
    rows = []
    for group in needed:
        begins = (group.group, f"{group.cases:,}", _tenths(group.right))
        if not group.heads:
            rows.append((*begins, "none", "-", "-", "-", "-"))
        for number, cost in enumerate(group.heads):
            rows.append(
                (
                    *(begins if number == 0 else ("", "", "")),
                    _code(cost.head),
                    _tenths(cost.right),
                    f"{cost.lost:,}",
                    f"{cost.won:,}",
                    loss_interval(cost),
                )
            )
    header = (
        "words", "cases", "all heads", "silenced", "without it", "lost", "won", "loss in 100, 95 %"
    )  # fmt: skip
    return markdown_table(header, rows)


def loss_interval(cost: Cost) -> str:
    """How many words in a hundred are lost, less those won: 95 % of it."""
    if cost.interval is None:
        return "-"
    low, high = (f"{100 * share:.1f}".replace("-0.0", "0.0") for share in cost.interval)
    return f"{low} to {high}"


def beside(one: Finding) -> str:
    """The weight on a rival, and on the partner in the same sentences."""
    if one.rival is None or one.beside_rival is None:
        return "-"
    return f"{percent(one.rival)} of {percent(one.beside_rival)}"


def percent(share: float) -> str:
    """Whole per cents."""
    return f"{100 * share:.0f} %"


def _tenths(share: float) -> str:
    return f"{100 * share:.1f} %"


def _code(name: HeadName) -> str:
    return f"`{name}`"
