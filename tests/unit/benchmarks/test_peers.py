"""What surrounds the other toolkits: their environments, their pins, what is read of their logs."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).resolve().parents[3] / "benchmarks" / "peers"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    before = [*sys.path]
    sys.path[:0] = [str(PEERS), str(PEERS.parent)]
    yield
    sys.path[:] = before


@pytest.fixture
def environments() -> ModuleType:
    return importlib.import_module("environments")


def test_every_peer_has_a_script_and_every_package_a_version() -> None:
    compare = importlib.import_module("compare")
    for peer in compare.PEERS:
        assert (PEERS / f"train_{peer.name}.py").is_file()
        assert compare.pinned(peer)[0].isdigit()
        lines = (PEERS / f"{peer.name}.txt").read_text().splitlines()
        packages = [line for line in lines if not line.startswith("#")]
        assert all(line.count("==") == 1 and "+" not in line for line in packages), peer.name


def test_an_environment_is_made_once_and_anew_when_its_packages_change(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(command)
        (tmp_path / "venvs" / "one").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "_run", run)
    (tmp_path / "one.txt").write_text("six==1.17.0\n")
    python = environments.python_of("one", tmp_path / "venvs", print)
    assert python == tmp_path / "venvs" / "one" / "bin" / "python"
    assert [command[1:3] for command in ran] == [["-m", "venv"], ["-m", "pip"]]
    environments.python_of("one", tmp_path / "venvs", print)
    assert len(ran) == 2
    (tmp_path / "one.txt").write_text("six==1.16.0\n")
    environments.python_of("one", tmp_path / "venvs", print)
    assert len(ran) == 4


def test_what_does_not_install_is_tried_again_and_says_why(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('noise\\nERROR: no wheel of it')"]
    original = environments._run
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "_run", lambda command: original(failing))
    (tmp_path / "one.txt").write_text("six==1.17.0\n")
    for _ in range(2):
        with pytest.raises(environments.NotInstalled, match=r"^does not install: ERROR: no wheel"):
            environments.python_of("one", tmp_path, print)


def test_marians_count_of_target_pieces_is_found_in_its_log() -> None:
    marian = importlib.import_module("train_marian")
    line = (
        "[2026-11-23 09:33:53] Ep. 1 : Up. 16 : Sen. 2,083 : Cost 8.52571392 * 1,836 @ 1,836 "
        "after 33,277 : Time 9.59s : 191.52 words/s : gNorm 1.6302"
    )
    found = marian._UPDATE.search(line)
    assert found
    assert found[1] == "33,277"
    assert not marian._UPDATE.search("[2026-11-23 09:33:53] Training started")
