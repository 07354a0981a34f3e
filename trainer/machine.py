"""What a rank runs on: names, versions, and how many operations a second it can make.

Utilisation wants a peak. For a GPU that is known it is the vendor's figure; for anything else, all
CPUs among them, it is what a large matrix product reaches here, with this run's threads and
precision. That rate is measured on every device: it is also the sustained rate by which the paper
reckons its training cost (Vaswani et al. 2017, section 6.1).
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from model.cost import peak_flops
from trainer.config import TrainerConfig

PeakSource = Literal["data sheet", "measured", "configured"]

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Seconds of measuring, after one product that is not timed.
_BUDGET_S = 0.1


@dataclass(frozen=True)
class Rates:
    """Operations a second: of one device, or of all together."""

    peak: float
    source: PeakSource
    sustained: float


def rates(config: TrainerConfig, device: torch.device) -> Rates:
    """Of this rank's device, at the run's precision; takes a tenth of a second."""
    sustained = matrix_rate(device, _TYPES[config.precision])
    if config.peak_flops is not None:
        return Rates(config.peak_flops, "configured", sustained)
    known = (
        peak_flops(torch.cuda.get_device_name(device), config.precision)
        if device.type == "cuda"
        else None
    )
    if known is not None:
        return Rates(known, "data sheet", sustained)
    return Rates(sustained, "measured", sustained)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that square matrix products reach; the best of a few."""
    size = 8192 if device.type == "cuda" else 512
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)  # leaves random numbers alone
    best_s, until = float("inf"), float("inf")
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if until == float("inf"):
            until = now + _BUDGET_S  # the first one also sets things up
        else:
            best_s = min(best_s, now - began)
    if device.type == "cuda":  # the run's own peak is told of later
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * size**3 / best_s


def describe(device: torch.device) -> dict[str, Any]:
    """This machine, for people: ``cpu``, ``cores``, ``memory_bytes``, ``gpu``."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """What it runs with, by package."""
    found = {"python": platform.python_version()}
    for package in ("babelray", "torch", "deepspeed", "ray", "webdataset", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    found["torch"] = torch.__version__  # with its build, such as +cpu
    return found


def cpu_name() -> str:
    """As the kernel names it, or else the kind of machine."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
