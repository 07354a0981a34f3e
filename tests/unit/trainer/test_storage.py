"""Folders and URLs: whole or not at all, repeated where the network failed, told in one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_shards.errors import UserError
from tests.saves import watched
from trainer import storage
from trainer.storage import FileWriter, Storage, StorageError, write_atomically


class Flaky(MemoryFileSystem):  # type: ignore[misc]
    """A remote storage whose every call may fail first; ``errors`` are used up."""

    protocol = "flaky"
    errors: ClassVar[list[Exception]] = []
    calls = 0
    lost_bytes = 0

    def _next(self) -> None:
        type(self).calls += 1
        if self.errors:
            raise self.errors.pop(0)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self._next()
        super().pipe_file(path, value[: len(value) - self.lost_bytes], **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._next()
        return super().cat_file(path, **kwargs)

    def get_file(self, path: str, local: str, **kwargs: Any) -> None:
        self._next()
        super().get_file(path, local, **kwargs)
        os.truncate(local, os.path.getsize(local) - self.lost_bytes)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage, "_BACKOFF_S", 0.001)
    Flaky.errors, Flaky.calls, Flaky.lost_bytes = [], 0, 0
    Flaky.store.clear()
    yield Flaky
    Flaky.store.clear()


@pytest.fixture(params=["path", "file://", "memory://"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "memory://":
        return Storage.of(f"memory://{tmp_path.name}/run")
    return Storage.of(f"{'file://' if request.param == 'file://' else ''}{tmp_path}/a/run")


def local_file(folder: Path, content: bytes) -> Path:
    file = folder / "local"
    with FileWriter(file) as writer:
        writer.write(content)
    return file


def test_files_come_and_go(anywhere: Storage, tmp_path: Path) -> None:
    assert anywhere.names("folder") == []
    assert anywhere.size("folder/a") is None
    anywhere.write("folder/a", b"one")
    anywhere.write("folder/a", b"other")
    anywhere.put(local_file(tmp_path, b"large"), "folder/deeper/b")
    assert not (tmp_path / "local").exists()
    assert anywhere.read("folder/a") == b"other"
    assert anywhere.fetch("folder/deeper/b", tmp_path / "cache").read_bytes() == b"large"
    assert anywhere.names("folder") == ["a", "deeper"]
    assert (anywhere.size("folder/a"), anywhere.size("folder/deeper")) == (5, None)
    for _ in range(2):
        anywhere.remove("folder/a")
    assert anywhere.names("folder") == ["deeper"]
    anywhere.remove("folder")
    assert anywhere.names("folder") == []


def test_a_file_that_is_not_there_is_told_with_its_place(anywhere: Storage) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*run/absent: .*[Nn]o such|absent"):
        anywhere.read("absent")


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Storage.of(tmp_path / "run")
    place.write("file", b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "x"))

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, fail)
        with pytest.raises(StorageError, match=r"cannot write .*No space left.*free some space"):
            place.write("file", b"new")
    assert place.read("file") == b"old"
    assert place.names("") == ["file"]


def test_a_write_in_pieces_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take less than it was given."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_atomically(tmp_path / "file", "twelve bytes")
    assert (tmp_path / "file").read_text() == "twelve bytes"


def test_publishing_on_the_same_disk_copies_nothing(tmp_path: Path) -> None:
    file = local_file(tmp_path, b"content")
    before = file.stat().st_ino
    Storage.of(tmp_path / "run").put(file, "folder/file")
    assert (tmp_path / "run" / "folder" / "file").stat().st_ino == before


@pytest.mark.parametrize("call", ["put", "write", "remove"])
def test_what_was_done_outlives_a_power_cut(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name, or that it is gone, is on the disk once its folder is synced."""
    place = Storage.of(tmp_path / "run")
    place.write("folder/gone", b"")
    file = local_file(tmp_path, b"content")
    done: list[str] = []

    def watch(operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "open":
            return
        where = arguments[0]
        where = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)
        done.append(f"{operation} {Path(where).name.partition('.')[0]}")

    with watched(monkeypatch, watch):
        if call == "put":
            place.put(file, "folder/file")
        elif call == "write":
            place.write("folder/file", b"content")
        else:
            place.remove("folder/gone")
    assert done[-1] == "fsync folder"
    assert done[-2].startswith("unlink" if call == "remove" else "replace")


def test_publishing_on_another_disk_is_whole_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename between disks is refused, so there is a copy, with a draft of its own."""
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    place = Storage.of(tmp_path / "run")
    place.put(local_file(tmp_path, b"content"), "folder/file")
    assert place.read("folder/file") == b"content"
    assert (place.names("folder"), (tmp_path / "local").exists()) == (["file"], False)


def test_what_the_network_lost_is_sent_again(flaky: type[Flaky], tmp_path: Path) -> None:
    place = Storage.of("flaky://bucket/run")
    flaky.errors = [ConnectionError("reset"), TimeoutError("slow")]
    place.write("file", b"content")
    assert flaky.calls == 3
    flaky.errors = [OSError(errno.EIO, "500 Internal Error")]
    assert place.read("file") == b"content"


def test_after_a_few_attempts_it_gives_up_and_says_why(flaky: type[Flaky]) -> None:
    flaky.errors = [ConnectionError("connection reset") for _ in range(9)]
    with pytest.raises(StorageError, match=r"cannot write flaky://b/run/file: .*connection reset"):
        Storage.of("flaky://b/run").write("file", b"content")
    assert flaky.calls == 4


def test_a_refusal_is_not_repeated(flaky: type[Flaky]) -> None:
    flaky.errors = [PermissionError(errno.EACCES, "Access Denied")]
    with pytest.raises(StorageError, match="Access Denied: allow this user"):
        Storage.of("flaky://b/run").write("file", b"content")
    assert flaky.calls == 1


def test_an_upload_that_arrived_short_is_noticed(flaky: type[Flaky]) -> None:
    flaky.lost_bytes = 2
    with pytest.raises(StorageError, match="7 bytes sent, 5 arrived"):
        Storage.of("flaky://b/run").write("file", b"content")


def test_a_download_comes_once_and_whole(flaky: type[Flaky], tmp_path: Path) -> None:
    place = Storage.of("flaky://b/run")
    place.write("file", b"content")
    flaky.calls, flaky.lost_bytes = 0, 2
    with pytest.raises(StorageError, match="7 bytes expected, 5 came"):
        place.fetch("file", tmp_path)
    assert not (tmp_path / "file").exists()
    flaky.lost_bytes, flaky.calls = 0, 0
    for _ in range(3):
        assert place.fetch("file", tmp_path).read_bytes() == b"content"
    assert flaky.calls == 1


@pytest.mark.parametrize(("url", "package"), [("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs")])
def test_a_missing_package_is_named(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    known = sys.modules["fsspec.registry"]._registry  # of what was imported before
    monkeypatch.delitem(known, url[:2], raising=False)
    with pytest.raises(UserError, match=rf"pip install {package} \(or 'babelray\["):
        Storage.of(url)


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"recovery\.storage: nfs4://host/x: .*s3://bucket/folder"):
        Storage.of("nfs4://host/x")
