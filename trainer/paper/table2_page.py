"""Table 2 as Markdown: the parts of docs/paper/table2.md, from what ``table`` gives."""

from __future__ import annotations

from typing import Any

from trainer.exhibits_cost import format_flops
from trainer.formats import (
    format_duration,
    format_number,
    format_score,
    format_share,
    power_of_ten,
)
from trainer.paper.pages import markdown_table


def parts(found: dict[str, Any]) -> dict[str, str]:
    """Each part of the page by name: ``table``, ``counted``, ``runs``."""
    return {
        "table": _table(found["paper"]),
        "counted": _counted(found["counted"]),
        "runs": _runs(found["runs"]),
    }


def text(found: dict[str, Any]) -> str:
    """All of it, for a terminal."""
    return "\n\n".join(parts(found).values())


def _table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        ("the paper's Table 2", "BLEU en-de", "BLEU en-fr", "FLOPs en-de", "FLOPs en-fr"),
        [
            (
                row["model"],
                row["bleu_en_de"] or "–",
                row["bleu_en_fr"] or "–",
                _printed(row["flops_en_de"]),
                _printed(row["flops_en_fr"]),
            )
            for row in rows
        ],
    )


def _counted(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        (
            "training", "parameters", "steps", "tokens a step", "hours on 8 P100", "printed",
            "by the paper's method", "counted", "counted / method",
        ),
        [
            (
                row["name"],
                format_number(row["num_parameters"]),
                f"{row['steps']:,}",
                f"{row['source_tokens']:,.0f} + {row['target_tokens']:,.0f}",
                f"{row['hours']:g}",
                format_flops(row["paper_flops"]),
                format_flops(row["method_flops"]),
                format_flops(row["flops"]),
                format_share(row["utilisation"]),
            )
            for row in rows
        ],
    )  # fmt: skip


def _runs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No run was named."
    return markdown_table(
        (
            "run", "model", "corpus", "parameters", "steps", "time", "devices", "counted",
            "by the paper's method", "counted / method", "BLEU", "paper's BLEU",
        ),
        [
            (
                row["run"],
                row["model"] if row["kind"] == "transformer" else f"{row['kind']} {row['model']}",
                row["corpus"],
                format_number(row["num_parameters"]),
                f"{row['steps']:,}",
                format_duration(row["training_s"]),
                format_number(row["devices"]),
                format_flops(row["counted_flops"]),
                format_flops(row["method_flops"]),
                format_share(row["utilisation"]),
                format_score(row["bleu"]),
                format_score(row["paper_bleu"]),
            )
            for row in rows
        ],
        text=3,
    )  # fmt: skip


def _printed(flops: str | None) -> str:
    """``1.0e20`` as the paper has it, with all its digits."""
    if flops is None:
        return "–"
    mantissa, _, exponent = flops.partition("e")
    return f"{mantissa}·{power_of_ten(int(exponent))}"
