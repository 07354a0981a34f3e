"""``babelray profile``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import (
    config_option,
    json_option,
    mirror_option,
    parse_workers,
    print_json,
    runs_option,
    say,
    set_option,
    with_mirror,
)
from data_shards.errors import UserError


@click.command()
@click.argument("run", required=False)
@click.option(
    "--steps",
    "steps_text",
    required=True,
    metavar="A:B|+A:+B",
    help="First and last step, numbered from 1; with + from where the run is now.",
)
@click.option(
    "--ranks",
    "ranks_text",
    default="0",
    show_default=True,
    metavar="0,1,...|all",
    help="Which workers' time is recorded.",
)
@click.option("--memory", is_flag=True, help="Record allocations, too.")
@click.option(
    "--stacks", is_flag=True, help="Record Python's calls, too; slows the steps down a lot."
)
@config_option
@set_option
@click.option("--name", metavar="RUN", help="Name of the new run (with --config).")
@click.option(
    "--workers", callback=parse_workers, metavar="N|MIN:MAX", help="Workers of the new run."
)
@runs_option
@mirror_option
@click.option(
    "--dashboard-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port of the Ray dashboard of the new run on this machine.",
)
@json_option
def profile(
    run: str | None,
    steps_text: str,
    ranks_text: str,
    memory: bool,
    stacks: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    workers: int | tuple[int, int] | None,
    runs: Path,
    mirror: str | None,
    dashboard_port: int | None,
    as_json: bool,
) -> None:
    """Show where the time of some training steps goes.

    Give a RUN that is being trained now; it goes on as if nothing had happened. Or give --config to
    train a new run just as far. Leaves a trace for Perfetto and a summary in the run's folder,
    under profile/, and prints the summary. See docs/profiling.md.

    \b
    Examples:
      babelray profile demo --steps +2:+6
      babelray profile base --steps 2000:2005 --ranks 0,7 --memory
      babelray profile --config configs/tiny.yaml --steps 10:15 --workers 2
    """
    if (run is None) == (config_file is None):
        raise click.UsageError("give a RUN that is being trained, or --config for a new one")
    given = {"--set": settings, "--name": name, "--workers": workers, "--mirror": mirror}
    for option, value in given.items():
        if run is not None and value:
            raise click.UsageError(f"{option} is for a new run, with --config")
    from cluster import profile as asking
    from cluster.profile_table import profile_text

    steps, ranks = asking.Steps.parse(steps_text), asking.parse_ranks(ranks_text)
    if run is not None:
        from cluster.naming import find_run

        run_dir = find_run(run, runs)
        steps, stands = asking.settle(run_dir, steps)
        asking.check_ranks(ranks, stands.workers)
        request = asking.make_request(steps, ranks, memory=memory, stacks=stacks)
        with asking.asked(run_dir, request):
            folder = asking.wait(run_dir, request, say)
    else:
        if steps.relative:
            raise UserError(
                f"--steps {steps_text}: + counts from where a run is: for a new one give steps "
                "such as 10:15"
            )
        request = asking.make_request(steps, ranks, memory=memory, stacks=stacks)
        folder = asking.train_new(
            config_file,
            with_mirror(settings, mirror),
            name,
            request,
            runs=runs,
            workers=workers,
            dashboard_port=dashboard_port,
            say=say,
        )
    result = asking.collect(folder)
    if as_json:
        print_json(result)
    else:
        click.echo(profile_text(result))
