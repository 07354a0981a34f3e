"""The tables of docs/attention.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.grammar_heads import Finding
from trainer.heads_page import grammar_table, silenced_table
from trainer.needed_heads import Cost, Costs
from trainer.silenced_heads import HeadName

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("heads-*.json"))


def _named(values):
    kind, _, at = values["head"].partition(" ")
    layer, head = map(int, at.split("."))
    return HeadName(kind, layer - 1, head - 1)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results").glob("heads-*.json")),
                         ids=lambda file: file.stem)  # fmt: skip
def test_the_pages_tables_are_those_of_the_results(file):
    text = (ROOT / "docs/attention.md").read_text(encoding="utf-8")
    result = json.loads(file.read_text(encoding="utf-8"))
    run = result["run"]
    assert file.stem == f"heads-{run}"
    needed = [
        Costs(
            **{
                **group,
                "heads": tuple(
                    Cost(**{**one, "head": _named(one), "interval": one["interval"]})
                    for one in group["heads"]
                ),
            }
        )
        for group in result.get("most_needed", [])
    ]
    grammar = []
    for one in result["grammar"]:
        at = _named(one)
        rest = {key: value for key, value in one.items() if key != "head"}
        grammar.append(Finding(kind=at.kind, layer=at.layer, head=at.head, **rest))
    for part, found, table in (
        ("silenced", needed, silenced_table(needed)),
        ("grammar", grammar, grammar_table(grammar)),
    ):
        begin = f"<!-- {run} {part}: begin -->"
        if found:
            assert f"{begin}\n\n{table}\n\n<!--" in text
        else:
            assert begin not in text
