"""The container image: what its files say, and (slow) the image itself, built and run."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_REPOSITORY = Path(__file__).resolve().parents[2]
_DOCKERFILE = _REPOSITORY / "Dockerfile"
_BASE = "debian:bookworm-slim"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_BUILD_S, _RUN_S = 1800, 900

# As a pod of ours runs: a read-only root, no rights, no network; /tmp and the volumes are writable.
_LOCKED_DOWN = shlex.split(
    "--read-only --network none --tmpfs /tmp:rw,exec,mode=1777 --shm-size 1g"
    " --cap-drop ALL --security-opt no-new-privileges"
)


def _instructions(name: str) -> list[str]:
    """What follows every instruction ``name`` in the Dockerfile, continued lines joined."""
    text = _DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, flags=re.MULTILINE)


def _default(argument: str) -> str:
    """What the build argument is if nobody passes it."""
    found = [
        line.split("=", 1)[1] for line in _instructions("ARG") if line.startswith(f"{argument}=")
    ]
    return found[0]


def _project() -> dict[str, Any]:
    return tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())


def _locked() -> dict[str, str]:
    """Canonical name and version of all that requirements.lock pins."""
    lines = (_REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = (line.split("==", 1) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"

    found = subprocess.run([hadolint, _DOCKERFILE], capture_output=True, text=True, check=False)

    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_ray_has_one_version_everywhere() -> None:
    (ray,) = [
        requirement
        for requirement in map(Requirement, _project()["project"]["dependencies"])
        if requirement.name == "ray"
    ]
    manifests = {
        f"{path.relative_to(_REPOSITORY)}: {version}": version
        for path in sorted((_REPOSITORY / "k8s").rglob("*.yaml"))
        if "rayVersion" in path.read_text()
        for document in yaml.safe_load_all(path.read_text())
        for version in _ray_versions(document)
    }

    assert manifests, "no manifest names a rayVersion"
    versions = {
        "pyproject.toml": str(ray.specifier).removeprefix("=="),
        "requirements.lock": _locked()["ray"],
        "Dockerfile": _default("RAY_VERSION"),
        **manifests,
    }
    assert set(versions.values()) == {versions["pyproject.toml"]}, versions
    assert "dev.babelray.ray-version=${RAY_VERSION}" in _instructions("LABEL")[-1]


def _ray_versions(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "rayVersion" in node:
            yield str(node["rayVersion"])
        for value in node.values():
            yield from _ray_versions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _ray_versions(value)


def test_version_is_the_projects() -> None:
    assert _default("VERSION") == _project()["project"]["version"]


def test_gpu_is_the_default_and_the_user_has_no_rights() -> None:
    assert _default("VARIANT") == "gpu"
    assert _instructions("USER")[-1] == "10001:10001"


def test_every_dependency_is_locked() -> None:
    project = _project()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["s3"], *extras["gcs"]]

    missing = {
        requirement.name
        for requirement in map(Requirement, wanted)
        if not requirement.specifier.contains(
            _locked().get(canonicalize_name(requirement.name), "0")
        )
    }

    assert not missing


def test_every_package_is_copied() -> None:
    packages = {name.split(".")[0] for name in _project()["tool"]["setuptools"]["packages"]}
    copied = {word for line in _instructions("COPY") for word in line.split()[:-1]}

    assert packages <= copied


def _is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` out: the last pattern that fits it or a parent wins."""
    ignored = False
    parts = path.split("/")
    parents = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for line in (_REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            fits = any(
                fnmatch.fnmatchcase(parent, pattern)
                for parent in parents
                if parent.count("/") == pattern.count("/")
            )
        if fits:
            ignored = not line.startswith("!")
    return ignored


def test_only_what_is_needed_is_sent_to_the_builder() -> None:
    private = (
        ".git/config",
        ".venv/bin/python",
        ".image",
        "runs/demo/best.json",
        "data/multi30k/manifest.json",
        "tests/conftest.py",
        "docs/image.md",
        "cluster/__pycache__/cli.cpython-311.pyc",
        "k8s/.env",
    )
    assert [path for path in private if not _is_ignored(path)] == []

    needed = {
        word
        for line in _instructions("COPY")
        if not line.startswith("--from")
        for word in line.split()[:-1]
    }
    files = [
        str(file.relative_to(_REPOSITORY))
        for name in needed
        for file in [_REPOSITORY / name, *(_REPOSITORY / name).rglob("*.py")]
    ]
    assert [path for path in files if _is_ignored(path)] == []


# The image itself.


def _docker(*arguments: object, timeout: float = _RUN_S) -> str:
    """What docker wrote on standard output; a failure shows the end of all that it wrote."""
    done = subprocess.run(
        ["docker", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip()


def _inside(image: str, *command: str, options: Sequence[str] = ()) -> str:
    """What a command writes in a new container, which is gone afterwards whatever happens."""
    name = f"babelray-test-{uuid.uuid4().hex[:8]}"
    try:
        return _docker("run", f"--name={name}", *_LOCKED_DOWN, *options, image, *command)
    finally:
        _docker("rm", "--force", name)


def _has(*command: str) -> bool:
    """Whether the command is there and ends well."""
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class _Builder:
    """Builds the image, on a base that may have to be made here; ``remove`` leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"babelray-test-{uuid.uuid4().hex[:8]}"
        self.base = _BASE if self._can_pull() else self._bootstrap()
        self.build_base = self._with_this_machines_pip()

    def _can_pull(self) -> bool:
        return _has("docker", "image", "inspect", _BASE) or _has("docker", "pull", _BASE)

    def _bootstrap(self) -> str:
        """Debian from its own archive, where no registry of images can be reached."""
        if os.geteuid() != 0 or not shutil.which("debootstrap"):
            pytest.skip(f"{_BASE} cannot be pulled, nor made: that takes root and debootstrap")
        root = self.folder / "root"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", root],
            check=True,
            capture_output=True,
            timeout=_RUN_S,
        )
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(
                ["docker", "import", "-", f"{self.name}:base"],
                stdin=archive.stdout,
                check=True,
                capture_output=True,
            )
        shutil.rmtree(root)
        return f"{self.name}:base"

    def _with_this_machines_pip(self) -> str:
        """The base with pip set up as here (mirror, certificates, wheels): only to build on."""
        context = self.folder / "pip"
        context.mkdir()
        settings = dict(
            line.split("=", 1)
            for line in subprocess.check_output(
                [sys.executable, "-m", "pip", "config", "list"], text=True
            ).splitlines()
        )
        pip = {key.split(".")[-1]: value.strip("'") for key, value in sorted(settings.items())}
        wheels = [Path(place) for place in pip.get("find-links", "").split()]
        wheels = [wheel for place in wheels for wheel in place.glob("torch-*.whl")]
        self.torch_index = "" if any("+cpu" in wheel.name for wheel in wheels) else _CPU_INDEX
        if self.torch_index:
            try:
                urlopen(f"{_CPU_INDEX}/torch/", timeout=10).close()
            except URLError as error:
                pytest.skip(f"torch's CPU build is not to be had: {_CPU_INDEX}: {error.reason}")

        (context / "wheels").mkdir()
        for wheel in wheels:
            shutil.copy(wheel, context / "wheels")
        certificates = Path(pip.get("cert", "/etc/ssl/certs/ca-certificates.crt"))
        if certificates.is_file():
            shutil.copy(certificates, context / "wheels" / "certificates.pem")
        lines = [f"{key} = {pip[key]}" for key in ("index-url", "trusted-host") if key in pip]
        lines += ["find-links = /wheels", "timeout = 180"]
        lines += ["cert = /wheels/certificates.pem"] if certificates.is_file() else []
        (context / "wheels" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        (context / "Dockerfile").write_text(
            f"FROM {self.base}\nCOPY wheels /wheels\nRUN cp /wheels/pip.conf /etc/pip.conf\n"
        )
        _docker("build", "--tag", f"{self.name}:build-base", context)
        return f"{self.name}:build-base"

    def build(self, tag: str, *, fresh: bool = False) -> str:
        """The CPU image, from the files as they lie here."""
        arguments = {
            "BASE": self.base,
            "BUILD_BASE": self.build_base,
            "VARIANT": "cpu",
            "TORCH_INDEX": self.torch_index,
        }
        _docker(
            "build",
            "--network=host",
            *(["--no-cache"] if fresh else []),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            f"--tag={self.name}:{tag}",
            _REPOSITORY,
            timeout=_BUILD_S,
        )
        return f"{self.name}:{tag}"

    def remove(self) -> None:
        """The images made here, and the stages between: those that lie on our base to build on."""
        below = _layers(self.build_base)
        dangling = _docker("image", "ls", "--quiet", "--filter=dangling=true").split()
        stages = [one for one in sorted(set(dangling)) if _layers(one)[: len(below)] == below]
        named = _docker("image", "ls", "--format={{.Repository}}:{{.Tag}}", self.name).split()
        _docker("image", "rm", "--force", *named, *stages)


def _layers(image: str) -> list[str]:
    return _docker("image", "inspect", '--format={{join .RootFS.Layers " "}}', image).split()


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Builder]:
    if not _has("docker", "info"):
        pytest.skip("no docker that answers")
    made = _Builder(tmp_path_factory.mktemp("image"))
    yield made
    made.remove()


@pytest.fixture(scope="module")
def image(builder: _Builder) -> str:
    return builder.build("cpu")


@pytest.fixture
def volumes() -> Iterator[list[str]]:
    """Options that mount new volumes where runs and data go."""
    name = f"babelray-test-{uuid.uuid4().hex[:8]}"
    folders = ("runs", "data")
    yield [f"--volume={name}-{folder}:/workspace/{folder}" for folder in folders]
    _docker("volume", "rm", "--force", *(f"{name}-{folder}" for folder in folders))


@pytest.mark.slow
@pytest.mark.timeout(_BUILD_S + 2 * _RUN_S)
def test_demo_trains_with_a_read_only_root(image: str, volumes: list[str]) -> None:
    def babelray(*arguments: str) -> str:
        return _inside(image, "babelray", *arguments, options=volumes)

    assert babelray("--version") == f"babelray {_default('VERSION')}"
    config = ("--config", "configs/tiny.yaml")
    babelray("data", "prepare", *config)
    log = babelray("train", *config, "--name", "demo", "--workers", "2", "--overwrite")
    assert "finished" in log
    scores = babelray("evaluate", "demo")
    bleu = re.search(r"^BLEU +([\d.]+)", scores, flags=re.MULTILINE)
    assert bleu
    assert float(bleu[1]) > 80, scores
    babelray("report", "demo")
    owner = _inside(image, "stat", "-c%u", "runs/demo/report.html", options=volumes)
    assert owner == "10001"


@pytest.mark.slow
@pytest.mark.timeout(_BUILD_S + _RUN_S)
def test_head_starts_as_kuberay_starts_it(image: str) -> None:
    """With its command, its probes, its check before a worker starts, and its way to submit."""
    start = "ulimit -n 65536; ray start --head --block --num-cpus=0 --dashboard-host=0.0.0.0"
    command = f"{start} --metrics-export-port=8080 --dashboard-agent-listen-port=52365"
    head = _docker("run", "--detach", *_LOCKED_DOWN, image, "bash", "-lc", "--", command)
    try:

        def inside(script: str) -> str:
            return _docker("exec", head, "bash", "-lc", script)

        inside("for i in {1..90}; do ray health-check 2>/dev/null && exit; sleep 1; done; exit 1")
        probe = "wget -T 10 -q -O- http://localhost:{} | grep success"
        for path in ("52365/api/local_raylet_healthz", "8265/api/gcs_healthz"):
            assert "success" in inside(
                f"for i in {{1..30}}; do {probe.format(path)} && exit; sleep 1; done; exit 1"
            )
        inside(
            "python3 -c 'from urllib.request import urlopen as u;"
            ' u("http://localhost:8265/api/gcs_healthz", timeout=5)\''
        )
        told = inside("ray job submit --address http://127.0.0.1:8265 -- babelray --version 2>&1")
        assert f"babelray {_default('VERSION')}" in told
        assert "succeeded" in told
    finally:
        _docker("rm", "--force", head)


# Run inside the image: distributions with their versions, and sources without bytecode.
_INVENTORY = """
import importlib.metadata, importlib.util, json, pathlib, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
print(json.dumps({
    "versions": {d.name: d.version for d in importlib.metadata.distributions()},
    "uncompiled": [
        str(source.relative_to(site)) for source in site.rglob("*.py")
        if not pathlib.Path(importlib.util.cache_from_source(source)).exists()
    ],
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(_BUILD_S + _RUN_S)
def test_only_locked_packages_and_nothing_to_compile_with(image: str) -> None:
    found = json.loads(_inside(image, "python3", "-c", _INVENTORY))
    versions = {str(canonicalize_name(name)): at for name, at in found["versions"].items()}
    assert versions.pop("babelray") == _default("VERSION")
    assert versions["torch"].endswith("+cpu")
    # The lock leaves out what comes with pip itself; the Dockerfile says which it is.
    locked = _locked() | {
        "setuptools": re.findall(r"setuptools==(\S+);", _DOCKERFILE.read_text())[0]
    }
    assert {name: at for name, at in versions.items() if at.split("+")[0] != locked.get(name)} == {}
    assert not versions.keys() & {"pytest", "ruff", "mypy", "moto", "playwright", "pip"}

    # One of torch's own tests, in the syntax of Python 3.12.
    assert found["uncompiled"] == ["torch/testing/_internal/py312_intrinsics.py"]
    tools = "for tool in cc gcc c++ nvcc ninja pip; do command -v $tool; done; true"
    assert _inside(image, "bash", "-lc", tools) in ("", "/opt/babelray/bin/ninja")
    assert _inside(image, "id", "-u") == "10001"


@pytest.mark.slow
@pytest.mark.timeout(2 * _BUILD_S + _RUN_S)
def test_building_twice_gives_the_same_files(builder: _Builder, image: str) -> None:
    again = builder.build("again", fresh=True)

    first, second = _files(image), _files(again)

    assert len(first) > 10_000
    assert {
        path: (first.get(path), second.get(path))
        for path in first.keys() | second.keys()
        if first.get(path) != second.get(path)
    } == {}


def _files(image: str) -> dict[str, tuple[object, ...]]:
    """Rights, owner, kind, link and content of every file of the image."""
    container = _docker("create", image)
    files: dict[str, tuple[object, ...]] = {}
    try:
        with (
            subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as export,
            tarfile.open(fileobj=export.stdout, mode="r|") as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                digest = hashlib.file_digest(content, "sha256").hexdigest() if content else ""
                facts = (member.mode, member.uid, member.gid, member.type, member.linkname)
                files[member.name] = (*facts, digest)
    finally:
        _docker("rm", container)
    return files
