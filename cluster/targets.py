"""Where Prometheus finds a run's metrics: a file that follows the machines it trains on.

Prometheus' file discovery reads ``<runs>/.prometheus/*.json`` and takes changes up by itself. On
Kubernetes the pods are discovered instead.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from pathlib import Path

from trainer.storage import write_atomically

# Of every Prometheus configuration of ours; the dashboards and alerts rely on it.
JOB = "babelray"


def targets_dir(runs: Path) -> Path:
    """Where the runs' files lie."""
    return runs / ".prometheus"


def targets_path(run_dir: Path) -> Path:
    """One run's file."""
    return targets_dir(run_dir.parent) / f"{run_dir.name}.json"


def write(run_dir: Path, nodes: Iterable[str], *, host: str, port: int) -> None:
    """Say where the run's metrics are now.

    Several runs may name the same target, with the same labels: Prometheus scrapes it once.

    Args:
        nodes: addresses of the machines.
        host, port: what the metrics are served on there; a host that is not a wildcard is itself
            the address.
    """
    is_any = host in {"", "::", "0.0.0.0"}  # noqa: S104
    hosts = sorted(set(nodes)) if is_any else [host]
    targets = [f"{_bracketed(each)}:{port}" for each in hosts]
    targets_path(run_dir).parent.mkdir(exist_ok=True)
    write_atomically(targets_path(run_dir), json.dumps([{"targets": targets, "labels": {}}]) + "\n")


def remove(run_dir: Path) -> None:
    """The run trains no more."""
    targets_path(run_dir).unlink(missing_ok=True)


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
