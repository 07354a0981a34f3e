"""What ``cluster.doctor.probe`` saw, as checks: torch, the GPUs, DeepSpeed, Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from cluster.checks import Check
from cluster.doctor.limits import number
from cluster.doctor.machine import num_gpus

_PATIENCE_S = 90.0
_END_S = 3.0

_ROOT = Path(__file__).resolve().parents[2]

# A product of random matrices, relative to float64; several times what the format itself loses.
_LARGEST_ERRORS = {"float32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2}

# The oldest driver that runs programs of a CUDA release (NVIDIA's release notes, minor version
# compatibility).
_DRIVERS = {"11": "450.80", "12": "525.60", "13": "580.65"}

_TORCH_MEND = "pip install torch for this machine's CUDA (pytorch.org/get-started says which)"


class Probe:
    """The process; ``findings`` waits for its end. It goes with the block."""

    def __init__(self, command: Sequence[str] | None = None, *, patience_s: float = _PATIENCE_S):
        # Not from the working directory, where a user may have a folder of one of our names.
        command = command or [sys.executable, "-P", "-m", "cluster.doctor.probe"]
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._deadline = time.monotonic() + patience_s
        self._patience_s = patience_s
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdout=self._output,
            stderr=self._errors,
            stdin=subprocess.DEVNULL,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # one stuck in a driver cannot be ended
                self._process.wait(_END_S)
        self._errors.close()
        self._output.close()

    def findings(self) -> tuple[list[dict[str, Any]], str | None]:
        """Its lines, and how it ended if not as it should: in a few words."""
        problem = None
        try:
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            problem = f"no answer within {self._patience_s:g} s"
        else:
            if status:
                self._errors.seek(0)
                last = (self._errors.read().strip().splitlines() or [""])[-1]
                how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
                problem = f"{how} {last}".strip()
        self._output.seek(0)
        lines = self._output.read().splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")], problem


def checks(
    findings: Sequence[Mapping[str, Any]], problem: str | None, *, precision: str
) -> Iterator[Check]:
    """What the probe found; ``problem`` where it did not come to its end."""
    begun, seen = "", set()
    for finding in findings:
        ((kind, value),) = finding.items()
        if kind == "begin":
            begun = value
            continue
        seen.add(f"GPU {value['index']}" if kind == "gpu" else kind)
        if kind == "torch":
            yield from torch_checks(value, driver=driver_version(), present=num_gpus())
        elif kind == "gpu":
            yield gpu_check(value, precision=precision)
        else:
            yield _import_check({"deepspeed": "DeepSpeed", "ray": "Ray"}[kind], value)
    if problem is not None:
        name = begun if begun and begun not in seen else "software"
        mend = (
            "see nvidia-smi and dmesg; a GPU that hangs needs a reset or a reboot"
            if name.startswith("GPU") or name == "torch"
            else f"python -c 'import {name}' shows more; install it again"
        )
        yield Check(name, "failure", problem, mend)


def _import_check(name: str, value: Mapping[str, Any]) -> Check:
    if "error" in value:
        mend = "pip install -r requirements.lock"
        return Check(name, "failure", f"cannot be imported: {value['error']}", mend)
    return Check(name, "ok", str(value["version"]))


def torch_checks(value: Mapping[str, Any], *, driver: str | None, present: int) -> Iterator[Check]:
    """torch and CUDA.

    Args:
        value: as the probe says.
        driver: version of NVIDIA's kernel driver, None if there is none.
        present: GPUs that the driver knows of.
    """
    if "error" in value:
        yield _import_check("torch", value)
        return
    if not value["gloo"]:
        yield Check("torch", "failure", f"{value['version']}, built without gloo", _TORCH_MEND)
    else:
        yield Check("torch", "ok", value["version"])
    if value["available"]:
        found = f"CUDA {value['cuda']}, driver {driver or 'unknown'}, NCCL {value['nccl']}"
        yield Check("CUDA", "ok", found)
    elif driver is None and present == 0:
        yield Check("CUDA", "ok", "no NVIDIA driver here")
    elif value["cuda"] is None:
        found = f"{present} GPUs and driver {driver}, but torch {value['version']} has no CUDA"
        yield Check("CUDA", "failure", found, _TORCH_MEND)
    else:
        said = str(value["said"] or "torch sees no GPU").partition(". ")[0]
        found = f"driver {driver}, torch for CUDA {value['cuda']}: {said}"
        yield Check("CUDA", "failure", found, _driver_mend(driver, value["cuda"]))


def _driver_mend(driver: str | None, cuda: str) -> str:
    oldest = _DRIVERS.get(cuda.partition(".")[0])
    if driver is not None and oldest is not None and _parts(driver) < _parts(oldest):
        return f"install driver {oldest} or newer, or a torch for an older CUDA"
    return (
        "let this process see the GPUs: docker run --gpus all, a GPU in the pod's resources, "
        "CUDA_VISIBLE_DEVICES; nvidia-smi shows whether the driver works"
    )


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Of NVIDIA's kernel module."""
    try:
        words = file.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdecimal()), "unknown")


def gpu_check(value: Mapping[str, Any], *, precision: str) -> Check:
    """One GPU: does it compute, has it memory, does it know the configured precision?"""
    name = f"GPU {value['index']}"
    if "error" in value:
        mend = "nvidia-smi shows its state; it may be in use by others, or need a reset"
        return Check(name, "failure", value["error"], mend)
    major, minor = value["capability"]
    found = (
        f"{value['name']}, {number(value['free'])}B free of {number(value['total'])}B, "
        f"compute capability {major}.{minor}"
    )
    wrong = [
        dtype for dtype, error in value["errors"].items() if not error < _LARGEST_ERRORS[dtype]
    ]
    if wrong:
        mend = "do not train on it: its memory or its cores are damaged (nvidia-smi -q -d ECC)"
        return Check(name, "failure", f"{found}: computes wrongly in {', '.join(wrong)}", mend)
    if precision == "bf16" and not value["bf16"]:
        mend = "set trainer.precision=fp16 or fp32"
        return Check(name, "failure", f"{found}: has no bf16, which is configured", mend)
    if value["free"] < value["total"] / 2:
        mend = "nvidia-smi shows which processes hold its memory"
        return Check(name, "warning", f"{found}: in use", mend)
    return Check(name, "ok", f"{found}, computes rightly")
