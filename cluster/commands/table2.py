"""``babelray table2``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import (
    input_option,
    json_option,
    output_option,
    page_option,
    print_json,
    runs_option,
    say,
)
from data_shards.errors import UserError


@click.command()
@click.argument("run_names", metavar="[RUN]...", nargs=-1)
@runs_option
@output_option
@input_option
@page_option
@json_option
def table2(
    run_names: tuple[str, ...],
    runs: Path,
    output: Path | None,
    given: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """The paper's Table 2, training cost and BLEU, beside runs of yours.

    Operations are counted from the model, and reckoned by the paper's method: time, times devices,
    times what a device sustains. The paper's own trainings are counted as well.

    \b
    Examples:
      babelray table2
      babelray table2 demo base --json
      babelray table2 --input benchmarks/results/table2.json --page docs/paper/table2.md
    """
    import json

    from cluster import naming
    from trainer.paper.pages import write_parts
    from trainer.paper.table2 import table
    from trainer.paper.table2_page import parts, text
    from trainer.report_comparison import read_runs

    if given is not None and run_names:
        raise UserError("--input has its runs already: leave RUN out")
    if given is not None:
        try:
            found = json.loads(given.read_text(encoding="utf-8"))
            written = parts(found)
        except FileNotFoundError:
            raise UserError(f"--input: no such file: {given}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"--input {given}: not written by babelray table2 --output: write it anew"
            ) from None
    else:
        folders = [naming.find_run(name, runs) for name in run_names]
        logs = read_runs(folders, is_live=naming.is_claimed)
        found = {"command": " ".join(["babelray table2", *run_names]), **table(logs)}
        written = parts(found)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        say(f"wrote {output}")
    if page is not None:
        write_parts(page, written)
        say(f"wrote {page}")
    if as_json:
        print_json(found)
    elif page is None and output is None:
        click.echo(text(found))
