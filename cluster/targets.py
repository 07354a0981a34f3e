"""Where Prometheus finds a run's metrics: a file that follows the machines it trains on.

Prometheus' file discovery reads ``<runs>/.prometheus/*.json`` and takes changes up by itself. On
Kubernetes the pods are discovered instead.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from trainer.storage import write_atomically

log = logging.getLogger(__name__)

# Of every Prometheus configuration of ours; the dashboards and alerts rely on it.
JOB = "babelray"


def targets_dir(runs: Path) -> Path:
    """Where the runs' files lie."""
    return runs / ".prometheus"


def targets_path(run_dir: Path) -> Path:
    """One run's file."""
    return targets_dir(run_dir.parent) / f"{run_dir.name}.json"


def write(run_dir: Path, nodes: Iterable[str], *, host: str, port: int) -> None:
    """Say where the run's metrics are now; logs that it cannot, which must not end the training.

    Several runs may name the same target, with the same labels: Prometheus scrapes it once.

    Args:
        nodes: addresses of the machines.
        host, port: what the metrics are served on there; a host that is not a wildcard is itself
            the address.
    """
    is_any = host in {"", "::", "0.0.0.0"}  # noqa: S104
    hosts = sorted(set(nodes)) if is_any else [host]
    targets = [f"{_bracketed(each)}:{port}" for each in hosts]
    file = targets_path(run_dir)
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps([{"targets": targets, "labels": {}}]) + "\n")
    except OSError as error:
        log.warning("Prometheus is not told where the metrics are: %s: %s", file, error)


def remove(run_dir: Path) -> None:
    """The run trains no more."""
    try:
        targets_path(run_dir).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s stays, though the run has ended: %s", targets_path(run_dir), error)


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
