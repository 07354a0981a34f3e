"""A cluster of files for tests: ``tests/fake_kubectl.py`` on PATH, its objects and its rules."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).with_name("fake_kubectl.py")


class FakeCluster:
    """The folder that the fake kubectl answers from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "cluster"
        self.folder.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        # This interpreter without its packages starts fastest.
        _, _, code = FAKE.read_text().partition("\n")
        (commands / "kubectl").write_text(f"#!{Path(sys.executable).resolve()} -SE\n{code}")
        (commands / "kubectl").chmod(0o755)
        real = shutil.which("kubectl")
        if real is not None:
            monkeypatch.setenv("REAL_KUBECTL", real)
        monkeypatch.setenv("FAKE_KUBECTL", str(self.folder))
        monkeypatch.setenv("PATH", str(commands), prepend=":")
        self.rules: list[tuple[str, dict[str, Any]]] = []

    def put(self, kind: str, *objects: dict[str, Any]) -> None:
        """Objects that are there."""
        file = self.folder / "objects.json"
        present = json.loads(file.read_text()) if file.exists() else {}
        for value in objects:
            present[f"{kind}/{value['metadata']['name']}"] = value
        file.write_text(json.dumps(present))

    def rule(self, pattern: str, **answer: Any) -> None:
        """What a call that matches is answered, after the rules before it."""
        self.rules.append((pattern, answer))
        (self.folder / "rules.json").write_text(json.dumps(self.rules))

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls.txt"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def applied(self) -> str:
        return (self.folder / "applied.yaml").read_text()

    def called(self, *words: str) -> list[str]:
        """The calls that hold all these words."""
        return [call for call in self.calls if all(word in call for word in words)]


def rayjob(
    name: str = "train-demo", run: str = "demo", *, uid: str = "u1", **status: Any
) -> dict[str, Any]:
    """A RayJob as the API server returns it; ``status`` are fields of its status."""
    labels = {"app.kubernetes.io/name": "babelray"}
    annotations = {"babelray.dev/run": run}
    metadata = {"name": name, "uid": uid, "labels": labels, "annotations": annotations}
    return {"metadata": metadata, "spec": {"backoffLimit": 2}, "status": status}


def pod(
    name: str,
    *,
    ready: bool = False,
    phase: str = "Running",
    labels: dict[str, str] | None = None,
    unscheduled: str | None = None,
    state: dict[str, Any] | None = None,
    image: str = "reg.test/babelray:1",
    **more: Any,
) -> dict[str, Any]:
    """A pod with one container in a state."""
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    if unscheduled:
        conditions.append({"type": "PodScheduled", "status": "False", "message": unscheduled})
    container = {"name": "ray-worker", "image": image, "state": state or {}, **more}
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "labels": labels or {}},
        "status": {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [container] if state is not None else [],
        },
    }
