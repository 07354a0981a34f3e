"""Checks of this machine: each is shown a good and a bad one."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from cluster import allocator
from cluster.checks import Check
from cluster.doctor import machine
from trainer.config import load_config

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte with room for 60 files."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = "size=1m,nr_inodes=60"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_this_machine_is_looked_at_and_left_as_it_is(tmp_path: Path) -> None:
    config = load_config(None, ("trainer.metrics_port=0", f"data.root={tmp_path}/data"))
    found = list(machine.checks(config, runs=tmp_path / "runs"))
    assert [check.name for check in found][:2] == ["system", "Python"]
    assert all((check.mend is None) == (check.outcome == "ok") for check in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "outcome"),
    [((3, 10, 9), "failure"), ((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 13, 0), "warning")],
)
def test_python(version: tuple[int, ...], outcome: str) -> None:
    assert machine.python_version(version).outcome == outcome


def test_packages_are_compared_with_the_lock_file(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("# made\nclick==0.1\nnever-installed==3.0\n")
    check = machine.packages(lock)
    assert check.outcome == "warning"
    assert "click" in check.found
    assert "locked 0.1" in check.found
    assert "never-installed" not in check.found, "what is for development may be absent"
    assert machine.packages(tmp_path / "none").outcome == "ok"


def test_a_package_that_is_absent_or_too_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = ["never-installed>=1", "click>=900", "ray[default]; python_version < '3'"]
    monkeypatch.setattr(machine, "requirements", lambda: wanted)
    check = machine.packages(tmp_path / "none")
    assert check.outcome == "failure"
    assert check.found.startswith("missing: never-installed; other versions: click ")
    assert "ray" not in check.found


def test_code_that_was_sent_without_its_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def not_installed(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    monkeypatch.setattr(machine, "_CHECKOUT", tmp_path)
    check = machine.packages(tmp_path / "none")
    assert (check.outcome, "came with the job" in check.found) == ("ok", True)
    # Whoever sent it has told what it requires.
    check = machine.packages(tmp_path / "none", ["click>=900", "never-installed; extra == 'dev'"])
    assert check.outcome == "failure"
    assert check.found.startswith("other versions: click ")


def test_what_is_required_for_development_alone_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["click>=8.1", 'pytest>=8; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    assert machine.requirements() == ["click>=8.1"]
    assert machine.names(["ray[data]==2.60.0", "old; python_version < '3'"]) == ["ray"]


def test_threads_beyond_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert machine.cores(tmp_path).outcome == "warning"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.cores(tmp_path).outcome == "ok"
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    check = machine.cores(quota)
    assert check.outcome == "warning"
    assert "at most 0.5 at a time" in check.found
    quota.write_text("max 100000\n")
    assert machine.cores(quota).outcome == "ok"


def test_the_allocator_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = tmp_path / "enabled"
    pages.write_text("always madvise [never]\n")
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")
    assert machine.memory_allocator(pages).found == (
        "LD_PRELOAD=/opt/libtcmalloc.so; huge pages: never"
    )
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(allocator, "environment", lambda: {"LD_PRELOAD": "libjemalloc.so"})
    assert machine.memory_allocator(tmp_path / "no").found == (
        "jemalloc, of Ray's package; huge pages: none"
    )


@pytest.mark.parametrize(
    ("used", "outcome"), [(0, "ok"), (3_000_000_000, "warning"), (3_900_000_000, "failure")]
)
def test_the_container_limit_counts(tmp_path: Path, used: int, outcome: str) -> None:
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    check = machine.memory(tmp_path)
    assert check.outcome == outcome
    assert "of 4.00 GB (cgroup)" in check.found


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    check = machine.shared_memory(tmp_path / "shm", num_gpus=0)
    assert check.outcome == "failure"
    assert "--shm-size" in (check.mend or "")


@needs_root
def test_small_shared_memory(small: Path) -> None:
    assert machine.shared_memory(small, num_gpus=0).outcome == "warning"
    assert machine.shared_memory(small, num_gpus=8).outcome == "failure"


@needs_root
def test_a_full_disk(small: Path) -> None:
    check = machine.disk("disk", small / "runs" / "deep")
    assert check.outcome == "failure"
    assert "free of 1.05 MB" in check.found


def test_a_disk_without_inodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = list(os.statvfs(tmp_path))
    values[5], values[7] = 1000, 42
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    check = machine.disk("disk", tmp_path)
    assert check.outcome == "failure"
    assert "room for 42 more files" in check.found


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [(256, "failure"), (1024, "warning"), (65_536, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_open_files(limit: int, outcome: str) -> None:
    assert machine.open_files(limit).outcome == outcome


def test_a_folder_whose_path_is_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    check = machine.temporary_folder(long)
    assert check.outcome == "failure"
    assert "too long a path" in check.found
    assert machine.temporary_folder(Path("/none")).outcome == "failure"
    assert machine.temporary_folder(Path("/tmp")).outcome != "failure"


def test_a_name_that_nobody_knows() -> None:
    check = machine.host_name("no-such-host.invalid")
    assert check.outcome == "warning"
    assert "/etc/hosts" in (check.mend or "")


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_LOOKUP_S", 0.05)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: time.sleep(0.5))
    assert "no answer" in machine.host_name("somebody").found


def test_a_clock_of_the_past() -> None:
    assert machine.clock(Path(__file__), now=1_000_000_000.0).outcome == "failure"
    assert machine.clock(Path(__file__)).outcome == "ok"


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = machine.ports(load_config(None, (f"trainer.metrics_port={port}",)))
    assert check.outcome == "failure"
    assert check.found == f"trainer.metrics_port {port}: Address already in use"
    assert f"--set trainer.metrics_port={port + 1}" in (check.mend or "")
    assert machine.ports(load_config(None, ("trainer.metrics_port=0",))) == Check(
        "ports", "ok", machine.ports(load_config(None, ("trainer.metrics_port=0",))).found
    )
