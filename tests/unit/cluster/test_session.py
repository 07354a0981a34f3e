"""What this machine offers, and ports; Ray itself is started in the integration tests."""

from __future__ import annotations

import os
import re
import socket

import pytest

from cluster import session
from data_shards.errors import UserError


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= session.num_cores() <= (os.cpu_count() or 1)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(session, "num_cores", lambda: 8)
    assert session.worker_threads(2, None) == 4
    assert session.worker_threads(3, None) == 2
    assert session.worker_threads(16, None) == 1
    assert session.worker_threads(2, 7) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert session.worker_threads(2, None) == 3
    assert session.worker_threads(2, 7) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert session.worker_threads(2, None) == 4


def check_ports(dashboard_port: int | None, metrics_port: int) -> None:
    session.check_ports(
        dashboard_port=dashboard_port, metrics_host=session.LOOPBACK, metrics_port=metrics_port
    )


def test_a_port_in_use_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind((session.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--dashboard-port {port}.*another port"):
            check_ports(port, 0)
        with pytest.raises(UserError, match=f"metrics_port {port}.*metrics_port={port + 1}"):
            check_ports(None, port)
    check_ports(port, port)


def free_port() -> int:
    with socket.socket() as free:
        free.bind((session.LOOPBACK, 0))
        port: int = free.getsockname()[1]
        return port


def test_the_address_of_the_jobs_api_is_for_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with (
        pytest.raises(UserError, match=r"Jobs API, which babelray launch takes.*HOST:6379"),
        session.connect(min_cpus=1, threads=1, dashboard_port=None),
    ):
        pass


@pytest.mark.parametrize(
    "address", [f"127.0.0.1:{free_port()}", "[::1]:1", "no-such-host.invalid:6379", "ray://a:10001"]
)
def test_no_cluster_at_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    before = dict(os.environ)
    with (
        pytest.raises(UserError, match=re.escape(f"at RAY_ADDRESS={address} (")),
        session.connect(min_cpus=1, threads=1, dashboard_port=None),
    ):
        pass
    assert dict(os.environ) == before
