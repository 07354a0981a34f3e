"""The configuration of Prometheus and Grafana for the runs of a folder, written to another."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.session import LOOPBACK
from cluster.targets import JOB, targets_dir

# As Ray names it in its links: RAY_PROMETHEUS_NAME.
_DATASOURCE = "Prometheus"

_MONITORING = Path(__file__).resolve().parents[1] / "k8s" / "monitoring"
_RAY_DISCOVERY = "prom_metrics_service_discovery.json"

_SCRAPE_INTERVAL = "5s"
# Ray's file is a link that changes where no watch of Prometheus sees it.
_DISCOVERY_INTERVAL = "15s"


@dataclass(frozen=True)
class Written:
    """The configuration in a folder, and what it had to do without."""

    prometheus: Path
    grafana: Path
    missing: tuple[str, ...]


def write_config(folder: Path, runs: Path, *, prometheus_url: str, grafana_port: int) -> Written:
    """Write ``prometheus.yml`` with its alerts, and Grafana's configuration, into ``folder``.

    Args:
        folder: made if it is not there; files of an earlier call are replaced.
        runs: the folder of runs whose metrics are to be scraped.
        prometheus_url: where Grafana finds that Prometheus.
        grafana_port: where Grafana is to listen, on the loopback interface.
    """
    folder, missing = folder.absolute(), []
    grafana = folder / "grafana"
    shutil.rmtree(grafana / "dashboards", ignore_errors=True)
    for name in ("dashboards/babelray", "dashboards/ray", "provisioning/datasources"):
        (grafana / name).mkdir(parents=True, exist_ok=True)
    for name in ("dashboards", "plugins", "alerting"):
        (grafana / "provisioning" / name).mkdir(exist_ok=True)
    alerts = _MONITORING / "alerts.yaml"
    if alerts.is_file():
        shutil.copyfile(alerts, folder / "alerts.yaml")
    else:
        (folder / "alerts.yaml").unlink(missing_ok=True)
        missing.append(f"no alerts: {alerts} is not there (take it from the source tree)")
    prometheus = folder / "prometheus.yml"
    _write_yaml(prometheus, prometheus_config(runs, has_alerts=alerts.is_file()))
    dashboards = sorted((_MONITORING / "dashboards").glob("*.json"))
    for file in dashboards:
        shutil.copyfile(file, grafana / "dashboards" / "babelray" / file.name)
    if not dashboards:
        missing.append(f"no panels: {_MONITORING / 'dashboards'} holds none (take the source tree)")
    for name, content in _ray_dashboards().items():
        (grafana / "dashboards" / "ray" / f"{name}.json").write_text(content, encoding="utf-8")
    _write_yaml(grafana / "provisioning/datasources/babelray.yml", _datasources(prometheus_url))
    _write_yaml(grafana / "provisioning/dashboards/babelray.yml", _providers(grafana))
    (grafana / "grafana.ini").write_text(_grafana_ini(grafana, grafana_port), encoding="utf-8")
    return Written(prometheus, grafana, tuple(missing))


def prometheus_config(runs: Path, *, has_alerts: bool) -> dict[str, Any]:
    """Prometheus' configuration for the runs of a folder and Ray's own metrics on this machine."""
    config: dict[str, Any] = {
        "global": {
            "scrape_interval": _SCRAPE_INTERVAL,
            "scrape_timeout": _SCRAPE_INTERVAL,
            "evaluation_interval": _SCRAPE_INTERVAL,
        },
        "scrape_configs": [
            _discovered(JOB, targets_pattern(runs)),
            _discovered("ray", str(_ray_folder() / _RAY_DISCOVERY)),
        ],
    }
    if has_alerts:
        config["rule_files"] = ["alerts.yaml"]  # beside the configuration
    return config


def targets_pattern(runs: Path) -> str:
    """The files in which runs say where their metrics are, as Prometheus reads them."""
    return str(targets_dir(runs.resolve()) / "*.json")


def _discovered(job: str, pattern: str) -> dict[str, Any]:
    return {
        "job_name": job,
        "file_sd_configs": [{"files": [pattern], "refresh_interval": _DISCOVERY_INTERVAL}],
    }


def _ray_folder() -> Path:
    """Where a Ray on this machine leaves its discovery file."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"  # noqa: S108


def _ray_dashboards() -> dict[str, str]:
    """Ray's own dashboards: its pages embed the first, and nothing else has the second."""
    from ray.dashboard.modules.metrics.grafana_dashboard_factory import (
        generate_default_grafana_dashboard,
        generate_train_grafana_dashboard,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves files to be closed by chance
        return {
            "ray-core": generate_default_grafana_dashboard()[0],
            "ray-train": generate_train_grafana_dashboard()[0],
        }


def _datasources(prometheus_url: str) -> dict[str, Any]:
    source = {
        "name": _DATASOURCE,
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus_url,
        "isDefault": True,
        "jsonData": {"timeInterval": _SCRAPE_INTERVAL},
    }
    return {"apiVersion": 1, "datasources": [source]}


def _providers(grafana: Path) -> dict[str, Any]:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": title,
                "folder": title,
                "type": "file",
                "options": {"path": str(grafana / "dashboards" / title.lower())},
            }
            for title in ("babelray", "Ray")
        ],
    }


def _grafana_ini(grafana: Path, port: int) -> str:
    """Anybody on this machine may look, nobody may change, and nothing is fetched or sent."""
    return f"""\
[server]
http_addr = {LOOPBACK}
http_port = {port}

[paths]
data = {grafana / "data"}
logs = {grafana / "logs"}
plugins = {grafana / "plugins"}
provisioning = {grafana / "provisioning"}

[security]
allow_embedding = true
disable_initial_admin_creation = true

[auth]
disable_login_form = true

[auth.anonymous]
enabled = true
org_role = Viewer

[dashboards]
default_home_dashboard_path = {grafana / "dashboards" / "babelray" / "run.json"}

[analytics]
reporting_enabled = false
check_for_updates = false
check_for_plugin_updates = false

[plugins]
preinstall_disabled = true

[news]
news_feed_enabled = false
"""


def _write_yaml(file: Path, value: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
