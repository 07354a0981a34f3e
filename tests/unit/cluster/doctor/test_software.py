"""What the probe saw, and a probe that crashes or hangs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import Check
from cluster.doctor import software

_TORCH = {
    "version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "available": True, "devices": 1,
    "nccl": "2.28.3", "gloo": True, "said": None,
}  # fmt: skip
_GPU = {
    "index": 0, "name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "free": 84e9, "total": 85e9,
    "bf16": True, "errors": {"float32": 1e-6, "float16": 4e-4, "bfloat16": 3e-3},
}  # fmt: skip


def run(code: str, *, patience_s: float = 20.0) -> list[Check]:
    with software.Probe([sys.executable, "-S", "-c", code], patience_s=patience_s) as probe:
        findings, problem = probe.findings()
    return list(software.checks(findings, problem, precision="fp32"))


def test_a_library_that_crashes_is_named() -> None:
    [check] = run('import os; print(\'{"begin": "deepspeed"}\', flush=True); os.abort()')
    assert (check.name, check.outcome) == ("deepspeed", "failure")
    assert "killed by signal 6" in check.found


def test_a_device_that_hangs_is_named() -> None:
    code = 'import time; print(\'{"begin": "GPU 3"}\', flush=True); time.sleep(60)'
    [check] = run(code, patience_s=1.5)
    assert (check.name, check.outcome) == ("GPU 3", "failure")
    assert "no answer within 1.5 s" in check.found
    assert "reset" in (check.mend or "")


def test_what_is_not_installed() -> None:
    [check] = run("print('" + json.dumps({"ray": {"error": "ImportError: no"}}) + "')")
    assert check == Check(
        "Ray", "failure", "cannot be imported: ImportError: no", "pip install -r requirements.lock"
    )


def test_the_libraries_of_this_machine_from_a_folder_with_names_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a folder called model/ shall not have it imported."""
    for name in ("cluster", "trainer", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with software.Probe() as probe:
        findings, problem = probe.findings()
    assert problem is None
    found = {check.name: check for check in software.checks(findings, problem, precision="fp32")}
    assert {"torch", "CUDA", "DeepSpeed", "Ray"} <= set(found)
    assert found["DeepSpeed"].outcome == found["Ray"].outcome == "ok"


def torch(driver: str | None, present: int, **changes: Any) -> list[Check]:
    return list(software.torch_checks({**_TORCH, **changes}, driver=driver, present=present))


def test_torch_and_its_driver() -> None:
    found = torch("580.95.05", 1)
    assert [check.outcome for check in found] == ["ok", "ok"]
    assert found[1].found == "CUDA 13.0, driver 580.95.05, NCCL 2.28.3"
    assert torch(None, 0, available=False, cuda=None)[1].outcome == "ok"
    assert torch(None, 0, gloo=False)[0].outcome == "failure"


def test_gpus_that_torch_cannot_use() -> None:
    check = torch("580.95.05", 2, available=False, cuda=None, version="2.13.0+cpu")[1]
    assert check.outcome == "failure"
    assert "2.13.0+cpu has no CUDA" in check.found
    check = torch("470.57.02", 1, available=False, said="The driver is too old. Update")[1]
    assert check.found == "driver 470.57.02, torch for CUDA 13.0: The driver is too old"
    assert "install driver 580.65 or newer" in (check.mend or "")
    check = torch("580.95.05", 0, available=False)[1]
    assert "docker run --gpus all" in (check.mend or "")


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({}, "ok", "computes rightly"),
        ({"errors": {"float32": 0.3}}, "failure", "computes wrongly in float32"),
        ({"errors": {"float16": float("nan")}}, "failure", "computes wrongly in float16"),
        ({"bf16": False, "capability": [7, 0]}, "failure", "has no bf16"),
        ({"free": 1e9}, "warning", "in use"),
        ({"error": "RuntimeError: CUDA error: out of memory"}, "failure", "out of memory"),
    ],
)
def test_a_device(changes: dict[str, Any], outcome: str, said: str) -> None:
    check = software.gpu_check({**_GPU, **changes}, precision="bf16")
    assert check.outcome == outcome
    assert said in check.found


def test_the_driver_of_this_machine(tmp_path: Any) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 12.2.0\n"
    )
    assert software.driver_version(file) == "580.95.05"
    assert software.driver_version(tmp_path / "none") is None
