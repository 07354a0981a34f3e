"""``babelray translate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluster.options import checkpoint_option, evaluation_settings, runs_option, set_option


@click.command()
@click.argument("run")
@click.option(
    "--input",
    "input_file",
    type=click.File("rb"),
    default="-",
    metavar="FILE",
    help="Sentences, one a line; by default (or with '-') standard input.",
)
@checkpoint_option
@set_option
@runs_option
def translate(
    run: str, input_file: Any, checkpoint: str, settings: tuple[str, ...], runs: Path
) -> None:
    """Translate sentences with the run RUN, one a line, in their order.

    \b
    Examples:
      echo "the old man sleeps" | babelray translate demo
      babelray translate demo --input news.en --checkpoint average > news.de
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    evaluation = evaluation_settings(run_dir, settings)
    import torch

    from trainer.run import load_model
    from trainer.translate import read_lines
    from trainer.translate import translate as translate_lines

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run_dir, checkpoint, device=device)
    lines = read_lines(input_file, name=input_file.name)
    for line in translate_lines(loaded, lines, evaluation):
        click.echo(line)
