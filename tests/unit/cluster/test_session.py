"""What this machine offers, and ports; Ray itself is started in the integration tests."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster import session, train
from data_shards.errors import UserError
from trainer.config import RunConfig


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


@pytest.mark.parametrize("address", ["", "local"])
def test_a_port_in_use_is_refused_for_every_ray_of_our_own(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with socket.socket() as taken:
        taken.bind((session.LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--dashboard-port {port}"):
            train.start(RunConfig(), "one", runs=tmp_path, dashboard_port=port)


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
    "address",
    [
        pytest.param(f"127.0.0.1:{free_port()}", id="free-port"),
        "[::1]:1",
        "no-such-host.invalid:6379",
        "ray://a:10001",
    ],
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


FEW = session.Session(dashboard_url=None, num_cpus=0.0, num_gpus=0.0, is_local=False)


def wait_for_cpus(
    number: float,
    offers: Iterable[float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    patience_s: float = 60,
) -> tuple[session.Session, list[float]]:
    import ray

    left = iter(offers)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": next(left)})
    monkeypatch.setattr(session, "_ROOM_POLL_S", 0.0)
    told: list[float] = []
    found = session.with_room(
        FEW,
        lambda now: now.num_cpus >= number,
        patience_s=patience_s,
        waiting=lambda now: told.append(now.num_cpus),
    )
    return found, told


def test_machines_that_come_back_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = wait_for_cpus(2, [0.0, 1.0, 2.0], monkeypatch)
    assert found.num_cpus == 2
    assert told == [0.0]


def test_what_is_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = wait_for_cpus(0, [], monkeypatch)
    assert found == FEW
    assert told == []


def test_machines_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = wait_for_cpus(2, itertools.repeat(1.0), monkeypatch, patience_s=0.05)
    assert found.num_cpus == 1
