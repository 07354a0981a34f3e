"""``babelray data``: prepare a corpus for training, and check one that is prepared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

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
from data_shards.errors import RunFailedError, UserError


@click.group()
def data() -> None:
    """Prepare a corpus for training, and check one that is prepared."""


@data.command("prepare")
@config_option
@set_option
@mirror_option
@json_option
def data_prepare(
    config_file: Path | None, settings: tuple[str, ...], mirror: str | None, as_json: bool
) -> None:
    """Fetch, clean, encode and shard the corpus of a configuration.

    Prints the folder of the prepared corpus. A corpus that is prepared already is left as it is;
    an interrupted preparation leaves nothing behind that could be taken for a finished one.

    \b
    Example:
      babelray data prepare --config configs/tiny.yaml
      babelray data prepare --set data.corpus=multi30k --mirror ~/corpora
    """
    from data_shards.shards import prepare
    from trainer.config import load_config

    config = load_config(config_file, with_mirror(settings, mirror))
    folder = prepare(config.data, progress=say)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        click.echo(str(folder))


@data.command("verify")
@click.argument("data_dir", type=click.Path(path_type=Path))
@click.option("--shards-url", metavar="URL", help="Where its shards lie, if not in DATA_DIR.")
def data_verify(data_dir: Path, shards_url: str | None) -> None:
    """Compare every file of the prepared corpus DATA_DIR with its manifest.

    Names each file that is missing, cut short or altered, and exits with status 2 if there is one.
    With --shards-url, every shard is fetched from there, compared and dropped again.

    \b
    Example:
      babelray data verify data/embedded-en-de-1a2b3c4d
      babelray data verify data/wmt14-en-de-1a2b3c4d --shards-url s3://corpora/wmt14
    """
    from data_shards.audit import verify

    problems = verify(data_dir, shards_url)
    if problems:
        raise UserError("\n  ".join([f"{data_dir} is damaged:", *problems]))
    click.echo(f"{data_dir}: every file is as its manifest says")


@data.command("stats")
@click.argument("data_dir", type=click.Path(path_type=Path))
@json_option
def data_stats(data_dir: Path, as_json: bool) -> None:
    """Show the size, the lengths and the filters' counts of the prepared corpus DATA_DIR.

    \b
    Example:
      babelray data stats data/embedded-en-de-1a2b3c4d
    """
    from data_shards.audit import format_statistics, statistics

    numbers = statistics(data_dir)
    if as_json:
        print_json(dataclasses.asdict(numbers))
    else:
        click.echo(format_statistics(numbers))


@data.command("audit")
@click.argument("run")
@runs_option
@json_option
def data_audit(run: str, runs: Path, as_json: bool) -> None:
    """Compute what the run RUN was trained on again from its plan, and compare.

    RUN is a run's name or folder. The rolling hash of the consumed pairs is compared wherever the
    run recorded it, in its log and in its checkpoints; steps whose pairs were not trained on are
    listed. Exits with status 1, and says where they first differ, unless each epoch was exact.

    \b
    Example:
      babelray data audit demo
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    from cluster.tables import audit_table
    from trainer.audit import audit

    result = audit(run_dir, progress=say)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(audit_table(result))
    if not result.exact:
        findings = result.findings()
        more = [f"and {len(findings) - 10} more: --json lists all"] if len(findings) > 10 else []
        raise RunFailedError("\n  ".join([f"{run_dir} is not as planned:", *findings[:10], *more]))
