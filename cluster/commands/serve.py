"""``babelray serve``."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from cluster.options import (
    checkpoint_option,
    evaluation_settings,
    runs_option,
    say,
    search_option,
)
from data_shards.errors import UserError

_VARIABLE = "BABELRAY_TOKEN"

# Requests a minute of one client, where the network can reach the server.
_RATE_ABROAD = 600


def _replicas(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """A number of replicas, or the least and the most: ``2``, ``1:4``."""
    parts = value.split(":")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]{1,4}", part) for part in parts):
        raise click.BadParameter(f"{value!r}: give a number, such as 2, or bounds, such as 1:4")
    least, most = int(parts[0]), int(parts[-1])
    if not 1 <= least <= most:
        raise click.BadParameter(f"{value!r}: at least 1, and the least first, such as 1:4")
    return least, most


@click.command()
@click.argument("run")
@checkpoint_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--token",
    metavar="TOKEN",
    help="What clients must show (Authorization: Bearer TOKEN). Other users of this machine can "
    f"read it here: rather give --token-file, or {_VARIABLE} in the environment.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take the token from this file.",
)
@click.option(
    "--replicas",
    callback=_replicas,
    default="1",
    show_default=True,
    metavar="N|MIN:MAX",
    help="Copies of the model; with MIN:MAX, as many as the requests need.",
)
@click.option(
    "--max-characters",
    type=click.IntRange(1, 1_000_000),
    default=2000,
    show_default=True,
    help="Longest text of one request.",
)
@click.option(
    "--rate",
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Requests a minute of one client; 0 for no limit. By default no limit on the loopback "
    f"interface, {_RATE_ABROAD} on others.",
)
@search_option
@runs_option
def serve(
    run: str,
    checkpoint: str,
    host: str,
    port: int,
    token: str | None,
    token_file: Path | None,
    replicas: tuple[int, int],
    max_characters: int,
    rate: int | None,
    settings: tuple[str, ...],
    runs: Path,
) -> None:
    """Serve the run RUN: a page to type sentences into, and a JSON endpoint.

    Listens on this machine alone unless --host says otherwise. Runs on this machine, or on the Ray
    cluster that RAY_ADDRESS names. Ctrl-C ends it; requests at work are finished.

    \b
    Examples:
      babelray serve demo
      babelray serve demo --checkpoint average --set evaluation.beam=8 --port 8080
      babelray serve demo --host 0.0.0.0 --token-file token.txt --replicas 1:4
      curl -d '{"text": "the old man sleeps", "num_best": 3}' \\
        -H 'Content-Type: application/json' http://127.0.0.1:8000/translate
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    evaluation = evaluation_settings(run_dir, settings)
    if token_file is not None:
        token = _read_token(token_file)
    elif token is None:
        token = os.environ.get(_VARIABLE)  # click takes an empty one for none
    _check_token(token)
    from cluster.serve import ServeOptions
    from cluster.serve import serve as serve_run
    from cluster.serve_limits import is_loopback

    if rate is None:
        rate = 0 if is_loopback(host) else _RATE_ABROAD
    options = ServeOptions(
        host=host,
        port=port,
        token=token,
        replicas=replicas,
        max_characters=max_characters,
        rate=rate or None,
    )
    serve_run(run_dir, checkpoint, evaluation, options, say=say)


def _read_token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read: {error}") from None


def _check_token(token: str | None) -> None:
    """A header can hold no other characters."""
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UserError(
            "the token must be letters, digits and signs of ASCII without blanks, and not empty: "
            "make one with openssl rand -hex 24"
        )
