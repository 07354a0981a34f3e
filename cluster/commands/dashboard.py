"""``babelray dashboard``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.hints import runs_flag
from cluster.interrupts import ended_by_signals
from cluster.options import print_json, runs_option, say
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from cluster.dashboard import LeftTarget, LiveRun
    from cluster.launch.records import Record

_POLL_S = 0.5

_GET_PROMETHEUS = (
    "Prometheus is not installed: apt install prometheus (and systemctl disable --now prometheus, "
    "which frees port 9090), brew install prometheus, or https://prometheus.io/download"
)
_GET_GRAFANA = (
    "Grafana is not installed: https://grafana.com/docs/grafana/latest/setup-grafana/installation; "
    "without it Prometheus' own page draws any metric, and Ray's Metrics page stays empty"
)


@click.command()
@click.argument("run", required=False)
@runs_option
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=9090,
    show_default=True,
    metavar="PORT",
    help="Port of Prometheus on this machine.",
)
@click.option(
    "--grafana-port",
    type=click.IntRange(1, 65535),
    default=3000,
    show_default=True,
    metavar="PORT",
    help="Port of Grafana on this machine.",
)
@click.option(
    "--write-config",
    "config_dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Only write prometheus.yml with its alerts, and Grafana's configuration and panels.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print where everything is as JSON; start nothing."
)
def dashboard(
    run: str | None,
    runs: Path,
    port: int,
    grafana_port: int,
    config_dir: Path | None,
    as_json: bool,
) -> None:
    """Show where the runs that train now can be watched; start Prometheus and Grafana for them.

    With a RUN that was launched on a cluster, bring the cluster's Ray dashboard here; with any
    other RUN, only show where that one can be watched.

    What is installed is started, on this machine alone, and runs until Ctrl-C. What it collects
    stays in the folder .prometheus of the runs.

    \b
    Examples:
      babelray dashboard
      babelray dashboard base
      babelray dashboard --port 9191
      babelray dashboard --write-config monitoring
    """
    from cluster import dashboard as watching
    from cluster.dashboard_config import write_config
    from cluster.launch.remote import launched_elsewhere
    from cluster.session import LOOPBACK

    record = launched_elsewhere(run, runs) if run is not None else None
    if record is not None:
        _show_there(record, as_json=as_json)
        return
    if run is not None:
        _show_one(run, runs, as_json=as_json)
        return

    if config_dir is not None:
        url = f"http://{LOOPBACK}:{port}"
        written = write_config(config_dir, runs, prometheus_url=url, grafana_port=grafana_port)
        for line in written.missing:
            say(line)
        if as_json:
            print_json(dataclasses.asdict(written))
        else:
            click.echo(f"{written.prometheus}\n{written.grafana}")
        return
    programs = (
        _Program(
            "Prometheus", shutil.which("prometheus"), port, watching.prometheus_at(port, runs)
        ),
        _Program(
            "Grafana", watching.find_grafana(), grafana_port, watching.grafana_at(grafana_port)
        ),
    )
    live, left = watching.live_runs(runs), watching.left_targets(runs)
    environment = watching.ray_environment(prometheus_port=port, grafana_port=grafana_port)
    if as_json:
        value: dict[str, Any] = {
            "runs": [dataclasses.asdict(run) for run in live],
            "left_targets": [dataclasses.asdict(target) for target in left],
        }
        for program in programs:
            value[program.name.lower()] = {**dataclasses.asdict(program), "url": program.url}
        print_json({**value, "ray_environment": environment})
        return
    _show(live, runs)
    for target in left:
        say(_left(target, runs))
    _start(programs, runs, environment)


def _show_one(run: str, runs: Path, *, as_json: bool) -> None:
    from cluster import dashboard as watching
    from cluster.naming import find_run

    name = find_run(run, runs).name
    live = [found for found in watching.live_runs(runs) if found.name == name]
    if not live:
        raise UserError(
            f"the run {name} is not being trained: its page is made by babelray report {name}"
            f"{runs_flag(runs)}"
        )
    print_json(dataclasses.asdict(live[0])) if as_json else _show(live, runs)


def _show_there(record: Record, *, as_json: bool) -> None:
    """The way to a cluster's dashboard, kept open until Ctrl-C where it must be."""
    from cluster.launch.records import open_target

    target = open_target(record.place)
    with ended_by_signals(), target.dashboard(record.run) as url:
        if as_json:
            print_json({"name": record.run, "dashboard_url": url})
        else:
            click.echo(f"{record.run}, on {target.describe()}:\n  Ray dashboard  {url}")
        if record.place.kind == "ray":
            return
        say("Ctrl-C ends the connection")
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


@dataclasses.dataclass(frozen=True)
class _Program:
    """Prometheus or Grafana: what to start it with, where, and whether it answers already."""

    name: str
    program: str | None
    port: int
    is_running: bool

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _show(live: Sequence[LiveRun], runs: Path) -> None:
    if not live:
        click.echo(f"no run in {runs} is being trained; the next one is found when it starts")
    for run in live:
        click.echo(f"{run.name}:")
        click.echo(f"  Ray dashboard  {run.dashboard_url or 'not known yet'}")
        targets = [f"http://{target}/metrics" for target in run.targets]
        click.echo(f"  metrics        {', '.join(targets) or 'not served (yet)'}")


def _left(target: LeftTarget, runs: Path) -> str:
    remove = f"rm {shlex.quote(target.file)}"
    if not target.is_run:
        return (
            f"{target.name} is gone, but its file of targets is not: Prometheus alerts that nobody "
            f"answers there until: {remove}"
        )
    return (
        f"{target.name} is not being trained (it failed, or its command was killed): Prometheus "
        "alerts that nobody answers there until it goes on (babelray train --name "
        f"{target.name} --resume{runs_flag(runs)}) or is given up ({remove})"
    )


def _start(programs: tuple[_Program, _Program], runs: Path, environment: dict[str, str]) -> None:
    """Start what is there and not running, and stay with it until it ends or Ctrl-C."""
    from cluster import dashboard as watching
    from cluster.dashboard_config import write_config
    from cluster.targets import targets_dir

    prometheus, grafana = programs
    folder = targets_dir(runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_config(
        folder / "config", runs, prometheus_url=prometheus.url, grafana_port=grafana.port
    )
    for line in written.missing:
        say(line)
    servers = []
    for program, make, mend in (
        (prometheus, watching.prometheus_server, _GET_PROMETHEUS),
        (grafana, watching.grafana_server, _GET_GRAFANA),
    ):
        if program.is_running:
            click.echo(f"{program.name} answers already: {program.url}")
        elif program.program is None:
            say(mend)
        else:
            servers.append(make(program.program, written, folder, program.port))
    if grafana.is_running:
        say(f"if that Grafana is not ours, give it our panels: {written.grafana}/provisioning")
    if grafana.is_running or grafana.program:
        say("for a Ray cluster of your own, so that its Metrics page embeds our panels:")
        for name, value in environment.items():
            say(f"  export {name}={value}  (before ray start --head)")
    started: list[subprocess.Popen[bytes]] = []
    with ended_by_signals():
        try:
            for server in servers:
                started.append(watching.start(server))
                click.echo(f"{server.name}: {server.url}")
            if started:
                say("Ctrl-C ends what was started here")
            while started and all(process.poll() is None for process in started):
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            return
        finally:
            watching.stop(started)
    if started:
        raise RunFailedError(f"one of them has ended by itself: see the logs in {folder}")
