"""Overlays with components as ``kubectl kustomize`` renders them, and what may go together."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
COMPONENTS = tuple(sorted(path.name for path in (K8S / "components").iterdir()))

# Each decides alone when pods start, and Kueue admits no pods that come later.
NOT_TOGETHER = ({"kueue", "elastic"}, {"kueue", "volcano"}, {"kueue", "kai"}, {"volcano", "kai"})

Documents = list[dict[str, Any]]
Choice = tuple[str, tuple[str, ...]]


def kustomize(folder: Path) -> Documents:
    """What ``kubectl apply -k`` would apply."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, whose kustomize renders the manifests")
    ended = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return list(yaml.load_all(ended.stdout, yaml.CSafeLoader))


def kustomization(folder: Path, choice: Choice, more: dict[str, Any] | None = None) -> Path:
    """Write one into ``folder`` that lists the overlay and the components."""
    overlay, components = choice
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(K8S / "overlays" / overlay, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
        **(more or {}),
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@cache
def render(choice: Choice) -> Documents:
    """An overlay with components; whoever changes it copies it first."""
    with tempfile.TemporaryDirectory() as folder:
        # Where symbolic links lead, relative paths lead elsewhere.
        return kustomize(kustomization(Path(folder).resolve(), choice))


def render_all(choices: Iterable[Choice]) -> Iterator[tuple[Choice, Documents]]:
    """Several at a time, in their order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        choices = list(choices)
        yield from zip(choices, pool.map(render, choices), strict=True)


def compatible(components: Iterable[str]) -> bool:
    return not any(pair <= set(components) for pair in NOT_TOGETHER)


def singly() -> Iterator[Choice]:
    """Every overlay alone, and with each component."""
    for overlay in OVERLAYS:
        yield overlay, ()
        yield from ((overlay, (name,)) for name in COMPONENTS)


def largest() -> Iterator[Choice]:
    """Every overlay with as many components as go together, forwards and backwards."""
    free = set(COMPONENTS).difference(*NOT_TOGETHER)
    schedulers = itertools.cycle([{"kueue"}, {"volcano", "elastic"}, {"kai", "elastic"}])
    for number, (overlay, few) in enumerate(zip(OVERLAYS, schedulers, strict=False)):
        yield overlay, tuple(sorted(free | few, reverse=bool(number % 2)))


def everything() -> Iterator[Choice]:
    """Every overlay with every set of components that go together."""
    for number in range(len(COMPONENTS) + 1):
        for names in filter(compatible, itertools.combinations(COMPONENTS, number)):
            yield from ((overlay, names) for overlay in OVERLAYS)
