"""Storages that fail in each way, for real where that can be had."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.checks import Check
from cluster.doctor import storage as doctor
from trainer.storage import Storage

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


def look(where: Path | str, **options: int) -> dict[str, Check]:
    found = doctor.checks(
        "runs", where, checkpoint_bytes=options.get("checkpoint_bytes", 1000), locks=True
    )
    return {check.name: check for check in found}


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system in memory with the options that the test names."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MOST_BYTES", 4_000_000)


def test_a_good_folder_is_used_and_left_as_it_was(tmp_path: Path) -> None:
    found = look(tmp_path / "not" / "there" / "yet")
    assert list(found) == ["runs", "runs: locks", "runs: small writes", "runs: room", "runs: speed"]
    assert {check.outcome for name, check in found.items() if name != "runs"} <= {"ok", "warning"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    look(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


@needs_root
@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_read_only_folder(mounted: Path) -> None:
    [check] = look(mounted / "runs").values()
    assert check.outcome == "failure"
    assert check.found == f"cannot write {mounted}/runs: Read-only file system"
    assert "mount it for writing" in (check.mend or "")


@needs_root
@pytest.mark.parametrize("mounted", ["size=1m"], indirect=True)
def test_a_full_disk_and_memory(mounted: Path) -> None:
    found = look(mounted, checkpoint_bytes=10_000_000)
    assert found["runs"].outcome == "failure"
    assert "No space left on device" in found["runs"].found
    assert found["runs: room"].outcome == "failure"
    assert list(mounted.iterdir()) == []


@needs_root
@pytest.mark.parametrize("mounted", ["size=100m"], indirect=True)
def test_a_folder_in_memory(mounted: Path) -> None:
    found = look(mounted)
    assert found["runs"].outcome == "warning"
    assert "(tmpfs)" in found["runs"].found
    assert "gone with the machine" in (found["runs"].mend or "")


@needs_root
def test_a_folder_of_somebody_else() -> None:
    """Another user asks, in a process of its own: root may write anywhere."""
    folder = Path(tempfile.mkdtemp(prefix="doctor-", dir="/tmp"))  # pytest's own are closed
    folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "from cluster.doctor import storage\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for c in storage.checks('runs', sys.argv[1], checkpoint_bytes=1, locks=True):\n"
        "    print(c.outcome, c.found, c.mend, sep='|')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith(f"failure|cannot write {folder}")
    assert "Permission denied|allow this user" in said
    folder.rmdir()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    [check] = look(tmp_path / "runs").values()
    assert check.outcome == "failure"
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)  # held by nobody
    check = look(tmp_path)["runs: locks"]
    assert (check.outcome, check.found) == ("failure", "one process does not see the other's")

    def refuse(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    check = look(tmp_path)["runs: locks"]
    assert (check.outcome, check.found) == ("failure", "none: No locks available")
    assert "NFS" in (check.mend or "")


class Forgetful:
    """Passes everything on but what the test takes away."""

    def __init__(self, inner: Storage, **methods: object) -> None:
        self.__dict__.update(methods)
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"read": lambda name: b"first"}, "read back with the old content"),
        ({"read": lambda name: b"???"}, "read back with other content"),
        ({"names": lambda folder: []}, "is not listed"),
        ({"size": lambda name: 3}, "removed is still there"),
    ],
)
def test_a_storage_that_loses_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: dict[str, object], said: str
) -> None:
    real = Storage.of(tmp_path)
    monkeypatch.setattr(Storage, "of", lambda where: Forgetful(real, **methods))
    check = look(tmp_path)["runs"]
    assert check.outcome == "failure"
    assert said in check.found


def test_a_storage_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Storage.of(tmp_path)
    asked: list[str] = []
    hanging = Forgetful(real, write=lambda name, data: time.sleep(1), remove=asked.append)
    monkeypatch.setattr(Storage, "of", lambda where: hanging)
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.05)
    [check] = look(tmp_path).values()
    assert check.outcome == "failure"
    assert "no answer within 0.05 s" in check.found
    assert asked == [], "it is not waited for a second time"


def test_a_clock_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_offset", lambda file, before, after: -7.5)
    check = look(tmp_path)["runs"]
    assert check.outcome == "warning"
    assert "its clock is 7.5 s behind" in check.found


def test_how_far_a_stamp_lies_outside(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    os.utime(file, (100, 100))
    assert doctor._offset(file, 90, 101) == 0
    assert doctor._offset(file, 90, 95) == 5
    assert doctor._offset(file, 103, 104) == -3


def test_a_large_model_on_a_slow_storage(tmp_path: Path) -> None:
    found = look(tmp_path, checkpoint_bytes=10**15)
    assert found["runs: speed"].outcome == "warning"
    assert "recovery.staging" in (found["runs: speed"].mend or "")
    assert found["runs: room"].outcome == "failure"


def test_an_unknown_kind_of_url() -> None:
    [check] = look("nonsense://bucket").values()
    assert check.outcome == "failure"
    assert "nonsense" in check.found


def test_the_mount_that_holds_a_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} nfs4 rw 0 0\nc {tmp_path}x xfs rw 0 0\n")
    assert doctor._file_system_type(tmp_path / "runs", mounts) == "nfs4"
    assert doctor._file_system_type(tmp_path.parent, mounts) == "ext4"
