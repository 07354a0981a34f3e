"""Table 3 for people: in a terminal, and as parts of docs/paper/table3.md with its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.config import parse_config
from trainer.paper.charts import Panel, Series, write_charts
from trainer.paper.pages import markdown_table, write_parts
from trainer.paper.table3 import BASE, ROWS, Row
from trainer.paper.table3_sizes import (
    ARCHITECTURES,
    BIG,
    FITTING_VOCABULARY,
    OURS,
    PAPER_VOCABULARY,
    Architecture,
    allowed_by_all,
    listed,
    millions,
    reckoned,
)

Verdict = Literal["agrees", "disagrees", "undecided"]
# One row, and several.
_VERBS: dict[Verdict, tuple[str, str]] = {
    "agrees": ("agrees", "agree"),
    "disagrees": ("disagrees", "disagree"),
    "undecided": ("is undecided", "are undecided"),
}

# Smaller differences of the paper's are none: it prints perplexity with two digits and BLEU with
# one, and reports single trainings.
_NONE = {"perplexity": 0.015, "bleu_valid": 0.15}
_PAPER = {"perplexity": "perplexity", "bleu_valid": "bleu"}

Summary = Mapping[str, Any]


def half_width(judged: Mapping[str, Any]) -> float | None:
    """Half of a 95 % interval for both, which sentences and which seed; None if one is unknown."""
    if judged["seeds"] is None:
        return None
    low, high = judged["sentences"]
    return math.hypot(judged["seeds"], (high - low) / 2)


def verdict(row: Mapping[str, Any], metric: str) -> Verdict | None:
    """Whether a row differs from the base as in the paper; None for the base.

    It agrees if it differs surely and to the same side; where the paper's two are (almost) equal,
    if it does not differ surely. It disagrees if it differs surely and to the other side, or where
    the paper's do not.
    """
    difference = row[metric]["difference"]
    if difference is None:
        return None
    width = half_width(difference)
    is_sure = width is not None and abs(difference["mean"]) > width
    paper = paper_difference(ROWS[row["row"]], metric)
    if abs(paper) < _NONE[metric]:
        return "disagrees" if is_sure else "agrees"
    if not is_sure:
        return "undecided"
    return "agrees" if (paper > 0) == (difference["mean"] > 0) else "disagrees"


def paper_difference(row: Row, metric: str) -> float:
    """A row minus base, in the paper."""
    own: float = getattr(row, _PAPER[metric])
    return own - float(getattr(ROWS[BASE], _PAPER[metric]))


SCORES_HEADER = (
    "row", "here", "seeds", "parameters", "perplexity", "BLEU valid", "BLEU test",
    "paper: perplexity", "BLEU", "million parameters",
)  # fmt: skip
DIFFERENCES_HEADER = (
    "row", "perplexity", "paper's", "verdict", "BLEU valid", "paper's", "verdict", "BLEU test",
)  # fmt: skip


def score_cells(summary: Summary) -> list[list[str]]:
    """A line a row, with intervals of 95 %, the paper's numbers beside them."""
    return [
        [
            row["row"],
            _changes(row["model"]) or "-",
            str(len(row["seeds"])),
            f"{row['parameters']:,}",
            _with_interval(row["perplexity"]),
            _with_interval(row["bleu_valid"]),
            _with_interval(row["bleu_test"]),
            f"{ROWS[row['row']].perplexity:.2f}",
            f"{ROWS[row['row']].bleu:.1f}",
            str(ROWS[row["row"]].parameters or ""),
        ]
        for row in summary["rows"]
    ]


def difference_cells(summary: Summary) -> list[list[str]]:
    """A line a row but the base: its difference from the base, here and in the paper."""
    cells = []
    for row in summary["rows"]:
        if row["perplexity"]["difference"] is None:
            continue
        line = [row["row"]]
        for metric, digits in (("perplexity", 2), ("bleu_valid", 1)):
            line += [
                _with_interval(row[metric]["difference"], sign="+"),
                f"{paper_difference(ROWS[row['row']], metric):+.{digits}f}",
                verdict(row, metric) or "",
            ]
        cells.append([*line, _with_interval(row["bleu_test"]["difference"], sign="+")])
    return cells


def _with_interval(judged: Mapping[str, Any], sign: str = "") -> str:
    width = half_width(judged)
    shown = f"{judged['mean']:{sign}.2f}"
    if width is not None:
        return f"{shown} ± {width:.2f}"
    low, high = judged["sentences"]
    return f"{shown} ({low:{sign}.2f} to {high:{sign}.2f})"


def _changes(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def counts(summary: Summary, metric: str) -> dict[Verdict, list[str]]:
    """The rows by verdict."""
    found: dict[Verdict, list[str]] = {"agrees": [], "disagrees": [], "undecided": []}
    for row in summary["rows"]:
        judged = verdict(row, metric)
        if judged is not None:
            found[judged].append(row["row"])
    return found


def verdict_lines(summary: Summary) -> list[str]:
    """How many rows agree, by metric, with their names."""
    lines = []
    for metric, name in (("perplexity", "perplexity"), ("bleu_valid", "BLEU")):
        found = counts(summary, metric)
        number = sum(map(len, found.values()))
        told = "; ".join(
            f"{len(rows)} {_VERBS[word][len(rows) > 1]} ({', '.join(rows)})"
            for word, rows in found.items()
            if rows
        )
        lines.append(f"{name}, of {number} rows: {told or 'no rows beside the base'}")
    return lines


def setting_lines(summary: Summary) -> list[str]:
    """What was trained and measured, from the result itself."""
    config = parse_config(summary["config"], where="the result")
    rows = summary["rows"]
    data, trainer = config.data, config.trainer
    seconds = [second for row in rows for second in row["seconds"]]
    noise = summary["seed_noise"]
    machine, versions = summary["machine"], summary["versions"]
    lines = [
        f"{len(seconds)} trainings of {len(rows)} rows, each {summary['steps']:,} updates of at "
        f"most {data.tokens_per_step:,} source and as many target pieces "
        f"({rows[0]['target_tokens']:,} target pieces in all), corpus {data.corpus} "
        f"{data.source}-{data.target}, {data.vocabulary_size:,} pieces, {trainer.precision}, "
        f"{trainer.threads or 'all'} CPU thread(s) a training.",
        f"Machine: {machine.get('gpu') or machine.get('cpu')}, {machine.get('cores')} cores; "
        f"torch {versions.get('torch')}, ray {versions.get('ray')}, deepspeed "
        f"{versions.get('deepspeed')}. A training took {min(seconds) / 60:.1f} to "
        f"{max(seconds) / 60:.1f} minutes by the clock, beside other work on the machine.",
        f"BLEU: sacreBLEU {summary['signature']}; sentences: "
        + ", ".join(f"{name} {number:,}" for name, number in summary["sentences"].items())
        + ".",
        "Standard deviation from seed to seed, pooled over rows with several seeds: "
        + "; ".join(
            f"{label} {noise[metric]['deviation']:.2f} ({noise[metric]['freedom']} degrees of "
            "freedom)"
            if noise[metric]["deviation"] is not None
            else f"{label} unknown, no row has two seeds"
            for metric, label in (
                ("perplexity", "perplexity"),
                ("bleu_valid", "BLEU valid"),
                ("bleu_test", "BLEU test"),
            )
        )
        + ".",
    ]
    return [f"- {line}" for line in lines]


def seed_table(summary: Summary) -> str:
    """A line a training."""
    metrics = ("perplexity", "bleu_valid", "bleu_test")
    cells = [
        [row["row"], str(seed), *(f"{row[f'{metric}_of_seeds'][index]:.2f}" for metric in metrics)]
        for row in summary["rows"]
        for index, seed in enumerate(row["seeds"])
    ]
    return markdown_table(("row", "seed", "perplexity", "BLEU valid", "BLEU test"), cells)


def size_cells() -> list[list[str]]:
    """The rows that the paper lists parameters for, with two vocabularies and what each allows."""
    cells = []
    for row in listed():
        allowed = OURS.allows(row)
        cells.append(
            [
                row.name,
                str(row.parameters),
                f"{reckoned(row, PAPER_VOCABULARY):,}",
                f"{reckoned(row, FITTING_VOCABULARY):,}",
                str(millions(reckoned(row, PAPER_VOCABULARY))),
                str(millions(reckoned(row, FITTING_VOCABULARY))),
                f"{allowed[0]:,} to {allowed[-1]:,}",
            ]
        )
    return cells


SIZE_HEADER = (
    "row", "paper, million", f"with {PAPER_VOCABULARY:,} pieces",
    f"with {FITTING_VOCABULARY:,} pieces", "so, million", "so, million",
    "vocabularies that give the paper's number",
)  # fmt: skip


def architecture_cells() -> list[list[str]]:
    """For each reading of the paper, the vocabularies of all rows but "big", and of "big"."""
    cells = []
    for architecture in ARCHITECTURES:
        others, big = allowed_by_all(architecture), architecture.allows(ROWS[BIG])
        cells.append([_described(architecture), _range(others), _range(big)])
    return cells


ARCHITECTURE_HEADER = ("architecture", "all rows but big", "big")


def _range(values: range) -> str:
    return f"{values[0]:,} to {values[-1]:,}" if len(values) else "none"


def _described(architecture: Architecture) -> str:
    matrices = {1: "one shared matrix", 2: "two matrices", 3: "three matrices"}
    biases = {"all": "all biases", "feed-forward": "biases in the feed-forward layers only",
              "none": "no biases"}  # fmt: skip
    norms = "norms with gain and bias" if architecture.norms else "norms without parameters"
    return f"{matrices[architecture.matrices]}, {biases[architecture.biases]}, {norms}"


def write(summary: Summary, page: Path, image: Path | None = None) -> None:
    """Put the results into the page, between their marks, and draw the picture.

    Raises:
        UserError: the page lacks the marks, or a file cannot be written.
    """
    write_parts(
        page,
        {
            "sizes": markdown_table(SIZE_HEADER, size_cells()),
            "architectures": markdown_table(ARCHITECTURE_HEADER, architecture_cells()),
            "setting": "\n".join(setting_lines(summary)),
            "scores": markdown_table(SCORES_HEADER, score_cells(summary), text=2),
            "differences": markdown_table(DIFFERENCES_HEADER, difference_cells(summary)),
            "verdicts": "\n".join(f"- {line}" for line in verdict_lines(summary)),
            "seeds": seed_table(summary),
        },
    )
    if image is not None:
        draw(summary, image)


def write_trainings(summary: Summary, page: Path, part: str) -> None:
    """Only the line of each training, into a part of the page with a name of its own.

    Raises:
        UserError: as ``write``.
    """
    write_parts(page, {part: seed_table(summary)})


def draw(summary: Summary, image: Path) -> None:
    """The rows' differences from the base, here and in the paper."""
    panels = [
        panel
        for metric, label in (("perplexity", "perplexity, base = 1"), ("bleu_valid", "BLEU"))
        for panel in [_panel(summary, metric, label)]
    ]
    write_charts(image, panels, title="Table 3: rows against the base")


def _panel(summary: Summary, metric: str, label: str) -> Panel:
    rows = [row for row in summary["rows"] if row[metric]["difference"] is not None]
    base = next((row for row in summary["rows"] if row["row"] == BASE), None)
    is_ratio = metric == "perplexity"
    own_base = base[metric]["mean"] if base is not None else math.nan
    paper_base = float(getattr(ROWS[BASE], _PAPER[metric]))
    places = list(range(len(rows)))

    def shown(difference: float, of: float) -> float:
        return 1 + difference / of if is_ratio else difference

    means = [row[metric]["difference"]["mean"] for row in rows]
    widths = [half_width(row[metric]["difference"]) or 0.0 for row in rows]
    ours = Series(
        "here, 95 % interval",
        places,
        [shown(mean, own_base) for mean in means],
        low=[shown(mean - width, own_base) for mean, width in zip(means, widths, strict=True)],
        high=[shown(mean + width, own_base) for mean, width in zip(means, widths, strict=True)],
        style="points",
    )
    paper = Series(
        "paper",
        [place + 0.25 for place in places],
        [shown(paper_difference(ROWS[row["row"]], metric), paper_base) for row in rows],
        style="points",
    )
    return Panel(
        f"{'Perplexity' if is_ratio else 'BLEU'} (validation)",
        "",
        f"{label}" if is_ratio else "BLEU minus the base's",
        [ours, paper],
        x_ticks={float(place): row["row"] for place, row in enumerate(rows)},
    )


def text(summary: Summary) -> tuple[Sequence[Sequence[str]], Sequence[Sequence[str]], list[str]]:
    """For a terminal: the two tables with their headers, and the lines below."""
    return (
        [SCORES_HEADER, *score_cells(summary)],
        [DIFFERENCES_HEADER, *difference_cells(summary)],
        verdict_lines(summary),
    )
