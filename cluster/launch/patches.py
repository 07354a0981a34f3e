"""Changes that a kustomization makes to the objects below it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def names_of(config: Mapping[str, Any]) -> list[str]:
    """How a generated ConfigMap may be called while kustomize works: the hash comes last."""
    name = str(config["metadata"]["name"])
    return [name, re.sub(r"-[0-9a-z]{10}$", "", name)]


def patch(document: Mapping[str, Any], changes: Sequence[dict[str, object]]) -> dict[str, object]:
    """An entry of ``patches`` that makes these changes to one object, its name included."""
    target = {"kind": document["kind"], "name": document["metadata"]["name"]}
    patch = json.dumps(list(changes), ensure_ascii=False)
    return {"target": target, "options": {"allowNameChange": True}, "patch": patch}


def deletion(document: Mapping[str, Any]) -> dict[str, object]:
    """An entry of ``patches`` that leaves an object out."""
    kind, names = document["kind"], dict.fromkeys(names_of(document))
    body = {"$patch": "delete", "apiVersion": document["apiVersion"], "kind": kind}
    body["metadata"] = {"name": document["metadata"]["name"]}
    return {"target": {"kind": kind, "name": "|".join(names)}, "patch": json.dumps(body)}


def renamed(value: object, names: Mapping[str, str], path: str = "") -> Iterator[dict[str, object]]:
    """Changes that put new names wherever a string is exactly an old one."""
    if isinstance(value, str):
        if value in names and names[value] != value:
            yield change(path, names[value])
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from renamed(inner, names, f"{path}/{escape(str(key))}")
    elif isinstance(value, Sequence):
        for index, inner in enumerate(value):
            yield from renamed(inner, names, f"{path}/{index}")


def strings(value: object) -> Iterator[str]:
    """Every string in a value, keys not counted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from strings(inner)


def escape(key: str) -> str:
    """A key as a JSON pointer has it."""
    return key.replace("~", "~0").replace("/", "~1")


def change(path: str, value: object) -> dict[str, object]:
    """One JSON 6902 change: the value at a path, there already or not."""
    # "add" replaces what a mapping has already; in a list only "replace" does.
    op = "replace" if path.rpartition("/")[2].isdecimal() else "add"
    return {"op": op, "path": path, "value": value}
