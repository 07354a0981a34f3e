"""Where runs can be watched, and Prometheus and Grafana beside them: what answers, what is started.

Both are programs of their own that may or may not be installed. What is started here listens on the
loopback interface alone, keeps its files in ``<runs>/.prometheus`` and ends with the command.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from cluster.dashboard_config import Written, targets_pattern
from cluster.naming import is_claimed
from cluster.session import LOOPBACK
from cluster.status import read_session, run_folders, scrape_targets
from cluster.targets import targets_dir
from data_shards.errors import RunFailedError, UserError

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000

# Ray's dashboard embeds whole dashboards of Grafana by their uid, in two tabs: "Core" and "Ray
# Data". No run trains with Ray Data, so its tab can be given to ours, and Ray's own stay in theirs.
RUN_DASHBOARD_UID = "babelray-run"

# Where Grafana's packages for Debian and Red Hat put it.
_GRAFANA_HOME = Path("/usr/share/grafana")

_ANSWER_S = 2.0
_START_S = 30.0
_STOP_S = 10.0
_POLL_S = 0.2
_RETENTION = "30d"


@dataclass(frozen=True)
class LiveRun:
    """Where to look at a run that is being trained."""

    name: str
    dashboard_url: str | None
    is_local: bool
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Server:
    """A program to start: its name, its page, its arguments, its log."""

    name: str
    url: str
    ready_path: str
    arguments: tuple[str, ...]
    log: Path


def live_runs(runs: Path) -> list[LiveRun]:
    """The runs under ``runs`` that a command trains now."""
    found = []
    for folder in run_folders(runs):
        if not is_claimed(folder):
            continue
        ray = read_session(folder)
        found.append(
            LiveRun(
                folder.name,
                ray.get("dashboard_url"),
                bool(ray.get("is_local", True)),
                tuple(scrape_targets(folder)),
            )
        )
    return found


@dataclass(frozen=True)
class LeftTarget:
    """The file of targets that a run left which nothing trains: Prometheus finds nobody there.

    ``is_run`` is whether the run's folder is still there, so that the run can go on.
    """

    name: str
    file: str
    is_run: bool


def left_targets(runs: Path) -> list[LeftTarget]:
    """The files of runs under ``runs`` that failed, or whose command was killed."""
    return [
        LeftTarget(file.stem, str(file), (runs / file.stem / "config.json").is_file())
        for file in sorted(targets_dir(runs).glob("*.json"))
        if not is_claimed(runs / file.stem)
    ]


def ray_environment(*, prometheus_port: int, grafana_port: int) -> dict[str, str]:
    """What a Ray must find in its environment for its Metrics page to embed our panels.

    Values that Ray takes by itself are left out.
    """
    environment = {"RAY_GRAFANA_DATA_DASHBOARD_UID": RUN_DASHBOARD_UID}
    if prometheus_port != PROMETHEUS_PORT:
        environment["RAY_PROMETHEUS_HOST"] = f"http://{LOOPBACK}:{prometheus_port}"
    if grafana_port != GRAFANA_PORT:
        environment["RAY_GRAFANA_HOST"] = f"http://{LOOPBACK}:{grafana_port}"
    return environment


def prometheus_at(port: int, runs: Path) -> bool:
    """Whether a Prometheus that scrapes these runs answers there already.

    Raises:
        UserError: the port is in use by something else.
    """
    if not _in_use(port):
        return False
    answer = _ask(f"http://{LOOPBACK}:{port}/api/v1/status/config")
    try:
        config: Any = yaml.safe_load(answer["data"]["yaml"]) if answer else None
        patterns = [
            pattern
            for job in config["scrape_configs"]
            for discovery in job.get("file_sd_configs", [])
            for pattern in discovery["files"]
        ]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"--port {port}: something else listens there: give another port") from None
    if targets_pattern(runs) in patterns:
        return True
    raise UserError(
        f"--port {port}: a Prometheus answers there that does not scrape {runs}: give another "
        "port, or take our jobs into its configuration (babelray dashboard --write-config DIR)"
    )


def grafana_at(port: int) -> bool:
    """Whether a Grafana answers there already; whose panels it has cannot be seen.

    Raises:
        UserError: the port is in use by something else.
    """
    if not _in_use(port):
        return False
    answer = _ask(f"http://{LOOPBACK}:{port}/api/health")
    if not isinstance(answer, dict) or "database" not in answer:
        raise UserError(f"--grafana-port {port}: something else listens there: give another port")
    return True


def prometheus_server(program: str, written: Written, folder: Path, port: int) -> Server:
    """The Prometheus to start, with its data in ``folder``."""
    return Server(
        "Prometheus",
        f"http://{LOOPBACK}:{port}",
        "/-/ready",
        (
            program,
            f"--config.file={written.prometheus}",
            f"--storage.tsdb.path={folder.absolute() / 'data'}",
            f"--storage.tsdb.retention.time={_RETENTION}",
            f"--web.listen-address={LOOPBACK}:{port}",
        ),
        folder / "prometheus.log",
    )


def grafana_server(program: str, written: Written, folder: Path, port: int) -> Server:
    """The Grafana to start; its configuration says where everything is."""
    home = _grafana_home(Path(program))
    return Server(
        "Grafana",
        f"http://{LOOPBACK}:{port}",
        "/api/health",
        (
            program,
            *(["server"] if Path(program).name == "grafana" else []),
            f"--config={written.grafana / 'grafana.ini'}",
            *([f"--homepath={home}"] if home else []),
        ),
        folder / "grafana.log",
    )


def find_grafana() -> str | None:
    """The program to start; of a package, the program itself rather than its wrapper, which would
    bring the configuration of the system's own Grafana.
    """
    packaged = shutil.which(_GRAFANA_HOME / "bin" / "grafana")
    return packaged or shutil.which("grafana") or shutil.which("grafana-server")


def start(server: Server) -> subprocess.Popen[bytes]:
    """Start a program and wait until it answers.

    Raises:
        RunFailedError: it ended instead, or is silent; the message has its last words.
    """
    with server.log.open("ab") as log:
        process = subprocess.Popen(
            server.arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for the command, which ends it
        )
    deadline = time.monotonic() + _START_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if _ask(server.url + server.ready_path, as_json=False) is not None:
                return process
            time.sleep(_POLL_S)
    except BaseException:
        stop([process])
        raise
    code = process.poll()
    stop([process])
    words = server.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    what = f"does not answer after {_START_S:.0f} s" if code is None else f"ended with {code}"
    raise RunFailedError(
        f"{server.name} {what}: {words[-1] if words else 'it said nothing'} (log: {server.log})"
    )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what was started, politely at first."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _grafana_home(program: Path) -> Path | None:
    """The folder with Grafana's page and defaults, which it does not find by itself."""
    places = (
        program.resolve().parents[1],
        _GRAFANA_HOME,
        Path("/usr/local/share/grafana"),
        Path("/opt/homebrew/share/grafana"),
    )
    return next((place for place in places if (place / "conf" / "defaults.ini").is_file()), None)


def _in_use(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


def _ask(url: str, *, as_json: bool = True) -> Any:
    """What a program on this machine answers, None if nothing or nothing sensible."""
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy leads to this machine
            response = session.get(url, timeout=_ANSWER_S)
        if response.status_code != 200:
            return None
        return response.json() if as_json else response.text
    except (requests.RequestException, ValueError):
        return None
