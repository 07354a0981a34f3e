"""Systems beside each other: which are compared, by which names, and what a result holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer.compare import compare
from trainer.decoding_job import Say, System, Translated
from trainer.run import read_config
from trainer.scores import bleu_metric


def check_languages(first: System, compared: Sequence[System]) -> None:
    """Before anything is translated: BLEU of this language can be had, and all translate into it.

    Raises:
        UserError: it cannot, or they do not.
    """

    def languages(system: System) -> tuple[str, str]:
        data = Manifest.load(read_config(system.run_dir).data.folder()).data
        return data.source_language, data.target_language

    bleu_metric(languages(first)[1])
    for other in compared:
        if other.run_dir != first.run_dir and languages(other) != languages(first):
            raise UserError(
                f"{other.run_dir.name} translates {'-'.join(languages(other))} and "
                f"{first.run_dir.name} {'-'.join(languages(first))}: they cannot be compared"
            )


def each_once(systems: Sequence[System]) -> list[System]:
    """The same run may be given by several paths."""
    return list({(s.run_dir.resolve(), replace(s, run_dir=Path())): s for s in systems}.values())


def run_names(systems: Sequence[System]) -> dict[Path, str]:
    """By folder; a number tells runs of one name apart."""
    names: dict[Path, str] = {}
    for system in systems:
        folder = system.run_dir.resolve()
        if folder not in names:
            name, number = system.run_dir.name, 2
            while name in names.values():
                name, number = f"{system.run_dir.name}-{number}", number + 1
            names[folder] = name
    return names


def with_compared(
    waiting: Sequence[Translated], others: Sequence[Translated], num_compared: int
) -> tuple[list[tuple[Translated, list[Translated]]], list[Translated]]:
    """Those whose test set all compared systems have translated, each with them; and the rest."""
    ready, rest = [], []
    for own in waiting:
        beside = [other for other in others if other.test_set is own.test_set]
        if len(beside) == num_compared:
            ready.append((own, sorted(beside, key=lambda other: other.number)))
        else:
            rest.append(own)
    return ready, rest


def compare_systems(
    own: Translated, others: Sequence[Translated], names: dict[Path, str], say: Say
) -> dict[str, Any] | None:
    """What the result holds; None where nothing is left that differs."""
    named: dict[str, Translated] = {}
    for item in (own, *others):
        name = f"{names[item.system.run_dir.resolve()]} {item.label}"
        if item is not own and item.digest == own.digest:
            say(f"{own.test_set.name}, checkpoint {own.label}: {name} is the very same system")
            continue
        unique, number = name, 2
        while unique in named:
            unique, number = f"{name} ({number})", number + 1
        named[unique] = item
    if len(named) < 2:
        return None
    comparison = compare(
        [(name, item.hypotheses) for name, item in named.items()],
        own.test_set.reference_streams,
        target_language=own.manifest.target_language,
    )
    return {
        **comparison.to_json(),
        "systems": [
            {
                "system": name,
                "run": str(item.system.run_dir.resolve()),
                "checkpoint": item.label,
                "step": item.step,
                "settings": item.system.evaluation.model_dump(mode="json"),
            }
            for name, item in named.items()
        ],
    }
