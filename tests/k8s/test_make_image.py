"""``make image`` with a container engine that only writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]
_DIGEST = "sha256:" + "ab" * 32

_ENGINE = f"""#!/bin/sh
echo "$0 $*" >> calls
case "$1" in
push) [ ! -e refuse ] || {{ echo denied >&2; exit 1; }} ;;
image) echo elsewhere.example/babelray@sha256:00; echo "reg.example:5000/me/babelray@{_DIGEST}" ;;
esac
"""


@pytest.fixture
def make(tmp_path: Path) -> _Make:
    return _Make(tmp_path)


class _Make:
    """The Makefile and its script in a folder of their own, with few commands on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.bin = folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for file in ("Makefile", "k8s/build-image.sh"):
            (self.folder / file).parent.mkdir(exist_ok=True)
            shutil.copy(_REPOSITORY / file, self.folder / file)
        for name in ("bash", "sh", "make", "cat", "dirname", "grep", "tail", "git"):
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def engine(self, name: str) -> None:
        (self.bin / name).write_text(_ENGINE)
        (self.bin / name).chmod(0o755)

    def __call__(self, *words: str, target: str = "image") -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        for name in ("IMAGE", "VARIANT", "PUSH", "BUILD_ARGS"):
            clean.pop(name, None)
        return subprocess.run(
            ["make", target, *words],
            cwd=self.folder,
            env={**clean, "PATH": str(self.bin)},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What the engine was asked for: its name, then its arguments."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix(f"{self.bin}/") for line in lines]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_builds_for_gpus_by_default(make: _Make, engine: str) -> None:
    make.engine(engine)

    done = make()

    assert done.returncode == 0, done.stderr
    (call,) = make.calls()
    assert call.startswith(f"{engine} build --build-arg VARIANT=gpu ")
    assert call.endswith(" --tag babelray:gpu .")
    assert not (make.folder / ".image-gpu").exists()


def test_an_image_pushed_before_is_no_name_to_build_under(make: _Make) -> None:
    make.engine("docker")
    (make.folder / ".image-gpu").write_text(f"reg.example:5000/me/babelray@{_DIGEST}\n")

    make("VARIANT=cpu", "BUILD_ARGS=--build-arg BASE=debian@sha256:1")

    (call,) = make.calls()
    assert call.endswith(" --build-arg BASE=debian@sha256:1 --tag babelray:cpu .")


@pytest.mark.parametrize("tag", ["", ":1.2"])
def test_push_leaves_the_digest_for_launch(make: _Make, tag: str) -> None:
    make.engine("docker")

    done = make(f"IMAGE=reg.example:5000/me/babelray{tag}", "PUSH=1")

    assert done.returncode == 0, done.stderr
    assert f"docker push reg.example:5000/me/babelray{tag}" in make.calls()
    pushed = f"reg.example:5000/me/babelray@{_DIGEST}"
    assert (make.folder / ".image-gpu").read_text().strip() == pushed
    assert pushed in done.stdout


@pytest.mark.parametrize(
    ("words", "image"),
    [
        ((), "reg/gpu@sha256:1"),
        (("OVERLAY=spot",), "reg/gpu@sha256:1"),
        (("OVERLAY=cpu-smoke",), "reg/cpu@sha256:2"),
        (("OVERLAY=cpu-smoke", "IMAGE=mine:1"), "mine:1"),
    ],
)
def test_launch_takes_the_variant_that_fits(
    make: _Make, words: tuple[str, ...], image: str
) -> None:
    (make.folder / ".image-gpu").write_text("reg/gpu@sha256:1\n")
    (make.folder / ".image-cpu").write_text("reg/cpu@sha256:2\n")

    done = make("--dry-run", "--old-file=setup", *words, target="launch")

    assert done.returncode == 0, done.stderr
    assert f" --image {image} " in done.stdout


def test_refused_push_leaves_nothing_for_launch(make: _Make) -> None:
    make.engine("docker")
    (make.folder / "refuse").touch()

    done = make("IMAGE=reg.example:5000/me/babelray:1", "PUSH=1")

    assert done.returncode == 2
    assert "denied" in done.stderr
    assert not (make.folder / ".image-gpu").exists()


@pytest.mark.parametrize(
    ("words", "engine", "expected"),
    [
        ((), None, "neither docker nor podman is installed"),
        (("VARIANT=tpu",), "docker", "VARIANT is 'tpu': say gpu or cpu"),
        (("PUSH=1",), "docker", "IMAGE=REGISTRY/NAME:TAG"),
        (("IMAGE=other/name", "PUSH=1"), "docker", "does not tell its digest"),
    ],
)
def test_one_message_says_what_is_missing(
    make: _Make, words: tuple[str, ...], engine: str | None, expected: str
) -> None:
    if engine:
        make.engine(engine)

    done = make(*words)

    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(said) == 1
    assert said[0].startswith("make image: error: ")
    assert expected in said[0]
