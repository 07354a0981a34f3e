"""Fixtures of the tests that need a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _only_with_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU; what a test took of its memory is given back."""
    yield torch.device("cuda", 0)
    torch.cuda.empty_cache()
