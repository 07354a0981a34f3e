"""``babelray table1``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import (
    input_option,
    json_option,
    output_option,
    page_option,
    print_json,
    say,
)


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes only, to see that it works.")
@output_option
@input_option
@page_option
@json_option
def table1(
    quick: bool, output: Path | None, given: Path | None, page: Path | None, as_json: bool
) -> None:
    """The paper's Table 1, reckoned and measured: operations, sequential steps, longest paths, time
    and memory of self-attention, recurrence and convolution.

    Takes two to three minutes of one core. See docs/paper/table1.md.

    \b
    Examples:
      babelray table1
      babelray table1 --output table1.json
      babelray table1 --input benchmarks/results/table1.json --page docs/paper/table1.md
    """
    if given is not None and (quick or output is not None):
        raise click.UsageError("--input tells of numbers that are there: no --quick, no --output")
    if quick and page is not None:
        raise click.UsageError("--quick only tries it: its numbers are for no --page")
    from trainer.paper import table1 as paper
    from trainer.paper import table1_page
    from trainer.paper.results import check_place, write_result
    from trainer.paper.table1_tables import all_tables, text

    # Now, not after minutes of measuring.
    if output is not None:
        check_place(output)
    if page is not None:
        table1_page.check(page)
    if given is not None:
        result = paper.read_result(given)
    else:
        result = paper.measure(paper.QUICK if quick else paper.Sizes(), say)
        if output is not None:
            write_result(output, result)
            say(f"written: {output}")
    if page is not None:
        for file in table1_page.write_page(result, page):
            say(f"written: {file}")
    if as_json:
        print_json(result)
        return
    click.echo("\n\n".join(text(table) for table in all_tables(result)))
