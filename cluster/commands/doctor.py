"""``babelray doctor``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.options import (
    config_option,
    json_option,
    mirror_option,
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

    Findings = Iterator[tuple[str, Check]]


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
    as_json: bool,
    **place_values: Any,
) -> None:
    """Look at this machine, the data, the storage and the cluster, and say what to mend.

    Each check is told as it is done: ok, a warning, or a failure with its mend. With --cluster it
    looks at the Ray cluster that RAY_ADDRESS names, or else at Kubernetes, where it runs as a job.
    Exit status: 0 nothing failed, 1 a check failed, 2 wrong input. See docs/doctor.md.

    \b
    Examples:
      babelray doctor
      babelray doctor --config configs/base.yaml --runs /mnt/shared/runs
      babelray doctor --cluster --overlay gpu-multi-node --nodes 2
      RAY_ADDRESS=10.0.0.1:6379 babelray doctor --cluster
    """
    if on is None and (given := [name for name, value in place_values.items() if value]):
        raise click.UsageError(f"--{given[0].removesuffix('s')} is for --cluster")
    from cluster.doctor import limits, remote
    from cluster.launch.order import choose_place
    from trainer.config import load_config

    settings = with_mirror(settings, mirror)
    config = load_config(config_file, settings)
    address = os.environ.get("RAY_ADDRESS", "")
    if on == "cluster" and (not address or remote.is_target(address)):
        findings = _sent(config_file, settings, all_reduce, link_gbits, place_values)
    else:
        findings = _here(config, runs)
        if on == "cluster":
            choose_place(**place_values)  # refuses what is for Kubernetes alone
        if on is not None:
            findings = _chained(findings, _inside(config, runs, all_reduce, link_gbits, expect))
    counts = {"ok": 0, "warning": 0, "failure": 0}
    told: list[dict[str, Any]] = []
    title = ""
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


def _chained(*parts: Findings) -> Findings:
    for part in parts:
        yield from part


def _here(config: RunConfig, runs: Path) -> Findings:
    """This machine, the data and the storage."""
    from cluster.doctor import data, machine, software, storage
    from cluster.doctor.sizes import checkpoint_bytes

    with software.Probe() as probe:  # it imports while we look around
        for check in machine.checks(config, runs=runs):
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
    config: RunConfig, runs: Path, all_reduce: bool, link_gbits: float | None, expect: int | None
) -> Findings:
    """The Ray cluster, from one of its machines."""
    from cluster.doctor import cluster

    for check in cluster.checks(
        config, runs=runs, with_all_reduce=all_reduce, gbits=link_gbits, expected=expect
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
