"""``babelray train``."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

from cluster.console import LOG_FORMAT_VARIABLE, LOG_FORMATS, LogFormat, errors_told, open_console
from cluster.hints import runs_flag
from cluster.options import (
    config_option,
    json_option,
    mirror_option,
    parse_workers,
    print_json,
    runs_option,
    set_option,
    with_mirror,
)

if TYPE_CHECKING:
    from cluster.progress import News

# Longer than a file server remembers the lock of a machine that was lost, and than machines take to
# join a cluster whose head has begun anew.
_PATIENCE_S = 300.0


@click.command()
@config_option
@set_option
@click.option("--name", metavar="RUN", help="Name of the run; by default the file's and the time.")
@click.option(
    "--workers",
    callback=parse_workers,
    metavar="N|MIN:MAX",
    help="Processes that train together; by default one a GPU, or one. With MIN:MAX, as many as "
    "there is room for: the run shrinks when a machine goes and grows when one comes.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run --name from its last checkpoint, with its own configuration unless "
    "--config is given.",
)
@click.option(
    "--start-or-resume",
    is_flag=True,
    help="Begin the run --name, or go on with it if it is there: a scheduler that starts the same "
    "command again goes on.",
)
@click.option(
    "--overwrite", is_flag=True, help="Begin anew: remove what an earlier run of this name left."
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
    "--log-format",
    type=click.Choice(LOG_FORMATS),
    default="auto",
    show_default=True,
    envvar=LOG_FORMAT_VARIABLE,
    show_envvar=True,
    help="How the run is told of on standard error. auto: a live line on a terminal, else text; "
    "text: lines, those of steps at most every 30 seconds; json: each event as one JSON object a "
    "line, for log collectors.",
)
@json_option
def train(
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    workers: int | tuple[int, int] | None,
    resume: bool,
    start_or_resume: bool,
    overwrite: bool,
    runs: Path,
    mirror: str | None,
    dashboard_port: int | None,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Train a model; prepare its corpus first if that was not done yet.

    Runs on this machine, or on the Ray cluster that RAY_ADDRESS names. Checkpoints, the log of
    steps and the configuration go to the run's folder. Ctrl-C saves a checkpoint and stops; a
    second Ctrl-C stops at once.

    \b
    Examples:
      babelray train --config configs/tiny.yaml --name demo --workers 2
      babelray train --config configs/base.yaml --name base --workers 1:4
      babelray train --config configs/tiny.yaml --set trainer.peak_learning_rate=2e-3
      babelray train --name demo --resume --set trainer.max_steps=2000
    """
    began_at = psutil.Process().create_time()  # before Python's own start
    if resume + start_or_resume + overwrite > 1:
        raise click.UsageError("give one of --resume, --start-or-resume and --overwrite")
    from cluster import naming
    from cluster.train import check_lanes, start
    from trainer.trackers import Trackers, find_trackers

    console = open_console(log_format)
    with errors_told(console), console:
        config, name = naming.open_run(
            config_file,
            with_mirror(settings, mirror),
            name,
            runs=runs,
            resume=resume,
            overwrite=overwrite,
            start_or_resume=start_or_resume,
        )
        console.name(name)
        check_lanes(config, workers)
        trackers = Trackers(
            find_trackers(config.trainer.trackers),
            name,
            (runs / name).absolute(),
            config.model_dump(mode="json"),
            complain=lambda line: console.say(line, "warning"),
        )
        from data_shards.shards import prepare

        prepare(config.data, progress=console.say)  # at once, if it is prepared already

        def tell(news: News) -> None:
            console.tell(news)
            trackers.event(news.event)

        console.begin()
        with closing(trackers):
            outcome = start(
                config,
                name,
                runs=runs,
                workers=workers,
                overwrite=overwrite,
                patience_s=_PATIENCE_S if start_or_resume else 0.0,
                dashboard_port=dashboard_port,
                say=console.say,
                tell=tell,
                began_at=began_at,
            )
    if as_json:
        print_json({"run": name, **dataclasses.asdict(outcome)})
    if outcome.signal is not None:
        go_on = f"babelray train --name {name} --resume{runs_flag(runs)}"
        console.say(f"stopped at step {outcome.step}; go on: {go_on}")
        raise click.exceptions.Exit(128 + outcome.signal)
    if not as_json:
        click.echo(f"{outcome.run_dir}: finished ({outcome.reason})")
        console.say(f"next: babelray evaluate {name}{runs_flag(runs)}")
