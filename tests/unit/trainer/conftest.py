"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import make_run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with checkpoints of steps 60, 120 and 180; a test that writes works on a copy."""
    return make_run(tmp_path_factory.mktemp("trained"), steps=(60, 120, 180))
