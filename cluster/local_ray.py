"""A Ray of our own with no more processes than a run on one machine needs.

Stock Ray starts a monitor that asks for machines, one that sends the logs to the driver (which
reads none), and the dashboard's ten processes. Here the first two are left out, and the dashboard
waits until somebody looks (``cluster.ray_page``). ``benchmarks/overhead.py`` and
``benchmarks/start.py`` have what that is worth.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.node import Node

from cluster.ray_page import Dashboard, RayPage


@contextmanager
def lean_node(page: RayPage) -> Iterator[None]:
    """Within the block ``ray.init`` starts a node as described, whose dashboard is ``page``."""
    stock = ray._private.node.Node
    ray._private.node.Node = _node_class(page)
    try:
        yield
    finally:
        ray._private.node.Node = stock


def announce_metrics() -> None:
    """Tell Prometheus where Ray's own metrics are, which else the dashboard would do."""
    node = ray._private.worker._global_node
    name = ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    targets = [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"]
    ]
    file = Path(node.get_session_dir_path()) / name
    file.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    # The folder of all sessions has a link to the newest one's.
    link = Path(node.temp_dir) / name
    new = link.with_name(f"{name}.{os.getpid()}")
    with suppress(OSError):  # somebody else's folder
        new.symlink_to(file)
        new.replace(link)


def _node_class(page: RayPage) -> type[Any]:
    class LeanNode(Node):  # type: ignore[misc]
        """Ray's processes on this machine."""

        def start_monitor(self) -> None:
            """Nobody asks for more machines."""

        def start_log_monitor(self) -> None:
            """Nobody reads the workers' output from the driver."""

        def start_api_server(self, *, include_dashboard: bool, raise_on_failure: bool) -> None:
            """Later, if ever."""
            host, port = page.address
            self._webui_url = f"{host}:{port}"
            _note_address(self, self._webui_url)
            page.serve(_starter(self, super().start_api_server))

    return LeanNode


def _starter(node: Any, start: Callable[..., None]) -> Callable[[], Dashboard]:
    shown = node._webui_url
    kind = ray_constants.PROCESS_TYPE_DASHBOARD

    def start_now() -> Dashboard:
        host = node._ray_params.dashboard_host
        where = (host, _free_port(host))
        node._ray_params.dashboard_port = where[1]
        # One that died, or did not get far in its time, is no hindrance to another.
        node._kill_process_type(kind, check_alive=False)
        start(include_dashboard=True, raise_on_failure=True)
        node._webui_url = shown
        [info] = node.all_processes[kind]
        return Dashboard(where, lambda: info.process.poll() is None)

    return start_now


def _note_address(node: Any, url: str) -> None:
    """Where Ray's own commands look for the dashboard's API."""
    for key in (ray_constants.DASHBOARD_ADDRESS.encode(), b"webui:url"):
        node.get_gcs_client().internal_kv_put(
            key, url.encode(), True, ray_constants.KV_NAMESPACE_DASHBOARD
        )


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
