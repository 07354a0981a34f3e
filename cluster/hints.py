"""What a command tells a person to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

DEFAULT_RUNS = Path("runs")


def runs_flag(runs: Path) -> str:
    """What must follow a command of a run, so that it finds its folder; nothing by default."""
    if runs.absolute() == DEFAULT_RUNS.absolute():
        return ""
    return f" --runs {shlex.quote(str(runs))}"
