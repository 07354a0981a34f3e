"""What is known of the devices that a plan can be made for.

Peaks are those of ``model.cost``. The paper's own devices are too old for the half precision of
this system; theirs is the float32 rate that the paper reckons with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches

from data_shards.errors import UserError
from model.cost import peak_flops

# Share of the peak that the products of a training step reach: one published rate of the paper's
# big model (DeepLearningExamples, one A100, 113.9 ms a step) over what model.cost counts for it.
# benchmarks/scaling.py derives it and docs/scaling.md holds it against seventeen other rates.
UTILISATION = 0.345


@dataclass(frozen=True)
class Device:
    """A kind of GPU, as its data sheet has it.

    Attributes:
        memory_gb: memory of one.
        memory_gb_s: bandwidth of that memory; None: not looked up.
        bus_gb_s: of an all-reduce over eight in one machine; None: no measurement known.
            Sources: docs/scaling.md.
        paper_flops: sustained float32 operations a second.
            Source: Vaswani et al. 2017, footnote 5.
    """

    name: str
    memory_gb: float
    memory_gb_s: float | None = None
    bus_gb_s: float | None = None
    paper_flops: float | None = None


DEVICES = {
    device.name: device
    for device in (
        # A machine of eight: 1,440 GB and 64 TB/s.
        Device("B200", 180, 8000),
        Device("H200", 141, 4800, 475),
        Device("H100", 80, 3350, 476),
        Device("A100-80", 80, 2039, 200),
        Device("A100-40", 40, 1555, 200),
        Device("V100-32", 32, 900, 120),
        Device("V100-16", 16, 900, 120),
        Device("L4", 24, 300),
        Device("P100", 16, 732, paper_flops=9.5e12),
        Device("M40", 24, 288, paper_flops=6.0e12),
        Device("K80", 12, 240, paper_flops=2.8e12),
        Device("K40", 12, 288, paper_flops=3.7e12),
    )
}
_SHORT = {"A100": "A100-80", "V100": "V100-32"}


@dataclass(frozen=True)
class Rate:
    """How fast one device multiplies matrices at most.

    Attributes:
        flops: operations a second.
        precision: that it is of; the configuration's, or fp32 where the device lacks that.
        source: whose number it is.
    """

    flops: float
    precision: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind, in one machine as far as they fit (eight)."""

    device: Device
    num_devices: int

    def __str__(self) -> str:
        return f"{self.num_devices} x {self.device.name}"


def split_hardware(text: str) -> tuple[int, str]:
    """``8xP100`` as number and name.

    Raises:
        UserError: it is not written so.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX*]\s*(\S+)\s*", text)
    if match is None:
        raise UserError(f"--hardware {text!r}: write number and kind of device, such as 8xP100")
    return int(match[1]), match[2]


def make_hardware(num_devices: int, name: str, *, memory_gb: float | None = None) -> Hardware:
    """So many of a kind; the name in any case, ``A100`` for the one with 80 GB.

    Args:
        memory_gb: of one, instead of what its data sheet has; a device without one needs it.

    Raises:
        UserError: none, a device that is not known, or no such memory.
    """
    if num_devices < 1:
        raise UserError(f"{num_devices} devices: at least 1 is needed")
    if memory_gb is not None and not 0 < memory_gb < float("inf"):
        raise UserError(f"--memory {memory_gb:g}: give the memory of one device in GB, such as 80")
    known = {key.lower(): device for key, device in DEVICES.items()}
    known |= {short.lower(): DEVICES[full] for short, full in _SHORT.items()}
    device = known.get(name.lower())
    if device is None and memory_gb is not None:
        device = Device(name, memory_gb)
    if device is None:
        close = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {known[close[0]].name}? " if close else ""
        raise UserError(
            f"no data sheet of {name!r} here; {hint}known: {', '.join(DEVICES)}. For another "
            "device give --sustained TFLOPS and --memory GB"
        )
    if memory_gb is not None:
        device = replace(device, memory_gb=memory_gb)
    return Hardware(device, num_devices)


def rate_of(device: Device, precision: str) -> Rate:
    """What the device does at most in a precision, or in fp32 where it has none such.

    Raises:
        UserError: neither is known.
    """
    if device.paper_flops is not None:
        return Rate(device.paper_flops, "fp32", "Vaswani et al. 2017, footnote 5")
    name = device.name.partition("-")[0]
    for tried in (precision, "fp16" if precision == "bf16" else precision, "fp32"):
        peak = peak_flops(name, tried)
        if peak is not None:
            return Rate(peak, tried, "data sheet, dense")
    raise UserError(f"no peak rate of {device.name} is known: give --sustained TFLOPS")
