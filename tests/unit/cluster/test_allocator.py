"""Which allocator processes get that train."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import allocator

REPOSITORY = Path(__file__).resolve().parents[3]

_ALLOCATES = (
    "import sys; print([line.split()[-1] for line in open('/proc/self/maps')"
    " if 'jemalloc' in line][:1])"
)


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*allocator.GLIBC, "LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    remembered = allocator.jemalloc
    remembered.cache_clear()
    yield
    remembered.cache_clear()


def started() -> str:
    return subprocess.run(
        [sys.executable, "-c", _ALLOCATES], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_what_starts_in_the_block_has_it_and_nothing_else_does() -> None:
    before = dict(os.environ)
    with allocator.in_environment():
        assert started() == f"['{allocator.jemalloc()}']"
    assert dict(os.environ) == before
    assert started() == "[]"


def test_the_users_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    found = allocator.environment()
    assert found.keys() == {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    with allocator.in_environment():
        assert os.environ["LD_PRELOAD"] == ""
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_the_users_settings_of_jemalloc_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "jemalloc", lambda: Path("/some/libjemalloc.so"))
    monkeypatch.setenv("MALLOC_CONF", "stats_print:true")
    found = allocator.environment()
    assert found["LD_PRELOAD"] == "/some/libjemalloc.so"
    assert "MALLOC_CONF" not in found


def test_the_library_gets_its_settings_where_ray_has_loaded_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocator, "jemalloc", lambda: Path("/some/libjemalloc.so"))
    monkeypatch.setenv("LD_PRELOAD", "/some/libjemalloc.so")
    assert "MALLOC_CONF" in allocator.environment()
    monkeypatch.setenv("LD_PRELOAD", "/another/libjemalloc.so")
    assert "MALLOC_CONF" not in allocator.environment()


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_library_that_does_not_load_is_not_taken(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "core" / "libjemalloc.so").write_bytes(content)
    found = type("Found", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: found)
    assert allocator.jemalloc() is None
    assert allocator.environment() == allocator.GLIBC


def test_without_the_library_there_are_the_systems_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: None)
    assert allocator.environment() == allocator.GLIBC


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_command_begins_again_once_with_its_arguments_and_input() -> None:
    program = (
        "import os, sys; from cluster import allocator; print(os.getpid(), flush=True);"
        " allocator.begin_again();"
        " print(sys.argv[1:], sys.stdin.read(), os.environ['GLIBC_TUNABLES'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "a b", "ü"],
        check=True,
        capture_output=True,
        text=True,
        input="text",
        cwd=REPOSITORY,
    )
    first, again, last = done.stdout.splitlines()
    assert first == again
    assert last == f"['a b', 'ü'] text {allocator.GLIBC['GLIBC_TUNABLES']}"
