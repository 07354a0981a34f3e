"""``babelray dashboard``: the configuration that it writes, and the programs that it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
import yaml
from click.testing import CliRunner, Result

from cluster import dashboard, dashboard_config
from cluster.cli import cli
from cluster.naming import claim
from data_shards.errors import RunFailedError

REPOSITORY = Path(__file__).resolve().parents[3]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed: apt install prometheus",
)


def babelray(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[int]:
    """A program on this machine that answers these paths with JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in answers
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config_of(runs: Path) -> dict[str, Any]:
    """As Prometheus tells its own configuration."""
    text = yaml.safe_dump(dashboard_config.prometheus_config(runs, has_alerts=False))
    return {"/api/v1/status/config": {"status": "success", "data": {"yaml": text}}}


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """The folder of runs with one that is being trained and one that is not."""
    runs = tmp_path / "runs"
    for name in ("live", "dead"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").write_text("{}")
        (runs / name / "ray.json").write_text('{"dashboard_url": "http://127.0.0.1:8265"}')
    (runs / ".prometheus").mkdir()
    targets = [{"targets": ["127.0.0.1:9400", "10.0.0.7:9400"], "labels": {}}]
    (runs / ".prometheus" / "live.json").write_text(json.dumps(targets))
    with claim(runs / "live"):
        yield runs


def test_live_runs_alone_are_shown(live: Path) -> None:
    ports = "--port", free_port(), "--grafana-port", free_port()
    result = babelray("dashboard", "--runs", live, "--json", *ports)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["runs"] == [
        {
            "name": "live",
            "dashboard_url": "http://127.0.0.1:8265",
            "is_local": True,
            "targets": ["127.0.0.1:9400", "10.0.0.7:9400"],
        }
    ]
    assert value["prometheus"]["url"] == f"http://127.0.0.1:{ports[1]}"
    assert not value["prometheus"]["is_running"]
    assert value["ray_environment"] == {
        "RAY_GRAFANA_DATA_DASHBOARD_UID": "babelray-run",
        "RAY_PROMETHEUS_HOST": f"http://127.0.0.1:{ports[1]}",
        "RAY_GRAFANA_HOST": f"http://127.0.0.1:{ports[3]}",
    }
    assert not (live / ".prometheus" / "config").exists()  # it started and wrote nothing


def test_what_dead_runs_left_is_said_and_how_it_ends(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(live))  # nothing to start
    for name in ("dead", "gone"):
        (live / ".prometheus" / f"{name}.json").write_text('[{"targets": ["127.0.0.1:9411"]}]')
    ports = "--port", free_port(), "--grafana-port", free_port()
    result = babelray("dashboard", "--runs", live, *ports)
    assert result.exit_code == 0, result.output
    assert "9411" not in result.stdout
    dead, gone = (
        next(line for line in result.stderr.splitlines() if line.startswith(name))
        for name in ("dead", "gone")
    )
    assert f"babelray train --name dead --resume --runs {live}" in dead
    assert f"rm {live}/.prometheus/dead.json" in dead
    assert f"rm {live}/.prometheus/gone.json" in gone
    assert "--resume" not in gone
    assert not any(line.startswith("live") for line in result.stderr.splitlines())
    value = json.loads(babelray("dashboard", "--runs", live, "--json", *ports).stdout)
    assert [target["name"] for target in value["left_targets"]] == ["dead", "gone"]


def test_the_usual_ports_need_no_environment_but_the_panels() -> None:
    found = dashboard.ray_environment(prometheus_port=9090, grafana_port=3000)
    assert found == {"RAY_GRAFANA_DATA_DASHBOARD_UID": "babelray-run"}


@needs_prometheus
def test_the_written_configuration_is_valid(live: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder: with a blank"
    result = babelray("dashboard", "--runs", live, "--write-config", folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(folder / "prometheus.yml"), str(folder / "grafana")]
    checked = subprocess.run(
        ["promtool", "check", "config", str(folder / "prometheus.yml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["file_sd_configs"][0]["files"] for job in config["scrape_configs"]}
    assert jobs["babelray"] == [f"{live}/.prometheus/*.json"]
    assert jobs["ray"][0].endswith("/ray/prom_metrics_service_discovery.json")
    assert config["rule_files"] == ["alerts.yaml"]
    assert (folder / "alerts.yaml").is_file()


def test_without_the_source_tree_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_config, "_MONITORING", tmp_path / "nowhere")
    written = dashboard_config.write_config(
        tmp_path / "config", tmp_path / "runs", prometheus_url="http://x", grafana_port=3000
    )
    assert [line.partition(":")[0] for line in written.missing] == ["no alerts", "no panels"]
    assert "rule_files" not in yaml.safe_load(written.prometheus.read_text())


def test_grafana_gets_the_panels_of_runs_and_rays_own(tmp_path: Path) -> None:
    written = dashboard_config.write_config(
        tmp_path, tmp_path / "runs", prometheus_url="http://127.0.0.1:9191", grafana_port=3100
    )
    assert written.missing == ()
    grafana = written.grafana
    source = yaml.safe_load((grafana / "provisioning/datasources/babelray.yml").read_text())
    assert source["datasources"][0]["name"] == "Prometheus"  # Ray's default RAY_PROMETHEUS_NAME
    assert source["datasources"][0]["url"] == "http://127.0.0.1:9191"
    providers = yaml.safe_load((grafana / "provisioning/dashboards/babelray.yml").read_text())
    uids = [
        json.loads(file.read_text())["uid"]
        for provider in providers["providers"]
        for file in sorted(Path(provider["options"]["path"]).glob("*.json"))
    ]
    assert len(uids) == len(set(uids)), "Grafana refuses a uid that comes twice"
    assert {dashboard.RUN_DASHBOARD_UID, "rayDefaultDashboard", "rayTrainDashboard"} <= {*uids}
    settings = (grafana / "grafana.ini").read_text()
    assert "http_addr = 127.0.0.1\nhttp_port = 3100\n" in settings
    assert "allow_embedding = true" in settings
    home = re.search(r"default_home_dashboard_path = (.*)", settings)
    assert home is not None
    assert json.loads(Path(home[1]).read_text())["uid"] == dashboard.RUN_DASHBOARD_UID


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's files
def test_rays_metrics_page_embeds_the_dashboard_that_its_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the pinned release does: a new one may need another way to our panels."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

    for name, value in dashboard.ray_environment(prometheus_port=9090, grafana_port=3000).items():
        monkeypatch.setenv(name, value)
    assert factory.generate_data_grafana_dashboard()[1] == dashboard.RUN_DASHBOARD_UID
    build = Path(factory.__file__).parents[2] / "client" / "build" / "static" / "js"
    (script,) = build.glob("main.*.js")
    page = script.read_text(encoding="utf-8")
    assert '"Ray Data Dashboard"' in page
    assert "var-datasource" in page


def test_a_port_in_use_is_one_message(tmp_path: Path) -> None:
    with answering({}) as port:
        for option in ("--port", "--grafana-port"):
            other = "--grafana-port" if option == "--port" else "--port"
            result = babelray("dashboard", "--runs", tmp_path, option, port, other, free_port())
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"{option} {port}: something else listens there" in result.stderr
            assert result.stderr.count("\n") == 1


def test_a_prometheus_of_other_runs_is_not_taken_for_ours(tmp_path: Path) -> None:
    with answering(config_of(tmp_path / "other")) as port:
        result = babelray("dashboard", "--runs", tmp_path, "--port", port)
    assert result.exit_code == 2
    assert f"does not scrape {tmp_path}" in result.stderr
    assert "--write-config" in result.stderr


def test_what_answers_already_is_not_started_again(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(server: dashboard.Server) -> None:
        raise AssertionError(server)

    monkeypatch.setattr(dashboard, "start", refuse)
    answers = {**config_of(live), "/api/health": {"database": "ok"}}
    with answering(answers) as port:
        result = babelray("dashboard", "--runs", live, "--port", port, "--grafana-port", port)
    assert result.exit_code == 0, result.output
    assert f"Prometheus answers already: http://127.0.0.1:{port}" in result.stdout
    assert f"Grafana answers already: http://127.0.0.1:{port}" in result.stdout


def test_what_is_not_installed_is_said_with_how_to_get_it(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(live))
    ports = "--port", free_port(), "--grafana-port", free_port()
    result = babelray("dashboard", "--runs", live, *ports)
    assert result.exit_code == 0, result.output
    assert "apt install prometheus" in result.stderr
    assert "grafana.com" in result.stderr
    assert "http://10.0.0.7:9400/metrics" in result.stdout


def test_a_program_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    server = dashboard.Server(
        "Prometheus", "http://127.0.0.1:9", "/", ("/bin/sh", "-c", "echo lock DB; exit 3"),
        tmp_path / "log",
    )  # fmt: skip
    with pytest.raises(RunFailedError, match=r"Prometheus ended with 3: lock DB"):
        dashboard.start(server)


# Stands in for a Grafana, which no package of Debian's has: answers as one does, and notes what it
# was started with.
GRAFANA = """\
#!{python}
import http.server, json, pathlib, sys
pathlib.Path({seen!r}).write_text(json.dumps(sys.argv[1:]))
config = next(a for a in sys.argv if a.startswith("--config=")).partition("=")[2]
lines = pathlib.Path(config).read_text().splitlines()
port = next(int(l.partition("=")[2]) for l in lines if l.startswith("http_port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"database": "ok"}}')
    log_message = lambda self, *arguments: None
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@needs_prometheus
def test_what_is_started_ends_with_the_command(live: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    seen = tmp_path / "arguments"
    (programs / "grafana").write_text(GRAFANA.format(python=sys.executable, seen=str(seen)))
    (programs / "grafana").chmod(0o755)
    port, grafana_port = free_port(), free_port()
    command = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "dashboard", "--runs", str(live),
         "--port", str(port), "--grafana-port", str(grafana_port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert command.stdout is not None
    try:
        said = [command.stdout.readline() for _ in range(5)]
        assert said[-2:] == [
            f"Prometheus: http://127.0.0.1:{port}\n",
            f"Grafana: http://127.0.0.1:{grafana_port}\n",
        ]
        assert dashboard.prometheus_at(port, live)
        assert dashboard.grafana_at(grafana_port)
        assert requests.get(f"http://127.0.0.1:{port}/api/v1/rules", timeout=5).json()["data"]
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=20)
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 0, stderr
    assert json.loads(seen.read_text())[0] == "server"
    for left in (port, grafana_port):
        with closing(socket.socket()) as probe:
            assert probe.connect_ex(("127.0.0.1", left)) != 0, "it still listens"
    assert (live / ".prometheus" / "data").is_dir()
