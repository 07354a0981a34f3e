"""``babelray report``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import runs_option


@click.command()
@click.argument("run")
@runs_option
def report(run: str, runs: Path) -> None:
    """Write the page of the run RUN: curves, BLEU, cost, attention, samples. Prints its path.

    \b
    Example:
      babelray report demo
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    from trainer.report import write_report

    click.echo(str(write_report(run_dir)))
