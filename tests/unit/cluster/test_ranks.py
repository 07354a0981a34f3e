"""The server of a machine's ranks, without Ray: what its processes do, and how they end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import allocator, ranks
from cluster.failures import RankDiedError
from cluster.ranks import Place, RankServer, Task
from data_shards.errors import DataError
from tests.ranks import free_port
from trainer.config import RunConfig

pytestmark = pytest.mark.timeout(120)

PRELOAD = ranks._PRELOAD


def train(config: RunConfig, run_dir: Path, *, rank: int, world_size: int, **_: Any) -> str:
    """Does what the run's name says."""
    import torch.distributed

    assert torch.distributed.get_world_size() == world_size == 1
    # Ctrl-C is the command's: ignored, and not kept for later.
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    (run_dir / "pid").write_text(str(os.getpid()))
    match run_dir.name:
        case "returns":
            return f"rank {rank} with {os.environ['BABELRAY_TEST']}"
        case "raises":
            raise DataError("shard 3 is cut short")
        case "foreign":
            raise Unpicklable("it broke", open(os.devnull))  # noqa: SIM115
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "allocates":
            preloaded = {"LD_PRELOAD", "MALLOC_CONF"} & os.environ.keys()
            return allocator.current(), sorted(preloaded)
        case "sleeps":
            time.sleep(100)
    raise AssertionError


class Unpicklable(Exception):
    pass


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    main = vars(sys.modules["__main__"])
    file = main.get("__file__")
    yield RankServer(warm=False)  # a warm one is what tests/integration/test_cluster.py trains with
    if file is not None:
        main["__file__"] = file


def run(server: RankServer, run_dir: Path, supervisor_pid: int | None = None) -> object:
    run_dir.mkdir()
    environment = {
        **os.environ,
        "BABELRAY_TEST": "its supervisor's environment",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    task = pickle.dumps(Task(RunConfig(), run_dir, 1, time.time(), train))
    return server.run(task, Place(0, 1, 0), environment, supervisor_pid or os.getpid())


def test_a_rank_returns_what_its_training_returns_and_keeps_a_log(
    server: RankServer, tmp_path: Path
) -> None:
    assert run(server, tmp_path / "returns") == "rank 0 with its supervisor's environment"
    log = (tmp_path / "returns/logs/rank-000.log").read_text()
    assert f"rank 0 of 1, process {(tmp_path / 'returns/pid').read_text()}" in log


def test_a_server_that_forks_nothing_is_ready_at_once(server: RankServer) -> None:
    began = time.monotonic()
    server.ready()
    assert time.monotonic() - began < 0.5


@pytest.fixture
def slow_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The process that ranks are forked from imports for a while."""
    (tmp_path / "slow_import.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(0.6)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(ranks, "_PRELOAD", ["slow_import"])
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    forkserver.set_forkserver_preload(["__main__"])


def wait_for_import(output: Path) -> None:
    deadline = time.monotonic() + 10
    while "importing" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("slow_import")
def test_what_the_command_says_while_its_server_imports_goes_where_it_should(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ranks.out"
    warm = RankServer(warm=True, output=output)
    waiting = threading.Thread(target=warm.ready)
    waiting.start()
    wait_for_import(output)
    os.write(1, b"saving and stopping")
    assert waiting.is_alive(), "it still imports"
    waiting.join()
    assert capfd.readouterr().out == "saving and stopping"
    assert output.read_text() == "importing\n"


@pytest.mark.usefixtures("slow_import")
def test_ranks_are_forked_with_an_allocator_that_what_they_start_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if "LD_PRELOAD" not in allocator.environment():
        pytest.skip("Ray's package brings no jemalloc that starts here")
    monkeypatch.setattr(ranks, "_PRELOAD", [PRELOAD[0]])  # without the imports, which take long
    server = RankServer(warm=True)
    assert run(server, tmp_path / "allocates") == ("jemalloc", [])
    assert (
        "process {}, 1 threads, jemalloc".format((tmp_path / "allocates" / "pid").read_text())
        in (tmp_path / "allocates" / "logs" / "rank-000.log").read_text()
    )


@pytest.mark.usefixtures("slow_import")
def test_an_interrupt_while_the_server_imports_does_not_end_it(tmp_path: Path) -> None:
    output = tmp_path / "ranks.out"
    warm = RankServer(warm=True, output=output)
    wait_for_import(output)
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGINT)  # as a terminal does, to all of its processes
    warm.ready()
    assert forkserver._forkserver._forkserver_pid == pid  # type: ignore[attr-defined]
    assert output.read_text() == "importing\n", "once, and no traceback"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_group_begins_with_the_command_until_one_has_trained(tmp_path: Path) -> None:
    task = Task(RunConfig(), tmp_path, 1, time.time(), events_bytes=3)
    assert not ranks._has_begun(task)
    (tmp_path / "events.jsonl").write_text("{}\n")
    assert not ranks._has_begun(task), "that was another command's"
    (tmp_path / "events.jsonl").write_text("{}\n{}\n")
    assert ranks._has_begun(task)


def test_a_rank_raises_what_its_training_raises(server: RankServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^shard 3 is cut short$"):
        run(server, tmp_path / "raises")
    assert "Traceback" in (tmp_path / "raises/logs/rank-000.log").read_text()
    with pytest.raises(RuntimeError, match=r"Unpicklable: .*it broke"):
        run(server, tmp_path / "foreign")


def test_a_rank_that_is_killed_is_told_with_its_signal(server: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RankDiedError) as caught:
        run(server, tmp_path / "killed")
    assert caught.value.exit_code == -signal.SIGKILL
    assert "rank 0 ended (by SIGKILL)" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_rank_ends_with_its_supervisor(server: RankServer, tmp_path: Path, hangs: bool) -> None:
    supervisor = subprocess.Popen(["sleep", "100"])
    errors: list[BaseException] = []

    def wait_for_it() -> None:
        try:
            run(server, tmp_path / "sleeps", supervisor.pid)
        except RankDiedError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    pid_file = tmp_path / "sleeps/pid"
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.05)
    rank = psutil.Process(int(pid_file.read_text()))
    if hangs:
        rank.suspend()  # it cannot end itself
    supervisor.kill()
    supervisor.wait()
    waiting.join(timeout=10)
    assert len(errors) == 1
    assert not rank.is_running()
