"""``babelray table3``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from cluster.options import (
    config_option,
    json_option,
    mirror_option,
    print_json,
    runs_option,
    say,
    set_option,
    with_mirror,
)

_CONFIG = Path("configs/table3.yaml")
_INTERRUPTED = 130


def _rows(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, int | None]]:
    """``ROW`` or ``ROW:SEEDS``, repeated or comma-separated."""
    parts = [part.strip() for value in values for part in value.split(",")]
    found = []
    for part in filter(None, parts):
        name, colon, seeds = part.partition(":")
        if colon and not re.fullmatch("[1-9][0-9]?", seeds):
            raise click.BadParameter(f"{part!r}: give a number of seeds, such as {name}:3")
        found.append((name, int(seeds) if colon else None))
    return found


@click.command()
@config_option
@set_option
@click.option(
    "--rows",
    multiple=True,
    callback=_rows,
    metavar="ROW[:SEEDS],...",
    help="Which rows, comma-separated or repeated: base, A-1-head, C-2-layers, ...; 'all' for all. "
    "With a number of seeds each, as in base:3. By default the rows of docs/paper/table3.md.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 99),
    metavar="N",
    help="Trainings of a row that --rows gives no number for: seeds 1 to N. By default 1, or what "
    "docs/paper/table3.md has.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Updates of every training; by default the configuration's.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Trainings at a time, with one GPU or one CPU each; by default as many as there is room "
    "for.",
)
@click.option(
    "--prefix",
    default="table3",
    show_default=True,
    metavar="NAME",
    help="What the runs' names begin with: NAME-base-1.",
)
@runs_option
@mirror_option
@click.option(
    "--dashboard-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port of the Ray dashboard on this machine; by default the first free one from 8265 on.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Write the result there, too.",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.md",
    help="Write the result into the parts of this page.",
)
@click.option(
    "--part",
    metavar="NAME",
    help="With --page: only the scores of each training, into the part of this name.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw how the rows stand to the base, here and in the paper.",
)
@click.option(
    "--input",
    "result_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Train nothing: show, and write the page or draw from, a result that --output wrote.",
)
@click.option(
    "--only-done", is_flag=True, help="Train nothing: the table of those trainings that are done."
)
@click.option(
    "--dry-run", is_flag=True, help="Show what would be trained, and what is done; train nothing."
)
@json_option
@click.pass_context
def table3(
    ctx: click.Context,
    config_file: Path | None,
    settings: tuple[str, ...],
    rows: list[tuple[str, int | None]],
    seeds: int | None,
    steps: int | None,
    parallel: int | None,
    prefix: str,
    runs: Path,
    mirror: str | None,
    dashboard_port: int | None,
    output: Path | None,
    page: Path | None,
    part: str | None,
    image: Path | None,
    result_file: Path | None,
    only_done: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train rows of the paper's Table 3, scaled down, and compare them with its base.

    Each row changes the base (--config, by default configs/table3.yaml) as the paper's row changes
    the paper's: in the same ratio. Trainings run on this machine, or on the Ray cluster that
    RAY_ADDRESS names, each as a run of its own. Interrupted, the same command goes on with what is
    not done.

    \b
    Examples:
      babelray table3 --dry-run
      babelray table3 --rows base:3,A-1-head:3,C-2-layers --steps 500
      babelray table3 --config configs/tiny.yaml --rows base,C-2-layers --prefix toy
    """
    _check_options(ctx)
    from trainer.paper import table3_page, table3_result, table3_summary
    from trainer.paper.results import check_place

    # Now, not after an hour of training.
    for file in (output, image):
        if file is not None:
            check_place(file)
    if page is not None:
        table3_page.check(page, part)
    if result_file is not None:
        summary = table3_result.read(result_file)
    else:
        from cluster.paper import table3 as trials
        from trainer.config import load_config
        from trainer.paper.table3 import chosen_rows, with_steps

        given = load_config(config_file or _CONFIG, with_mirror(settings, mirror))
        base = with_steps(given, seed=1, steps=steps)
        planned = trials.plan(base, chosen_rows(rows, seeds), runs=runs, prefix=prefix)
        found = trials.finished(planned)
        if dry_run:
            click.echo(_lines(trials.described(planned, found)))
            return
        if not only_done:
            try:
                found = trials.train(
                    planned, found, parallel=parallel, dashboard_port=dashboard_port, say=say
                )
            except KeyboardInterrupt:
                say(
                    "interrupted; what was trained is kept, and the same command goes on from there"
                )
                raise click.exceptions.Exit(_INTERRUPTED) from None
        summary = table3_summary.summarise(found, base)
    if output is not None:
        table3_result.write(summary, output)
    if page is not None and part is not None:
        table3_page.write_trainings(summary, page, part)
    elif page is not None:
        table3_page.write(summary, page)
    if image is not None:
        table3_page.draw(summary, image)
    if as_json:
        print_json(summary)
        return
    scores, against_base, notes = table3_page.text(summary)
    click.echo(_lines(scores) + "\n\nagainst base\n" + _lines(against_base) + "\n")
    click.echo("\n".join(notes))


def _check_options(ctx: click.Context) -> None:
    """That no option is given that another makes void."""
    given = {
        option.name: option.opts[-1]
        for option in ctx.command.params
        if option.name is not None
        and ctx.get_parameter_source(option.name) is not ParameterSource.DEFAULT
    }
    shows = {"result_file", "page", "part", "image", "as_json"}
    makes = {"output", "page", "part", "image", "as_json"}
    for name, others, why in (
        ("result_file", given.keys() - shows, "it is a result that is there, and trains nothing"),
        ("dry_run", given.keys() & {*makes, "only_done"}, "it makes no result"),
        ("only_done", given.keys() & {"parallel", "dashboard_port"}, "it trains nothing"),
    ):
        if name in given and others:
            void = ", ".join(word for key, word in given.items() if key in others)
            raise click.UsageError(f"{given[name]}: {why}: leave out {void}")
    if "part" in given and "page" not in given:
        raise click.UsageError("--part is a part of a page: give --page, too")


def _lines(cells: Sequence[Sequence[str]]) -> str:
    from cluster.tables import right_aligned

    return "\n".join(right_aligned(cells))
