"""``babelray heads``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import checkpoint_option, json_option, print_json, runs_option
from data_shards.errors import UserError

if TYPE_CHECKING:
    from trainer.attention import Kind
    from trainer.grammar_heads import Finding
    from trainer.heads import Profile
    from trainer.needed_heads import Costs
    from trainer.silenced_heads import Needed, Right


@click.command()
@click.argument("run")
@click.option(
    "--sentences",
    "num_sentences",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="How many of the test set, and of the validation set where heads are chosen on it.",
)
@click.option(
    "--silence",
    is_flag=True,
    help="Silence each head in turn, and tell what the model then writes wrongly.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png|.svg|.pdf",
    help="Draw what is lost by each silenced head.",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.md",
    help="Write the tables into a page, where it has <!-- RUN grammar: begin --> and the like.",
)
@checkpoint_option
@json_option
@runs_option
def heads(
    run: str,
    num_sentences: int,
    silence: bool,
    output: Path | None,
    page: Path | None,
    checkpoint: str,
    as_json: bool,
    runs: Path,
) -> None:
    """Measure what each attention head of the run RUN does.

    Where its weight lies: at a place next to its own, at the end, at punctuation, or spread. On the
    generated corpus also which head follows a relation of the grammar, beside what chance and a
    fixed place would give. With --silence also what the model writes wrongly without each head, and
    which heads each group of words needs most. A best head is chosen on the validation split and
    measured on the test split.

    \b
    Examples:
      babelray heads demo
      babelray heads demo --silence --output lost.svg
    """
    from cluster.naming import find_run
    from trainer.heatmaps import FORMATS

    run_dir = find_run(run, runs)
    if output is not None and output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {output}: an image ends in {', '.join(FORMATS)}")
    import torch

    from trainer.attention import each_pairs_maps
    from trainer.grammar_heads import follow_grammar, has_grammar
    from trainer.heads import profiles
    from trainer.heads_page import parts_of, write_page
    from trainer.needed_heads import costs
    from trainer.run import load_model
    from trainer.silenced_heads import has_test_set, heads_of, needed_for, words_to_write

    loaded = load_model(run_dir, checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    silence = silence or output is not None
    if silence and not heads_of(loaded.model):
        raise UserError(
            f"{run_dir.name}: a model of kind {loaded.config.model.kind} has no heads of which one "
            "can be silenced: leave out --silence and --output"
        )
    run_name = run_dir.resolve().name
    if page is not None:
        known = {"places": True, "grammar": has_grammar(loaded), "silenced": silence}
        parts_of(page, run_name, [part for part, is_measured in known.items() if is_measured])
    words = words_to_write(loaded, num_sentences)
    num_sentences = len(words.pairs)
    found = profiles(maps for _, maps in each_pairs_maps(loaded, words.pairs))
    grammar = follow_grammar(loaded, num_sentences) if has_grammar(loaded) else []
    validation = measured = None
    needed = []
    if silence:
        validation = needed_for(loaded, words_to_write(loaded, num_sentences, "valid"))
        measured = needed_for(loaded, words)
        needed = costs(validation, measured)
    name = f"{run_name}, step {loaded.step:,}"
    if as_json:
        result = _as_json(loaded.step, num_sentences, found, grammar)
        if validation is not None and measured is not None:
            result |= _silenced_as_json(measured, needed)
            result["validation"] = _silenced_as_json(validation)
        print_json({"run": run_name, **result})
    else:
        of = "the test set" if has_test_set(loaded) else "the validation set, every second"
        click.echo(f"{name}: {num_sentences:,} sentences of {of}")
        for lines in (
            _profile_lines(found),
            _grammar_lines(grammar),
            _needed_lines(measured),
            _cost_lines(needed),
        ):
            if lines:
                click.echo("\n" + "\n".join(lines))
    if page is not None:
        write_page(page, run_name, found, grammar, needed)
    if output is not None and measured is not None:
        _draw(output, measured, name)
        click.echo(str(output), err=as_json)


def _profile_lines(found: dict[Kind, Profile]) -> list[str]:
    from trainer.heads import position_names
    from trainer.heads_page import percent
    from trainer.silenced_heads import HeadName

    rows: list[tuple[str, ...]] = [("head", "sharpest", "spread", "end", "marks", "looks mostly")]
    for kind, profile in found.items():
        named = position_names(profile, least=0.0)
        num_layers, num_heads = profile.edge.shape
        for at in ((layer, head) for layer in range(num_layers) for head in range(num_heads)):
            words, share = named[at]
            rows.append(
                (
                    str(HeadName(kind, *at)),
                    percent(float(profile.sharpest[at])),
                    f"{float(profile.spread[at]):.1f}",
                    percent(float(profile.edge[at])),
                    percent(float(profile.marks[at])),
                    f"{percent(share):>5} {words}",
                )
            )
    return [
        *_aligned(rows),
        "sharpest: weight of a row's strongest piece; spread: over how many pieces; end: weight on",
        "the end sign, of the decoder on the begin sign. Means over rows; heads as layer.head.",
    ]


def _grammar_lines(grammar: Sequence[Finding]) -> list[str]:
    from trainer.heads_page import beside, percent
    from trainer.silenced_heads import HeadName

    if not grammar:
        return []
    rows: list[tuple[str, ...]] = [
        ("head", "weight", "strongest", "even", "fixed place", "rival", "cases", "follows")
    ]
    rows += [
        (
            str(HeadName(one.kind, one.layer, one.head)),
            percent(one.weight),
            percent(one.strongest),
            percent(one.even),
            f"{percent(one.at_offset)} at {one.offset:+d}",
            beside(one),
            f"{one.cases:,}",
            one.name,
        )
        for one in grammar
    ]
    return [
        *_aligned(rows),
        "weight: on the partner, by the head that follows the relation best; even: if it looked",
        "everywhere alike; fixed place: by the best head that always looks so many pieces away;",
        "rival: on a word of the partner's kind that is not the partner, beside the weight on the",
        "partner in the same sentences.",
    ]


def _needed_lines(needed: Needed | None) -> list[str]:
    if needed is None:
        return []
    groups = list(needed.whole)
    rows: list[tuple[str, ...]] = [("silenced", *groups)]
    rows.append(("cases", *(f"{needed.whole[group].cases:,}" for group in groups)))
    for head, right in [("none", needed.whole), *((str(n), r) for n, r in needed.silenced.items())]:
        rows.append(
            (head, *(f"{100 * right[group].right:.1f} {right[group].nats:.2f}" for group in groups))
        )
    return [
        *_aligned(rows, text_last=False),
        "per cent of the words whose pieces are all most probable where they stand, given what is",
        "before them (number of the verb: whose form is more probable than the other number's),",
        "and nats a piece.",
    ]


def _cost_lines(needed: Sequence[Costs]) -> list[str]:
    from trainer.heads_page import loss_interval

    rows: list[tuple[str, ...]] = [
        ("silenced", "all heads", "without it", "lost", "won", "loss in 100", "most needed by")
    ]
    rows += [
        (
            str(cost.head),
            f"{100 * group.right:.1f} %",
            f"{100 * cost.right:.1f} %",
            f"{cost.lost:,}",
            f"{cost.won:,}",
            loss_interval(cost),
            f"{group.group} ({group.cases:,})",
        )
        for group in needed
        for cost in group.heads
    ]
    if len(rows) == 1:
        return []
    return [
        *_aligned(rows),
        "the heads whose silencing loses most words of the validation set, and what it does to",
        "those of the test set: right with all heads and without this one, words lost and won, and",
        "95 % of the loss less what is won, by resampling sentences.",
    ]


def _aligned(rows: Sequence[Sequence[str]], *, text_last: bool = True) -> list[str]:
    """Lines of columns; the first and, if it is text, the last begin at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        if text_last:
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return lines


def _draw(file: Path, needed: Needed, name: str) -> None:
    import numpy as np

    from trainer.heatmaps import Panel, write_image

    lost = [
        [max(0.0, whole.right - right[group].right) for right in needed.silenced.values()]
        for group, whole in needed.whole.items()
    ]
    write_image(
        file,
        [Panel("what one head is needed for", np.array(lost))],
        list(needed.whole),
        list(map(str, needed.silenced)),
        title=name,
        row_name="words that are written",
        column_name="the head that is silenced (layer.head)",
        value_name="share of the words lost",
        least_number=0.02,
    )


def _as_json(
    step: int,
    num_sentences: int,
    found: dict[Kind, Profile],
    grammar: Sequence[Finding],
) -> dict[str, Any]:
    """Layers and heads are counted from 1, as everywhere a person reads them."""
    from trainer.silenced_heads import HeadName

    result: dict[str, Any] = {"step": step, "sentences": num_sentences, "heads": []}
    for kind, profile in found.items():
        num_layers, num_heads = profile.edge.shape
        for at in ((layer, head) for layer in range(num_layers) for head in range(num_heads)):
            result["heads"].append(
                {
                    "head": str(HeadName(kind, *at)),
                    "at": {str(offset): float(share[at]) for offset, share in profile.at.items()},
                    "sharpest": float(profile.sharpest[at]),
                    "spread": float(profile.spread[at]),
                    "edge": float(profile.edge[at]),
                    "marks": float(profile.marks[at]),
                }
            )
    result["grammar"] = []
    for one in grammar:
        values = asdict(one)
        kind, layer, head = (values.pop(key) for key in ("kind", "layer", "head"))
        result["grammar"].append({"head": str(HeadName(kind, layer, head)), **values})
    return result


def _silenced_as_json(measured: Needed, needed: Sequence[Costs] = ()) -> dict[str, Any]:
    def groups(rights: dict[str, Right]) -> dict[str, Any]:
        return {
            group: {"cases": right.cases, "right": right.right, "nats": right.nats}
            for group, right in rights.items()
        }

    result: dict[str, Any] = {
        "all_heads": groups(measured.whole),
        "silenced": {str(head): groups(rights) for head, rights in measured.silenced.items()},
    }
    if needed:
        result["most_needed"] = [
            {
                **asdict(group),
                "heads": [{**asdict(cost), "head": str(cost.head)} for cost in group.heads],
            }
            for group in needed
        ]
    return result
