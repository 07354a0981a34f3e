"""What an all-reduce should reach: bus bandwidth by what joins the devices.

Bus bandwidth (NCCL's measure) is what each device sends: size over time, times 2(n-1)/n. It can be
compared with the speed of a link in one direction, whatever the number of devices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# GB/s of all NVLinks of a GPU in one direction: half of what NVIDIA's data sheets give.
_NVLINK = {"B200": 900.0, "H200": 450.0, "H100": 450.0, "A100": 300.0, "V100": 150.0}

# GB/s of 16 lanes, halved: without NVLink data passes through the host's memory.
_PCIE = {
    "H100": 32.0, "H200": 32.0, "L40S": 16.0, "L40": 16.0, "L4": 16.0, "A100": 16.0, "A40": 16.0,
    "A30": 16.0, "A10": 16.0, "A10G": 16.0, "V100": 8.0, "T4": 8.0, "P100": 8.0,
}  # fmt: skip

# Below this part of what is expected something is wrong, rather than merely not ideal.
ENOUGH = 0.6


@dataclass(frozen=True)
class Link:
    """What joins the devices; ``gigabytes`` a second in one direction, None: nobody knows."""

    name: str
    gigabytes: float | None


def within(ranks: Sequence[Mapping[str, Any]]) -> Link:
    """Between the devices of one machine, from what its ranks say (``Rank.hello``)."""
    gpu = ranks[0]["gpu"]
    if gpu is None:
        return Link("this machine's memory", None)
    words = set(re.split(r"[^A-Za-z0-9]+", gpu))
    model = next((name for name in _NVLINK if name in words), None)
    on_board = not words & {"PCIe", "PCIE", "NVL"}
    if model is not None and on_board:
        return Link(f"NVLink of {model}", _NVLINK[model])
    if any(rank["nvlinks"] for rank in ranks):
        return Link("NVLink bridges", None)  # some pairs have one, others do not
    card = next((name for name in _PCIE if name in words), None)
    return Link("PCIe through the host's memory", _PCIE[card] if card else None)


def across(ranks: Sequence[Mapping[str, Any]], *, gbits: float | None = None) -> Link:
    """Between machines: the slowest of their links.

    Args:
        ranks: of all machines.
        gbits: Gbit/s as the user says, where the machines cannot see it.
    """
    if gbits is not None:
        return Link(f"{gbits:g} Gbit/s as given", gbits / 8)
    links = [_of_machine(rank["links"], on_gpu=rank["gpu"] is not None) for rank in ranks]
    unknown = [link for link in links if link.gigabytes is None]
    if unknown:
        return unknown[0]
    return min(links, key=lambda link: link.gigabytes or 0.0)


def _of_machine(links: Mapping[str, Any], *, on_gpu: bool) -> Link:
    ports = links["infiniband"]
    if ports and on_gpu:  # gloo speaks TCP alone
        total = sum(rate for _, rate in ports)
        names = ", ".join(device for device, _ in ports)
        return Link(f"{names}, {total:g} Gbit/s together", total / 8)
    name = links["name"] or "an unknown interface"
    if not links["physical"]:
        return Link(f"{name}, which is virtual", None)
    if links["gbits"] is None:
        return Link(f"{name}, whose speed its driver does not tell", None)
    return Link(f"{name}, {links['gbits']:g} Gbit/s", links["gbits"] / 8)


def mend(link: Link, transports: Sequence[str], ranks: Sequence[Mapping[str, Any]]) -> str:
    """What to try where the link gives less than it should."""
    has_infiniband = any(rank["links"]["infiniband"] for rank in ranks)
    if "NET/Socket" in transports and has_infiniband:
        return (
            "NCCL uses sockets though there is InfiniBand: give the pods the device (component "
            "rdma), unset NCCL_IB_DISABLE, set NCCL_IB_HCA; NCCL_DEBUG=INFO tells why"
        )
    if "NET/IB" in transports:
        return (
            "NCCL copies through the host's memory: load nvidia-peermem or use DMA-BUF for "
            "GPUDirect (NCCL_NET_GDR_LEVEL, NCCL_DEBUG=INFO)"
        )
    if link.name.startswith("NVLink") and "P2P" not in transports:
        return "NCCL does not use NVLink: nvidia-smi topo -m, NCCL_P2P_DISABLE, the fabric manager"
    if link.name.startswith("PCIe"):
        return (
            "nvidia-smi topo -m shows how the GPUs are joined; PCIe access control (ACS) slows P2P"
        )
    return (
        "others may use the network now; choose the interface with NCCL_SOCKET_IFNAME (GPUs) or "
        "GLOO_SOCKET_IFNAME (CPUs), and look at its errors: ip -s link"
    )
