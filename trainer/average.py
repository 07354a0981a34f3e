"""The mean of several checkpoints' weights.

Source: Vaswani et al. 2017, section 6.1: the base models average the last 5 checkpoints, the big
ones the last 20.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_shards.errors import UserError


def average_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The element-wise mean of the weights in ``files``.

    One tensor is summed at a time, so memory holds one model and one tensor more, however many
    files there are. Sums are float64, so that the mean does not depend on the files' order.

    Args:
        files: safetensors files of the same model, at least one.

    Returns:
        name -> float32 tensor. The weights of a single file come back unchanged.

    Raises:
        UserError: a file is missing or unreadable, or two files hold different models.
    """
    if not files:
        raise ValueError("nothing to average: no files given")
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_open(file)) for file in files]
        shapes = _shapes(readers[0])
        for file, reader in zip(files[1:], readers[1:], strict=True):
            _check_same(files[0], shapes, file, _shapes(reader))
        means = {}
        for name in shapes:
            total = readers[0].get_tensor(name).to(torch.float64)
            for reader in readers[1:]:
                total += reader.get_tensor(name)
            means[name] = (total / len(readers)).to(torch.float32)
    return means


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"weights not found: {file}: choose another checkpoint") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"weights cannot be read: {file}: {error}: choose another checkpoint"
        ) from None


def _shapes(reader: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(reader.get_slice(name).get_shape()) for name in sorted(reader.keys())}


def _check_same(
    first: Path, expected: dict[str, tuple[int, ...]], file: Path, found: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{first} and {file} are of different models and cannot be averaged: {name} has "
                f"shape {expected.get(name, 'none')} in one and {found.get(name, 'none')} in the "
                "other"
            )
