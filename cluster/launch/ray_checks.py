"""What a look at a Ray cluster tells before a launch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, Literal

from cluster.checks import Check
from data_shards.errors import UserError


def check_ray(version: str) -> Check:
    """Whether this code runs on that version of Ray."""
    import ray

    ours = ray.__version__
    if version == ours:
        return Check("Ray there", "ok", version)
    outcome: Literal["warning", "failure"] = "warning"
    if _numbers(version) < _numbers(ours):
        outcome = "failure"
    return Check(
        "Ray there",
        outcome,
        f"{version}; babelray is made for {ours}",
        f"run Ray {ours} on the cluster's machines (requirements.lock)",
    )


def check_python(version: str | None) -> Check:
    """Whether this code runs on that version of Python."""
    ours = ".".join(map(str, sys.version_info[:3]))
    if version is None:
        return Check("Python there", "warning", "the cluster does not tell its version")
    if _numbers(version) < (3, 11):
        return Check(
            "Python there",
            "failure",
            version,
            "the machines need Python 3.11 or newer",
        )
    if _numbers(version) != _numbers(ours):
        return Check(
            "Python there",
            "warning",
            f"{version}; here {ours}",
            "the job runs there alone and does not mind; what is tested is the one here",
        )
    return Check("Python there", "ok", version)


def check_room(nodes: Sequence[dict[str, Any]], arguments: Sequence[str]) -> Check:
    """Whether the cluster has a place for each worker that ``arguments`` of babelray ask for."""
    least = _workers_of(arguments)
    totals = [node.get("resources_total") or {} for node in nodes]
    gpus = sum(int(total.get("GPU", 0)) for total in totals)
    cpus = sum(int(total.get("CPU", 0)) for total in totals)
    found = f"{len(nodes)} machines with {cpus} CPUs and {gpus} GPUs"
    places = gpus or cpus
    if least is None or places >= least:
        return Check("room", "ok", found)
    return Check(
        "room",
        "warning",
        f"{found}; {least} workers need one {'GPU' if gpus else 'CPU'} each",
        "give fewer --nodes or --gpus, or add machines: a training waits five minutes for them, "
        "and then fails",
    )


def gpus_of_one(nodes: Sequence[dict[str, Any]]) -> int | None:
    """GPUs of each machine that has any; None if none has.

    Raises:
        UserError: they differ.
    """
    totals = [node.get("resources_total") or {} for node in nodes]
    found = sorted({int(total["GPU"]) for total in totals if total.get("GPU")})
    if len(found) > 1:
        numbers = ", ".join(map(str, found))
        raise UserError(
            f"the cluster's machines have different numbers of GPUs ({numbers}): give --gpus, the "
            "workers on each"
        )
    return found[0] if found else None


def _workers_of(arguments: Sequence[str]) -> int | None:
    """The least number of workers that ``--workers`` asks for, or the doctor's ``--expect``."""
    for name, value in pairwise(arguments):
        if name in {"--workers", "--expect"}:
            with suppress(ValueError):
                return int(value.partition(":")[0])
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
