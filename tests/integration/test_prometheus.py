"""A real Prometheus watches a real run through the shipped configuration, panels and alerts."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import requests
import yaml

from cluster.monitoring.catalogue import expressions
from tests.ranks import free_port
from tests.workplace import PATIENCE_S, REPOSITORY, Workplace, worker_pid
from trainer import evaluation_metrics
from trainer.evaluation_metrics import METRICS_NAME
from trainer.metrics import declared
from trainer.phases import PHASES

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

# Alerts on speed may begin to wait on a busy machine; none may fire.
_OF_SPEED = {"BabelrayStraggler", "BabelrayThroughputFell", "BabelrayDataStarvation"}

# What a CPU has not, or a machine may not tell, or tells of another run.
_MAY_BE_ABSENT = {
    "babelray_gpu_memory_bytes",
    "babelray_energy_joules_total",
    "babelray_run_lost",
}


class Prometheus:
    """A server that scrapes every second, and answers queries."""

    def __init__(self, config: Path, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{free_port()}"
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = requests.get(
            f"{self._url}/api/v1/query", params={"query": expression}, timeout=30
        ).json()
        assert answer["status"] == "success", (expression, answer)
        assert answer["data"]["resultType"] in ("vector", "scalar"), expression
        if answer["data"]["resultType"] == "scalar":
            return [{"metric": {}, "value": answer["data"]["result"]}]
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, expression: str) -> float | None:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> list[dict[str, Any]]:
        answer = requests.get(f"{self._url}/api/v1/alerts", timeout=30).json()
        alerts: list[dict[str, Any]] = answer["data"]["alerts"]
        return [
            alert
            for alert in alerts
            if alert["state"] == "firing" or alert["labels"]["alertname"] not in _OF_SPEED
        ]

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self._url}/-/ready", timeout=5).ok
        except requests.RequestException:
            return False


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE_S} s in vain for {what}")


@pytest.fixture
def prometheus(workplace: Workplace) -> Iterator[Prometheus]:
    """With the configuration that ``babelray dashboard`` writes, in a hurry."""
    folder = workplace.folder / "watch"
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "dashboard", "--write-config", str(folder)],
        cwd=workplace.folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        capture_output=True,
    )
    [config] = folder.rglob("prometheus.yml")
    text = re.sub(r"\b(5|15)s\b", "1s", config.read_text())
    with serving(workplace.folder) as address:
        # As node exporter's textfile collector would have them.
        job = {
            "job_name": "evaluations",
            "metrics_path": f"/{METRICS_NAME}",
            "static_configs": [{"targets": [address]}],
        }
        content = yaml.safe_load(text)
        content["scrape_configs"].append(job)
        config.write_text(yaml.safe_dump(content))
        server = Prometheus(config, workplace.folder)
        try:
            wait_for(server.is_ready, "Prometheus")
            yield server
        finally:
            server.process.terminate()
            server.process.wait(timeout=30)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A web server for a folder's files."""

    class Handler(SimpleHTTPRequestHandler):
        extensions_map: ClassVar[dict[str, str]] = {"": "text/plain; version=0.0.4"}

        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def write_scores(folder: Path, run: str) -> None:
    """What ``babelray evaluate`` would leave of a result."""
    result: Any = SimpleNamespace(
        test_set="test", checkpoint="best", bleu=38.5, paper_bleu=39.1, chrf=60.0, ter=45.0,
        step=20, num_sentences=1000, seconds=4.0, time=time.time(),
    )  # fmt: skip
    evaluation_metrics.write(folder, run, [result])


def test_prometheus_sees_a_run_through_a_killed_worker_and_its_end(
    workplace: Workplace, prometheus: Prometheus
) -> None:
    port = free_port()
    settings = {
        "metrics_port": port,
        "log_every": 5,
        "validate_every": 20,
        "checkpoint_every": 20,
        "bleu_every": 20,
    }
    arguments = [f"--set=trainer.{name}={value}" for name, value in settings.items()]
    command = workplace.train("--config", "toy.yaml", "--name", "seen", "--workers", 2, *arguments)
    command.wait_for(lambda: workplace.events("seen", "evaluated"))
    targets = workplace.folder / "runs" / ".prometheus" / "seen.json"
    assert json.loads(targets.read_text())[0]["targets"] == [f"127.0.0.1:{port}"]
    command.wait_for(lambda: prometheus.value("babelray_valid_bleu"))

    # Everything declared is there, with sane values.
    names = {metric.name: metric for metric in declared()}
    for name, metric in names.items():
        series = f"{name}_count" if metric.kind == "histogram" else name
        found = prometheus.query(f'{series}{{run="seen"}}')
        assert found or name in _MAY_BE_ABSENT, name
    value = prometheus.value
    assert value("babelray_world_size") == value("babelray_live_ranks") == 2
    assert value("babelray_target_tokens_total") > value("babelray_samples_total") > 0  # type: ignore[operator]
    assert 0 < value("babelray_mfu_ratio") < 1  # type: ignore[operator]
    assert 0.5 < value("babelray_padding_efficiency_ratio") <= 1  # type: ignore[operator]
    assert value("babelray_rank_skew_ratio") >= 1  # type: ignore[operator]
    assert 0 <= value("time() - babelray_last_step_timestamp_seconds") < 60  # type: ignore[operator]
    assert value("babelray_last_checkpoint_size_bytes") > 10_000  # type: ignore[operator]
    assert {
        s["metric"]["phase"] for s in prometheus.query("babelray_step_phase_seconds_count")
    } == {*PHASES}
    of_all = "sum(babelray_step_phase_seconds_sum) / sum(babelray_step_seconds_sum)"
    assert 1.5 < value(of_all) < 2.5  # type: ignore[operator]  # two ranks, one run

    check_against_events(workplace, prometheus, "seen")

    # A worker is killed and replaced: counters go on, and nothing of the dead one lingers.
    steps = value("babelray_steps_total")
    before = all_series(prometheus)
    os.kill(worker_pid(workplace, "seen", 1), signal.SIGKILL)
    [recovered] = command.wait_for(lambda: workplace.events("seen", "recovered"))
    assert recovered["cause"] == "killed"
    command.wait_for(lambda: value('babelray_restarts_total{cause="killed"}') == 1)
    command.wait_for(lambda: value("babelray_live_ranks") == 2 and value("babelray_mfu_ratio"))
    command.wait_for(lambda: value("babelray_rank_skew_ratio"))
    assert value("resets(babelray_steps_total[5m])") == 0
    assert value("babelray_steps_total") > steps  # type: ignore[operator]
    seconds = value('babelray_recovery_seconds_sum{cause="killed"}')
    assert seconds == pytest.approx(recovered["seconds"], abs=0.1)
    assert all_series(prometheus) == before

    # Every panel of every dashboard has something to draw.
    wait_for(lambda: value("count(ray_node_cpu_utilization)"), "Ray's own metrics")
    write_scores(workplace.folder, "seen")
    wait_for(lambda: prometheus.query("babelray_evaluation_bleu"), "the scores")
    silent = {
        each.panel: each.expr
        for each in expressions()
        if each.needs != "gpu" and not prometheus.query(each.filled(run="seen"))
    }
    assert list(silent) == ["annotation Alerts"]  # since none fires
    assert prometheus.alerts() == []

    # At the end its series go, and nobody is told to look for them.
    command.process.send_signal(signal.SIGINT)
    assert command.end() == 130
    assert not targets.exists()
    wait_for(lambda: not prometheus.query('{run="seen", job="babelray"}'), "the series' end")
    wait_for(lambda: not prometheus.alerts(), "alerts that thought of calling to let it be")


def all_series(prometheus: Prometheus) -> set[tuple[tuple[str, str], ...]]:
    found = prometheus.query('{run="seen", __name__=~"babelray_.+"}')
    return {tuple(sorted(sample["metric"].items())) for sample in found}


def check_against_events(workplace: Workplace, prometheus: Prometheus, run: str) -> None:
    """Speed and utilisation as the log's raw counts give them."""

    def agrees() -> bool:
        steps = workplace.events(run, "step")
        speed, mfu = (
            prometheus.value(f"babelray_{name}") for name in ("tokens_per_second", "mfu_ratio")
        )
        assert speed is not None
        assert mfu is not None
        [started] = workplace.events(run, "started")
        for before, now in zip(steps[-8:], steps[-7:], strict=False):
            seconds = now["elapsed_s"] - before["elapsed_s"]
            tokens = sum(now[f"{s}_tokens"] - before[f"{s}_tokens"] for s in ("source", "target"))
            reckoned = tokens / seconds
            utilisation = (now["flops"] - before["flops"]) / seconds / started["peak_flops"]
            assert now["tokens_per_second"] == pytest.approx(reckoned, rel=0.02)
            assert now["mfu"] == pytest.approx(utilisation, rel=0.02, abs=1e-6)
            if speed == pytest.approx(reckoned, rel=0.02) and mfu == pytest.approx(
                utilisation, rel=0.02
            ):
                return True
        return False  # a scrape is of a moment, and the run goes on

    wait_for(agrees, "metrics that agree with the events")
