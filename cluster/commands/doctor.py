"""``babelray doctor``."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cluster.interrupts import ended_by_signals
from cluster.options import (
    config_option,
    json_option,
    mirror_option,
    place_option_names,
    place_options,
    print_json,
    runs_option,
    say,
    set_option,
    with_mirror,
)

if TYPE_CHECKING:
    from cluster.checks import Check
    from trainer.config import RunConfig

    Findings = Generator[tuple[str, Check], None, None]


@click.command()
@config_option
@set_option
@mirror_option
@runs_option
@click.option("--cluster", "on", flag_value="cluster", help="Look at the cluster, too.")
@click.option("--on-cluster", "on", flag_value="inside", hidden=True)
@click.option(
    "--all-reduce/--no-all-reduce",
    default=True,
    show_default=True,
    help="With --cluster: measure how fast the workers' devices add up.",
)
@click.option(
    "--link-gbits",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GBIT/S",
    help="With --cluster: speed of a machine's network, where it cannot be seen (in pods).",
)
@click.option("--expect", type=click.IntRange(min=1), hidden=True)
@click.option("--requires", multiple=True, hidden=True)
@place_options
@json_option
def doctor(
    config_file: Path | None,
    settings: tuple[str, ...],
    mirror: str | None,
    runs: Path,
    on: str | None,
    all_reduce: bool,
    link_gbits: float | None,
    expect: int | None,
    requires: tuple[str, ...],
    as_json: bool,
    **place_values: Any,
) -> None:
    """Look at this machine, the data, the storage and the cluster, and say what to mend.

    Each check is told as it is done: ok, a warning, or a failure with its mend. With --cluster it
    looks at the Ray cluster that RAY_ADDRESS names, or else at Kubernetes. It runs there as a job;
    with RAY_ADDRESS=HOST:6379 it looks from here, which must be one of the cluster's machines.
    Exit status: 0 nothing failed, 1 a check failed, 2 wrong input. See docs/doctor.md.

    \b
    Examples:
      babelray doctor
      babelray doctor --config configs/base.yaml --runs /mnt/shared/runs
      babelray doctor --cluster --overlay gpu-multi-node --nodes 2
      RAY_ADDRESS=http://10.0.0.1:8265 babelray doctor --cluster --storage /mnt/shared
      RAY_ADDRESS=10.0.0.1:6379 babelray doctor --cluster --runs /mnt/shared/runs
    """
    given = place_option_names(place_values) + (["--link-gbits"] if link_gbits else [])
    if on is None and given:
        raise click.UsageError(f"{given[0]} is for --cluster")
    from cluster.doctor import limits, remote
    from cluster.launch.order import choose_place
    from trainer.config import load_config

    settings = with_mirror(settings, mirror)
    config = load_config(config_file, settings)
    as_job = on == "cluster" and remote.goes_as_job()
    source = click.get_current_context().get_parameter_source("runs")
    if source != ParameterSource.DEFAULT and (as_job or place_values["storage"]):
        raise click.UsageError(
            "--runs is for a look from one of the machines alone: a job's runs lie in runs/ of the "
            "cluster's storage, which --storage names for a Ray cluster"
        )
    if as_job:
        findings = _sent(config_file, settings, all_reduce, link_gbits, place_values)
    else:
        if on == "cluster":
            choose_place(**place_values)  # refuses what is for Kubernetes alone
        if storage := place_values["storage"]:
            runs, config = Path(storage, "runs"), _in_storage(config, Path(storage))
        findings = _here(config, runs, requires)
        if on is not None:
            inside = _inside(config, runs, all_reduce, link_gbits, expect, requires)
            findings = _chained(findings, inside)
    counts = {"ok": 0, "warning": 0, "failure": 0}
    told: list[dict[str, Any]] = []
    title = ""
    with ended_by_signals(), closing(findings):  # however it ends, nothing is left behind
        for section, check in findings:
            counts[check.outcome] += 1
            told.append({"section": section, **asdict(check)})
            if on == "inside" and as_json:
                click.echo(remote.to_line(section, check))
            elif not as_json:
                if section != title:
                    click.echo(f"{'' if not title else chr(10)}{section}")
                    title = section
                click.echo(limits.told(check))
    if on == "inside" and as_json:
        return  # whoever reads these lines decides; a job that failed would be run again
    if as_json:
        print_json(told)
    else:
        click.echo(f"\n{limits.summary(counts)}")
    if counts["failure"]:
        raise click.exceptions.Exit(1)


def _in_storage(config: RunConfig, storage: Path) -> RunConfig:
    """The data where a launch with that storage has it, unless the configuration says where."""
    if config.data.root.is_absolute() or config.data.dir is not None:
        return config
    data = config.data.model_copy(update={"root": storage / "data"})
    return config.model_copy(update={"data": data})


def _chained(*parts: Findings) -> Findings:
    for part in parts:
        yield from part


def _here(config: RunConfig, runs: Path, requires: tuple[str, ...]) -> Findings:
    """This machine, the data and the storage."""
    from cluster.doctor import data, machine, software, storage
    from cluster.doctor.sizes import checkpoint_bytes

    with software.Probe() as probe:  # it imports while we look around
        for check in machine.checks(config, runs=runs, requires=requires):
            yield "This machine", check
        findings, problem = probe.findings()
    for check in software.checks(findings, problem, precision=config.trainer.precision):
        yield "This machine", check
    for check in data.checks(config.data):
        yield "Data", check
    where = config.recovery.storage
    size, keep = checkpoint_bytes(config), config.trainer.keep_checkpoints
    # The runs' folder takes the checkpoints where there is no other storage.
    for check in storage.checks(
        "runs", runs, checkpoint_bytes=size, locks=True, keep=keep if where is None else 0
    ):
        yield "Storage", check
    if where is not None:
        for check in storage.checks(
            "checkpoints", where, checkpoint_bytes=size, locks=False, keep=keep
        ):
            yield "Storage", check


def _inside(
    config: RunConfig,
    runs: Path,
    all_reduce: bool,
    link_gbits: float | None,
    expect: int | None,
    requires: tuple[str, ...],
) -> Findings:
    """The Ray cluster, from one of its machines."""
    from cluster.doctor import cluster

    for check in cluster.checks(
        config,
        runs=runs,
        with_all_reduce=all_reduce,
        gbits=link_gbits,
        expected=expect,
        requires=requires,
    ):
        yield "Cluster", check


def _sent(
    config_file: Path | None,
    settings: tuple[str, ...],
    all_reduce: bool,
    link_gbits: float | None,
    place_values: dict[str, Any],
) -> Findings:
    """The cluster from outside, then the doctor as a job on it."""
    import yaml

    from cluster.doctor import remote
    from cluster.launch.order import choose_place, read_config
    from cluster.launch.records import open_target
    from trainer.config import load_config

    place = choose_place(**place_values)
    if config_file is None and not settings:
        config, text = load_config(None), yaml.safe_dump({})
    else:
        config, text = read_config(config_file, settings, place, before="")
    target = open_target(place)
    job = remote.submission(target, config, text, with_all_reduce=all_reduce, gbits=link_gbits)
    before = []
    for finding in remote.preflight(target, job):
        before.append(finding)
        yield finding
    if remote.may_go_on(before):
        yield from remote.job_checks(target, job, say=say)
