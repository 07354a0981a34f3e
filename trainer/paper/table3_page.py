"""Table 3 for people: in a terminal, and as parts of docs/paper/table3.md with its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.config import parse_config
from trainer.paper.charts import Panel, Series, write_charts
from trainer.paper.pages import check_page, markdown_table, write_parts
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
# The paper's text says of this row that quality drops; it names no smaller loss (section 6.2).
_SMALLEST_LOSS = "A-32-heads"
# Beside an interval of a row with one seed.
_ONE_SEED = "†"

Summary = Mapping[str, Any]


def as_good(metric: str) -> tuple[float, float]:
    """Between which a row is as good as the base: half of the smallest loss that the paper names.

    Of perplexity ratios to the base's, half taken in logarithms; of BLEU differences.
    """
    loss = against_base(ROWS[_SMALLEST_LOSS], metric)
    if metric == "perplexity":
        return 1 / math.sqrt(loss), math.sqrt(loss)
    return loss / 2, -loss / 2


def verdict(row: Mapping[str, Any], metric: str) -> Verdict | None:
    """Whether a row stands to the base as in the paper; None for the base.

    Where the paper's two differ, it agrees if it surely differs to the same side, and disagrees if
    it surely differs to the other. Where they are (almost) equal, it agrees if its whole interval
    lies in ``as_good``, and disagrees if all of it lies outside, to one side. Otherwise it is
    undecided, as without an interval.
    """
    found = row[metric]["against_base"]
    if found is None:
        return None
    if found["both"] is None:
        return "undecided"
    low, high = found["both"]
    none = 1.0 if metric == "perplexity" else 0.0
    paper = against_base(ROWS[row["row"]], metric)
    if _is_none(ROWS[row["row"]], metric):
        least, most = as_good(metric)
        if least < low and high < most:
            return "agrees"
        return "disagrees" if low > most or high < least else "undecided"
    if low <= none <= high:
        return "undecided"
    return "agrees" if (paper > none) == (found["mean"] > none) else "disagrees"


def against_base(row: Row, metric: str) -> float:
    """In the paper: of perplexity the row's by base's, of BLEU the row's minus base's."""
    own, base = (float(getattr(each, _PAPER[metric])) for each in (row, ROWS[BASE]))
    return own / base if metric == "perplexity" else own - base


def _is_none(row: Row, metric: str) -> bool:
    own, base = (float(getattr(each, _PAPER[metric])) for each in (row, ROWS[BASE]))
    return abs(own - base) < _NONE[metric]


SCORES_HEADER = (
    "row", "here", "seeds", "parameters", "perplexity", "BLEU valid", "BLEU test",
    "paper: perplexity", "BLEU", "million parameters",
)  # fmt: skip
AGAINST_HEADER = (
    "row", "perplexity by base's", "paper's", "verdict", "BLEU valid minus base's", "paper's",
    "verdict", "BLEU test minus base's",
)  # fmt: skip


def score_cells(summary: Summary) -> list[list[str]]:
    """A line a row, with intervals of 95 %, the paper's numbers beside them."""
    return [
        [
            row["row"],
            _changes(row["model"]) or "-",
            str(len(row["seeds"])),
            f"{row['parameters']:,}",
            _with_interval(row, "perplexity"),
            _with_interval(row, "bleu_valid"),
            _with_interval(row, "bleu_test"),
            f"{ROWS[row['row']].perplexity:.2f}",
            f"{ROWS[row['row']].bleu:.1f}",
            str(ROWS[row["row"]].parameters or ""),
        ]
        for row in summary["rows"]
    ]


def against_cells(summary: Summary) -> list[list[str]]:
    """A line a row but the base: how it stands to the base, here and in the paper."""
    cells = []
    for row in summary["rows"]:
        if row["perplexity"]["against_base"] is None:
            continue
        line = [row["row"]]
        for metric, style in (("perplexity", ".3f"), ("bleu_valid", "+.1f")):
            line += [
                _against_with_interval(row, metric),
                f"{against_base(ROWS[row['row']], metric):{style}}",
                verdict(row, metric) or "",
            ]
        cells.append([*line, _against_with_interval(row, "bleu_test")])
    return cells


def _with_interval(row: Mapping[str, Any], metric: str) -> str:
    return _shown(row, row[metric], ".2f")


def _against_with_interval(row: Mapping[str, Any], metric: str) -> str:
    return _shown(row, row[metric]["against_base"], ".3f" if metric == "perplexity" else "+.2f")


def _shown(row: Mapping[str, Any], estimate: Mapping[str, Any], style: str) -> str:
    """With the interval over sentences and seeds, or over sentences if that of seeds is unknown."""
    low, high = estimate["both"] or estimate["sentences"]
    mark = f" {_ONE_SEED}" if _rests_on_others(row) else ""
    return f"{estimate['mean']:{style}} ({low:{style}} to {high:{style}}){mark}"


def _rests_on_others(row: Mapping[str, Any]) -> bool:
    """Whether what seeds do to the row is taken from the other rows alone."""
    return len(row["seeds"]) == 1 and row["perplexity"]["both"] is not None


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


def margin_line() -> str:
    """What ``as_good`` is, in words."""
    paper, base = ROWS[_SMALLEST_LOSS], ROWS[BASE]
    least, most = as_good("perplexity")
    return (
        f"as good as base: perplexity {least:.3f} to {most:.3f} of base's, BLEU within "
        f"{as_good('bleu_valid')[1]:.1f}, half of the smallest loss that the paper's text names: "
        f"{paper.changed} ({paper.perplexity:.2f} against {base.perplexity:.2f}, {paper.bleu} "
        f"against {base.bleu})"
    )


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
        "Standard deviation from seed to seed, pooled over rows with several seeds (of perplexity "
        "in logarithms): "
        + "; ".join(
            f"{label} {noise[metric]['deviation']:.{digits}} ({noise[metric]['freedom']} degrees "
            "of freedom)"
            if noise[metric]["deviation"] is not None
            else f"{label} unknown, no row has two seeds"
            for metric, label, digits in (
                ("perplexity", "perplexity", "1%"),
                ("bleu_valid", "BLEU valid", "2f"),
                ("bleu_test", "BLEU test", "2f"),
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


PARTS = (
    "sizes",
    "architectures",
    "setting",
    "scores",
    "differences",
    "margin",
    "verdicts",
    "seeds",
)


def check(page: Path, part: str | None) -> None:
    """That the page can be written, before an hour of training: as a whole, or only this part.

    Raises:
        UserError: it cannot.
    """
    check_page(page, PARTS if part is None else (part,), page.parent)


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
            "differences": markdown_table(AGAINST_HEADER, against_cells(summary)),
            "margin": f"- {margin_line()}",
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
    """The rows against the base, here and in the paper."""
    panels = [
        panel
        for metric, label in (("perplexity", "perplexity, base = 1"), ("bleu_valid", "BLEU"))
        for panel in [_panel(summary, metric, label)]
    ]
    write_charts(image, panels, title="Table 3: rows against the base", legend="below")


def _panel(summary: Summary, metric: str, label: str) -> Panel:
    rows = [row for row in summary["rows"] if row[metric]["against_base"] is not None]
    found = [row[metric]["against_base"] for row in rows]
    # Where nothing is known of seeds, a point without an interval.
    bounds = [each["both"] or [each["mean"]] * 2 for each in found]
    places = list(range(len(rows)))
    ours = Series(
        f"here, 95 % interval ({_ONE_SEED} one seed)",
        places,
        [each["mean"] for each in found],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
        style="points",
    )
    paper = Series(
        "paper",
        [place + 0.25 for place in places],
        [against_base(ROWS[row["row"]], metric) for row in rows],
        style="points",
    )
    is_ratio = metric == "perplexity"
    return Panel(
        f"{'Perplexity' if is_ratio else 'BLEU'} (validation)",
        "",
        label if is_ratio else "BLEU minus the base's",
        [ours, paper],
        x_ticks={
            float(place): row["row"] + (f" {_ONE_SEED}" if _rests_on_others(row) else "")
            for place, row in enumerate(rows)
        },
    )


def text(summary: Summary) -> tuple[Sequence[Sequence[str]], Sequence[Sequence[str]], list[str]]:
    """For a terminal: the two tables with their headers, and the lines below."""
    return (
        [SCORES_HEADER, *score_cells(summary)],
        [AGAINST_HEADER, *against_cells(summary)],
        _notes(summary),
    )


def _notes(summary: Summary) -> list[str]:
    notes = [*verdict_lines(summary), margin_line()]
    if any(_rests_on_others(row) for row in summary["rows"]):
        notes.append(
            f"{_ONE_SEED} one seed: what seeds do is taken from the rows with several, pooled"
        )
    return notes
