"""One address a machine: who serves it, what, and what happens when they end."""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import exporter
from cluster.exporter import Exporter, Shelf, Target, is_served
from data_shards.errors import RunFailedError
from tests.ranks import free_port
from trainer.metrics import RunMetrics


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(exporter, "_RETRY_S", 0.05)
    return free_port()


@pytest.fixture
def closing() -> Iterator[Callable[[Exporter | Shelf], None]]:
    opened: list[Exporter | Shelf] = []
    yield opened.append
    for each in opened:
        with suppress(OSError):
            each.close()


def get(port: int, path: str = "/metrics") -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        body: bytes = response.read()
        return body.decode()


def get_soon(port: int, path: str = "/metrics") -> str:
    deadline = time.monotonic() + 10
    while True:
        try:
            return get(port, path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def target(run: str, port: int) -> Target:
    return Target(run, "127.0.0.1", port, 1000.0)


def test_two_runs_share_an_address_and_the_other_takes_it_over(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    one, other = Shelf(target("one", port)), Shelf(target("other", port))
    closing(one)
    closing(other)
    first = Exporter("127.0.0.1", port)
    closing(first)
    get_soon(port)
    second = Exporter("127.0.0.1", port)
    closing(second)
    with one.slot() as a, other.slot() as b:
        RunMetrics("one", a).steps.inc(1)
        RunMetrics("other", b).steps.inc(2)
        text = get(port)
        assert 'babelray_steps_total{run="one"} 1.0' in text
        assert 'babelray_steps_total{run="other"} 2.0' in text
        assert text.count("# TYPE babelray_steps_total") == 1
        assert json.loads(get(port, "/healthz"))["runs"] == ["one", "other"]
        first.close()
        one.close()
        text = get_soon(port)  # the same address, another process in life
        assert 'babelray_steps_total{run="other"} 2.0' in text
        assert 'run="one"' not in text


def test_a_rank_that_comes_after_a_dead_one_takes_its_slot(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    shelf = Shelf(target("demo", port))
    closing(shelf)
    closing(Exporter("127.0.0.1", port))
    with shelf.slot() as zero:
        RunMetrics("demo", zero).steps.inc(10)
        with shelf.slot() as one:
            assert zero.name != one.name
            assert 'babelray_live_ranks{run="demo"} 2.0' in get_soon(port)
        RunMetrics("demo", zero).loss.set(3.0)
        assert "babelray_loss_nats" in get(port)
    text = get(port)
    assert 'babelray_live_ranks{run="demo"} 0.0' in text
    assert "babelray_loss_nats" not in text
    assert 'babelray_run_started_timestamp_seconds{run="demo"} 1000.0' in text
    with shelf.slot() as again:
        assert again.name == zero.name
        RunMetrics("demo", again).steps.inc(1)
        assert 'babelray_steps_total{run="demo"} 11.0' in get(port)


def test_what_a_killed_run_left_is_neither_served_nor_kept(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    left = killed("gone", port)
    closing(Exporter("127.0.0.1", port))
    # Its numbers are not served; that it is gone is, for an hour.
    samples = [line for line in get_soon(port).splitlines() if "gone" in line]
    assert samples == ['babelray_run_lost{run="gone"} 1.0']
    again = Shelf(target("gone", port))  # somebody has resumed it
    assert "run_lost" not in get(port)
    assert not left.exists()
    again.close()
    assert "gone" not in get(port)


def killed(run: str, port: int, *, ended: bool = False) -> Path:
    """What the server of a run leaves that was killed, maybe after the run's end."""
    pid = os.fork()
    if not pid:
        with Shelf(target(run, port)).slot() as slot:
            RunMetrics(run, slot).steps.inc(1)
            if ended:
                slot.end()
            os._exit(0)
    os.waitpid(pid, 0)
    [left] = exporter.machine_folder(port).glob(f"{run}-*")
    return left


def test_what_is_long_ago_is_forgotten(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    left = killed("gone", port)
    closing(Exporter("127.0.0.1", port))
    assert "gone" in get_soon(port)
    for file in left.iterdir():
        os.utime(file, (time.time() - 4000,) * 2)
    assert "gone" not in get(port)
    closing(Shelf(target("next", port)))
    assert not left.exists()


def test_a_run_that_has_ended_is_not_looked_for(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    killed("done", port, ended=True)
    closing(Exporter("127.0.0.1", port))
    text = get_soon(port)
    assert "done" not in text


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("ii", 5000, 0) + b"\xff" * 100])
def test_a_damaged_file_does_not_hide_the_other_runs(
    port: int, closing: Callable[[Exporter | Shelf], None], content: bytes
) -> None:
    good, bad = Shelf(target("good", port)), Shelf(target("bad", port))
    closing(good)
    closing(bad)
    (bad.folder / "counter_rank0.db").write_bytes(content)
    closing(Exporter("127.0.0.1", port))
    with good.slot() as slot:
        RunMetrics("good", slot).steps.inc(1)
        assert 'babelray_steps_total{run="good"} 1.0' in get_soon(port)


def test_two_servers_of_one_run_add_up(
    port: int, closing: Callable[[Exporter | Shelf], None]
) -> None:
    one, other = Shelf(target("demo", port)), Shelf(target("demo", port))
    closing(one)
    closing(other)
    closing(Exporter("127.0.0.1", port))
    with one.slot() as a, other.slot() as b:
        RunMetrics("demo", a).steps.inc(1)
        RunMetrics("demo", b).steps.inc(2)
        assert get_soon(port).count("babelray_steps_total{") == 1
        assert 'babelray_steps_total{run="demo"} 3.0' in get(port)


def test_who_has_the_port_can_be_told(
    port: int,
    closing: Callable[[Exporter | Shelf], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert not is_served("127.0.0.1", port)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))  # something else: it does not even listen
        assert not is_served("127.0.0.1", port)
    closing(Exporter("0.0.0.0", port))
    get_soon(port, "/healthz")
    assert is_served("0.0.0.0", port)
    assert not is_served("127.0.0.1", port)  # who asked for that would be open to the network
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    assert not is_served("0.0.0.0", port)  # it looks for runs in another place


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(RunFailedError, match="not a folder of this user"):
        Shelf(target("demo", port))
