"""How many workers a RayJob asks for and how large they are; reads and scales quantities."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_shards.errors import UserError

_NODES = re.compile(r"(\d+)(?::(\d+))?")
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([a-zA-Z]*)")
_UNITS = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "E": 1e18, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
    "Ei": 2.0**60,
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The worker pods of a RayJob.

    Attributes:
        low, high: how many pods at least and at most.
        gpus: of each; 0 in an overlay without GPUs.
        gpu_resource: the name under which Kubernetes counts them.
        ranks: workers in each pod: one a GPU, or one a CPU where there are none.
        autoscales: whether pods come and go between ``low`` and ``high``.
    """

    low: int
    high: int
    gpus: int
    gpu_resource: str | None
    ranks: int
    autoscales: bool

    @property
    def pods(self) -> str:
        """For a person: "2", or "1 to 4"."""
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


class QuantityError(UserError):
    """Something is written where Kubernetes has a quantity, and is none."""


def quantity(text: object) -> float:
    """A Kubernetes quantity in its base unit: "500m" is 0.5, "2Gi" 2147483648.

    Raises:
        QuantityError: it is none.
    """
    found = _QUANTITY.fullmatch(str(text))
    if found is None or found[2] not in _UNITS:
        raise QuantityError(f"{str(text)!r} is no quantity of Kubernetes (such as 2, 500m or 8Gi)")
    return float(found[1]) * _UNITS[found[2]]


def node_range(nodes: str) -> tuple[int, int]:
    """The least and the greatest number of nodes of "2" or "1:4".

    Raises:
        UserError: it is neither.
    """
    found = _NODES.fullmatch(nodes)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--nodes {nodes}: give a number from 1, such as 2, or a range such as 1:4")
    return low, high


def group_index(job: Mapping[str, Any]) -> int:
    """Which worker group is the one that is sized: the only one, or the one named "workers".

    Raises:
        UserError: there is none, or several and none of that name.
    """
    groups = job["spec"]["rayClusterSpec"].get("workerGroupSpecs") or []
    names = [group.get("groupName") for group in groups]
    if len(groups) == 1:
        return 0
    if "workers" in names:
        return names.index("workers")
    raise UserError(
        f"the RayJob {job['metadata']['name']} has the worker groups {names}: "
        'one of them must be called "workers", so that it can be sized'
    )


def read_group(job: Mapping[str, Any]) -> Group:
    """The worker pods that a RayJob asks for."""
    cluster = job["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][group_index(job)]
    autoscales = bool(cluster.get("enableInTreeAutoscaling"))
    hosts = int(group.get("numOfHosts") or 1)
    replicas = int(group.get("replicas") or group.get("minReplicas") or 0)
    low = int(group.get("minReplicas") or 0) if autoscales else replicas
    high = int(group.get("maxReplicas") or replicas) if autoscales else replicas
    resources = limits(group["template"]["spec"]["containers"][0])
    gpu_resource = next((name for name in resources if name.endswith("/gpu")), None)
    gpus = int(quantity(resources[gpu_resource])) if gpu_resource else 0
    asked = (group.get("rayStartParams") or {}).get("num-cpus")
    cpus = int(asked) if asked else math.floor(quantity(resources.get("cpu", 1)))
    return Group(
        max(low, 1) * hosts, high * hosts, gpus, gpu_resource, gpus or max(1, cpus), autoscales
    )


def limits(container: Mapping[str, Any]) -> dict[str, Any]:
    """What a container may use, or asks for where it has no limit."""
    resources = container.get("resources") or {}
    return {**(resources.get("requests") or {}), **(resources.get("limits") or {})}


def workers_of(group: Group) -> str:
    """What ``--workers`` says for a group: "16", or "8:16" where it is elastic."""
    low, high = group.low * group.ranks, group.high * group.ranks
    return f"{low}:{high}" if group.autoscales else str(low)


def scaled(group: Mapping[str, Any], gpus: int) -> Iterator[tuple[str, object]]:
    """What changes in a worker group when each pod gets ``gpus`` GPUs: (path, new value).

    CPUs, memory and the shared memory in it change in proportion.

    Raises:
        UserError: the group has no GPUs.
    """
    spec = group["template"]["spec"]
    container = spec["containers"][0]
    name = next((name for name in limits(container) if name.endswith("/gpu")), None)
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give the whole number of GPUs of a worker, from 1")
    if name is None:
        raise UserError(
            f"--gpus {gpus}: the workers of this overlay have no GPUs; choose another --overlay"
        )
    factor = gpus / quantity(limits(container)[name])
    at = "/template/spec/containers/0/resources"
    for part, values in (container.get("resources") or {}).items():
        for resource, value in values.items() if isinstance(values, Mapping) else ():
            path = f"{at}/{part}/{resource.replace('/', '~1')}"
            if resource == name:
                yield path, str(gpus)
            elif factor != 1 and resource == "cpu":
                yield path, _cpus(quantity(value) * factor)
            elif factor != 1 and resource == "memory":
                yield path, _mebibytes(quantity(value) * factor)
    for index, volume in enumerate(spec.get("volumes") or []):
        room = volume.get("emptyDir") or {}
        if factor != 1 and room.get("medium") == "Memory" and "sizeLimit" in room:
            path = f"/template/spec/volumes/{index}/emptyDir/sizeLimit"
            yield path, _mebibytes(quantity(room["sizeLimit"]) * factor)
    for parameter, value in (group.get("rayStartParams") or {}).items():
        if parameter == "num-gpus":
            yield f"/rayStartParams/{parameter}", str(gpus)
        elif parameter == "num-cpus":
            yield f"/rayStartParams/{parameter}", str(max(gpus, int(int(value) * factor)))


def _cpus(value: float) -> str:
    thousandths = max(1, round(value * 1000))
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)


def _mebibytes(value: float) -> str:
    whole = max(1, round(value / 2**20))
    return f"{whole}Mi" if whole % 1024 else f"{whole // 1024}Gi"
