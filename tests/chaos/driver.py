"""``python -m tests.chaos.driver``: ``babelray train`` with the recorder in every rank."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from cluster import naming
from cluster.train import start
from data_shards.errors import UserError
from data_shards.shards import prepare
from tests.chaos import recorder


def main() -> int:
    """The exit statuses are those of the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--workers", required=True, help="N or MIN:MAX")
    parser.add_argument("--options", default="{}", help="recorder.Options as JSON")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    values: dict[str, Any] = json.loads(given.options)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    options = recorder.Options(**values)
    try:
        config, name = naming.open_run(
            given.config, (), given.name, runs=given.runs, resume=given.resume
        )
        prepare(config.data)
        outcome = start(
            config,
            name,
            runs=given.runs,
            workers=_workers(given.workers),
            say=_say,
            train=functools.partial(recorder.train, options=options),
        )
    except UserError as error:
        _say(f"error: {error}")
        return error.exit_status
    _say(f"ended: {outcome.reason}, step {outcome.step}")
    return 0 if outcome.signal is None else 128 + outcome.signal


def _workers(text: str) -> int | tuple[int, int]:
    least, colon, most = text.partition(":")
    return (int(least), int(most)) if colon else int(least)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
