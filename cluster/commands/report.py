"""``babelray report``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import json_option, print_json, runs_option


@click.command()
@click.argument("run_names", metavar="RUN...", nargs=-1, required=True)
@runs_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Page of several runs; by default report-RUN-RUN.html in the folder of the runs.",
)
@click.option(
    "--price",
    type=float,
    metavar="RATE",
    help="Price of a device-hour: what a GPU, or a worker's share of a CPU, costs an hour.",
)
@click.option(
    "--currency", default="USD", show_default=True, metavar="NAME", help="What --price is in."
)
@json_option
def report(
    run_names: tuple[str, ...],
    runs: Path,
    output: Path | None,
    price: float | None,
    currency: str,
    as_json: bool,
) -> None:
    """Write the page of a run: curves, BLEU, cost, reliability, attention, samples, method.

    Of several runs, one page that has them side by side. Prints the page's path. With --json no
    page is written: the numbers behind it are printed.

    \b
    Examples:
      babelray report demo
      babelray report base big --price 2.50 --currency USD
      babelray report demo --json
    """
    from cluster import naming
    from data_shards.errors import UserError

    folders = [naming.find_run(run, runs) for run in run_names]
    if output is not None and len(folders) == 1:
        raise UserError("--output is for several runs: the page of one is its own report.html")

    from trainer.exhibits_cost import Rate

    rate = None if price is None else Rate(price, currency)
    if as_json:
        from trainer.report_comparison import read_runs
        from trainer.report_numbers import compared, numbers

        found = [numbers(log, rate) for log in read_runs(folders, is_live=naming.is_claimed)]
        print_json(found[0] if len(found) == 1 else compared(found))
    elif len(folders) == 1:
        from trainer.report import write_report

        is_live = naming.is_claimed(folders[0])
        click.echo(str(write_report(folders[0], rate=rate, is_live=is_live)))
    else:
        from trainer.report_comparison import default_output, read_runs, write_comparison

        logs = read_runs(folders, is_live=naming.is_claimed)
        file = output or default_output(runs, [log.name.replace("/", "-") for log in logs])
        click.echo(str(write_comparison(logs, file, rate=rate)))
