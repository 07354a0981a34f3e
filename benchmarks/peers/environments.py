"""Virtual environments for the peers, each of its own: none gets along with all the others' pins.

``benchmarks/peers/<name>.txt`` has every package with its version, dependencies included, so pip
resolves nothing; what a peer's metadata asks for (often an older torch) is not looked at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
DEFAULT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "babelray" / "peers"

# PyPI's torch for Linux needs gigabytes of CUDA; this index has the same release for CPUs.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

_INSTALL_S = 1800


class NotInstalled(Exception):  # noqa: N818
    """Why a peer cannot be measured here, in a line."""


def python_of(name: str, venvs: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of a peer's environment, which is made if it is missing or out of date.

    Raises ``NotInstalled`` with pip's reason.
    """
    requirements = HERE / f"{name}.txt"
    venv = venvs / name
    python, stamp = venv / "bin" / "python", venv / "installed"
    # Compiled code and prebuilt wheels are for one version of Python.
    wanted = f"{sys.version_info[:2]} {hashlib.sha256(requirements.read_bytes()).hexdigest()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {name} into {venv} (the first time takes minutes)")
    shutil.rmtree(venv, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(venv)])
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Wheels alone: none of these needs a compiler, and building one takes its time to fail.
    command += ["--no-deps", "--only-binary", ":all:", "--requirement", str(requirements)]
    if "torch==" in requirements.read_text() and _reachable(CPU_INDEX):
        command += ["--extra-index-url", CPU_INDEX]
    _run(command)
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    """Raises ``NotInstalled`` with what it said last, if it does not work."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"took more than {_INSTALL_S // 60} minutes to install") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines or ["?"]
        raise NotInstalled(f"does not install: {errors[0].strip()[:200]}")


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False
