"""Which allocator processes get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import allocator

REPOSITORY = Path(__file__).resolve().parents[3]

LIBRARY = "/some/libjemalloc.so"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*allocator.GLIBC, "LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that any process starts with."""
    monkeypatch.setattr(allocator, "find_jemalloc", lambda: Path(LIBRARY))
    monkeypatch.setattr(allocator, "_runs_with", lambda settings: True)


def run(program: str, *arguments: str, text: str = "") -> list[str]:
    """The lines that a Python prints."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        capture_output=True,
        text=True,
        input=text,
        cwd=REPOSITORY,
        timeout=60,
    ).stdout.splitlines()


def test_a_process_begins_again_once_and_has_it() -> None:
    if "LD_PRELOAD" not in allocator.environment():
        pytest.skip("Ray's package brings no jemalloc that starts here")
    program = (
        "import os; from cluster import allocator; print(os.getpid(), allocator.current());"
        "allocator.begin_again(allocator.environment())"
    )
    first, again = run(program)
    assert first.split(" ", 1)[1] == "the system's allocator"
    assert again == first.split()[0] + " jemalloc"


def test_arguments_and_input_are_kept() -> None:
    program = (
        "import sys; from cluster import allocator; print('first');"
        "allocator.begin_again({'SETTING': 'a = b'});"
        "import os; print(sys.argv[1:], sys.stdin.read(), os.environ['SETTING'])"
    )
    assert run(program, "a b", "ü", text="text") == ["first", "first", "['a b', 'ü'] text a = b"]


def test_settings_that_do_not_last_are_not_set_for_ever() -> None:
    program = (
        "import os; from cluster import allocator; print('once'); os.environ.pop('SETTING', 0);"
        "allocator.begin_again({'SETTING': 'lost'})"
    )
    assert run(program) == ["once", "once"]


def test_who_was_started_as_something_else_is_left_in_peace() -> None:
    program = (
        "import sys; from cluster import allocator; print('once'); sys.argv = ['x', 'translate'];"
        "allocator.begin_again({'SETTING': '1'})"
    )
    assert run(program) == ["once"]


def test_a_program_that_is_not_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(sys, "argv", ["babelray"])
    allocator.begin_again({"SETTING": "1"})
    assert "SETTING" not in os.environ


@pytest.mark.usefixtures("found")
def test_the_users_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    expected = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    assert allocator.environment().keys() == expected
    monkeypatch.setenv("LD_PRELOAD", "/another/libjemalloc.so")
    assert allocator.environment().keys() == expected


@pytest.mark.usefixtures("found")
def test_the_library_gets_its_settings_where_ray_has_loaded_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_PRELOAD", LIBRARY)
    assert "dirty_decay_ms:-1" in allocator.environment()["MALLOC_CONF"]


@pytest.mark.usefixtures("found")
def test_the_users_settings_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:5000")
    wanted = allocator.environment()
    assert wanted["LD_PRELOAD"] == LIBRARY
    first, last = wanted["MALLOC_CONF"].split(",")[0], wanted["MALLOC_CONF"].split(",")[-1]
    assert (first, last) == ("thp:always", "dirty_decay_ms:5000")


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_a_library_that_does_not_load_is_not_taken(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "core" / "libjemalloc.so"
    library.parent.mkdir()
    if content is not None:
        library.write_bytes(content)
    place = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: place)
    assert (allocator.find_jemalloc() is None) == (content is None)
    assert allocator.environment() == allocator.GLIBC


def test_translate_begins_again_and_its_help_does_not() -> None:
    program = (
        "import sys; from cluster import allocator, cli;"
        "allocator.begin_again = lambda settings: print(sorted(settings));"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "translate", "no such run"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert done.stdout == f"{sorted(allocator.GLIBC)}\n"
    assert done.returncode == 2
    assert not any(
        name in line for line in run(program, "translate", "-h") for name in allocator.GLIBC
    )
