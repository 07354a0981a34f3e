"""``babelray attention-bench``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import (
    checkpoint_option,
    input_option,
    json_option,
    output_option,
    page_option,
    print_json,
    runs_option,
    say,
)


@click.command("attention-bench")
@click.argument("run", required=False)
@click.option("--quick", is_flag=True, help="Small sizes only, to see that it works.")
@output_option
@input_option
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write attention-speed.svg and attention-scale.svg there.",
)
@page_option
@checkpoint_option
@runs_option
@json_option
def attention_bench(
    run: str | None,
    quick: bool,
    output: Path | None,
    given: Path | None,
    plots: Path | None,
    page: Path | None,
    checkpoint: str,
    runs: Path,
    as_json: bool,
) -> None:
    """What attentions cost, and why dot products are scaled: time, memory and numerical range of
    every score and implementation by length and width; of a trained RUN, too, if one is given.

    Takes about a minute of one core. See docs/paper/attention.md.

    \b
    Examples:
      babelray attention-bench
      babelray attention-bench demo --plots plots
      babelray attention-bench --input benchmarks/results/attention.json --plots plots
    """
    if given is not None and (run is not None or quick or output is not None):
        raise click.UsageError(
            "--input tells of numbers that are there: no RUN, no --quick, no --output"
        )
    if quick and page is not None:
        raise click.UsageError("--quick only tries it: its numbers are for no --page")
    from cluster.naming import find_run
    from trainer.paper import attention_bench as bench
    from trainer.paper import attention_page
    from trainer.paper.results import check_place, write_result
    from trainer.paper.table1_tables import text
    from trainer.run import load_model

    # Now, not after minutes of measuring.
    if output is not None:
        check_place(output)
    if plots is not None:
        check_place(plots / "plot.svg")
    if page is not None:
        attention_page.check(page)
    if given is not None:
        result = bench.read_result(given)
    else:
        loaded = None if run is None else load_model(find_run(run, runs), checkpoint)
        result = bench.measure(bench.QUICK if quick else bench.Sizes(), say, loaded)
        if output is not None:
            write_result(output, result)
            say(f"written: {output}")
    written = [] if plots is None else attention_page.write_plots(result, plots)
    written += [] if page is None else attention_page.write_page(result, page)
    for file in written:
        say(f"written: {file}")
    if as_json:
        print_json(result)
        return
    click.echo("\n\n".join(text(table) for table in attention_page.all_tables(result)))
