"""The energy that training takes, where the hardware tells it.

GPUs tell through NVML what each has taken since the driver was loaded. CPU packages of Intel and
AMD tell through the kernel's powercap interface, if it may be read; that is of the whole machine,
so the machine's first rank reads it for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch

log = logging.getLogger(__name__)

Source = Literal["gpu", "cpu_package"]
SOURCES: tuple[Source, ...] = get_args(Source)

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """What a rank's share of a machine takes.

    Args:
        device: the rank's.
        local_rank: the machine's first rank also reads the CPU packages.
    """

    def __init__(
        self, device: torch.device, *, local_rank: int, powercap: Path = _POWERCAP
    ) -> None:
        self._counters: list[tuple[Source, Callable[[], float]]] = []
        if device.type == "cuda" and (gpu := _gpu(device)) is not None:
            self._counters.append(("gpu", gpu))
        if local_rank == 0:
            packages = sorted(powercap.glob("*-rapl:[0-9]*"))
            # A package's parts (its cores, its memory) have a second number.
            tops = [package for package in packages if package.name.count(":") == 1]
            self._counters += [
                ("cpu_package", counter) for top in tops if (counter := _package(top)) is not None
            ]

    def read(self) -> dict[Source, float]:
        """Joules since the last call (or since the meter was made); empty where nothing tells."""
        joules: dict[Source, float] = {}
        for source, counter in self._counters:
            joules[source] = joules.get(source, 0.0) + counter()
        return joules


def _gpu(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        last = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # a package that is missing, or NVML's many errors
        log.info("the GPU's energy is not known: %s", error)
        return None

    def joules() -> float:
        nonlocal last
        now = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
        used, last = (now - last) / 1e3, now
        return float(used)

    return joules


def _package(folder: Path) -> Callable[[], float] | None:
    counter = folder / "energy_uj"
    try:
        last = int(counter.read_text())
        wraps_at = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):  # on most machines only root may read it
        return None

    def joules() -> float:
        nonlocal last
        try:
            now = int(counter.read_text())
        except (OSError, ValueError):
            return 0.0
        used, last = now - last, now
        return (used if used >= 0 else used + wraps_at) / 1e6

    return joules
