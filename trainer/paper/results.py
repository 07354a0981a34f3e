"""Files of measured results, from which a page's tables and plots are made."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data_shards.errors import UserError
from trainer.storage import write_atomically


def check_place(file: Path) -> None:
    """That ``file`` could be written, before minutes of measuring; makes nothing.

    Raises:
        UserError: it cannot be.
    """
    found = next(path for path in (file, *file.absolute().parents) if path.exists())
    if found == file:
        fault = "it is a folder" if file.is_dir() else ""
    else:
        fault = "" if found.is_dir() else f"{found} is no folder"
    folder = file.parent if found == file else found
    if not fault and not os.access(folder, os.W_OK | os.X_OK):
        fault = f"{folder} may not be written into"
    if fault:
        raise UserError(f"{file} cannot be written: {fault}: choose another place")


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """As JSON, a line for each row of a list: changes can be read and the file stays short.

    Raises:
        UserError: it cannot be written; an older file is then as it was.
    """
    parts = []
    for name, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    try:
        write_atomically(file, "{\n" + ",\n".join(parts) + "\n}\n")
    except OSError as error:
        raise UserError(
            f"the results cannot be written: {file}: {error.strerror}: choose another place"
        ) from None


def read_result(
    file: Path,
    command: str,
    *,
    form: object,
    objects: Mapping[str, Collection[str]],
    rows: Mapping[str, Collection[str]],
) -> dict[str, Any]:
    """What ``write_result`` wrote for a command, as far as its tables need it.

    Args:
        form: what must stand as its ``format``.
        objects: entries that are objects, with the names that each must have.
        rows: entries that are lists of at least one object, with the names that each must have.

    Raises:
        UserError: there is no such file, it is not one of these, or something is missing.
    """
    mend = f"give a file that babelray {command} --output wrote, or measure without --input"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--input {file}: {error.strerror}: {mend}") from None
    except ValueError:
        raise UserError(f"--input {file}: this is not JSON: {mend}") from None
    if not isinstance(found, dict) or found.get("format") != form:
        raise UserError(f"--input {file}: these are no results of {command}: {mend}")
    missing = _missing(found, objects, rows)
    if missing:
        raise UserError(f"--input {file}: {missing}: {mend}")
    return found


def _missing(
    found: Mapping[str, Any],
    objects: Mapping[str, Collection[str]],
    rows: Mapping[str, Collection[str]],
) -> str:
    """The first thing that is; empty if none."""
    for name, keys in objects.items():
        value = found.get(name)
        if not isinstance(value, dict):
            return f"{name!r} is missing"
        for key in keys:
            if key not in value:
                return f"{name!r} lacks {key!r}"
    for name, keys in rows.items():
        values = found.get(name)
        if not isinstance(values, list) or not values:
            return f"{name!r} is missing or empty"
        for number, row in enumerate(values, start=1):
            for key in keys:
                if not isinstance(row, dict) or key not in row:
                    return f"row {number} of {name!r} lacks {key!r}"
    return ""
