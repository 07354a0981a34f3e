"""Manifests against the schemas of their kinds, unknown fields refused."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.35"
_PLACE = os.environ.get("BABELRAY_TEST_CRDS")
CRDS = Path(_PLACE) if _PLACE else Path(__file__).resolve().parents[3] / "shared" / "crds"
_GROUPS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com")

_sound: set[str] = set()


def problems(document: dict[str, Any]) -> list[str]:
    """What the API server would refuse, one line each; empty if it would take the document."""
    text = json.dumps(document, sort_keys=True)
    if text in _sound:  # many renderings share most documents
        return []
    group = document["apiVersion"].partition("/")[0]
    found = _custom(document) if group in _GROUPS else _built_in(document)
    if not found:
        _sound.add(text)
    return found


def _built_in(document: dict[str, Any]) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of jsonschema, which the package uses in an old way
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _custom(document: dict[str, Any]) -> list[str]:
    validator = _validator(document["apiVersion"], document["kind"])
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft7Validator:
    group, _, version = api_version.partition("/")
    file = CRDS / f"{group}_{_plural(kind)}.yaml"
    if not file.is_file():
        pytest.skip(f"needs the definition of {kind}: {file} (BABELRAY_TEST_CRDS names a folder)")
    versions = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    (found,) = [entry for entry in versions if entry["name"] == version]
    assert found["served"], api_version
    assert not found.get("deprecated"), api_version
    schema = strict(found["schema"]["openAPIV3Schema"])
    # The API server knows metadata better than the definition, which says "object" only.
    schema["properties"]["metadata"] = _METADATA
    return jsonschema.Draft7Validator(schema)


def _plural(kind: str) -> str:
    return kind.lower() + "s"


_WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": _WORDS,
    },
    "required": ["name"],
    "additionalProperties": False,
}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition's schema as JSON Schema, in which a field that is not named is an error."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable"):
        made["type"] = [made["type"], "null"]
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        made["items"] = strict(schema["items"])
    made.pop("format", None)
    return made


def container_lists(document: Any) -> Iterator[list[dict[str, Any]]]:
    """Every list of containers, however deep."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in ("containers", "initContainers"):
                yield value
            yield from container_lists(value)
    elif isinstance(document, list):
        for value in document:
            yield from container_lists(value)
