"""What the doctor runs on the cluster: one ``Node`` a machine, one ``Rank`` a device.

Ray carries this file's code there with the request, so it must import nothing of babelray's at its
top: whether babelray is there is one of the questions.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("babelray", "torch", "deepspeed", "ray")


class Node:
    """Looks at its machine, and writes and reads there."""

    def clock(self) -> float:
        """The machine's time, Unix seconds."""
        return time.time()

    def facts(self, packages: Sequence[str] = ()) -> dict[str, Any]:
        """Versions, also those of ``packages``, GPUs, shared memory; keys as below."""
        import shutil
        import sys
        from importlib import metadata, util

        import ray

        versions: dict[str, str | None] = {"python": ".".join(map(str, sys.version_info[:3]))}
        for package in {*_PACKAGES, *packages}:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[package] = None
        if versions["babelray"] is None and util.find_spec("cluster") is not None:
            versions["babelray"] = "from a folder"
        try:
            shared = shutil.disk_usage("/dev/shm").free  # noqa: S108
        except OSError:
            shared = 0
        return {
            "versions": versions,
            "gpus": _gpu_names(),
            "shared_memory": shared,
            "user": os.geteuid(),
            "health": _health_settings(ray.get_runtime_context().get_node_id()),
        }

    def write(self, folder: str, name: str, content: str) -> str | None:
        """Write a file, synced, into a folder that must be there; what went wrong, or None."""
        path = Path(folder) / name
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return f"{folder}: {error.strerror}"
        return None

    def read(self, folder: str, expected: dict[str, str], patience_s: float) -> dict[str, float]:
        """Seconds until each file had its content; those that never had it are left out."""
        began = time.monotonic()
        seen: dict[str, float] = {}
        while len(seen) < len(expected) and time.monotonic() - began < patience_s:
            for name, content in expected.items():
                if name in seen:
                    continue
                try:
                    if (Path(folder) / name).read_text() == content:
                        seen[name] = time.monotonic() - began
                except OSError:
                    continue
            if len(seen) < len(expected):
                time.sleep(0.2)
        return seen

    def remove(self, folder: str, trial: str) -> None:
        """Remove the trial's folder."""
        import shutil

        shutil.rmtree(Path(folder) / trial, ignore_errors=True)


def _gpu_names() -> list[str]:
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return names


def _health_settings(node_id: str) -> dict[str, str] | None:
    """RAY_health_check_... of the GCS, if this node is the head and it may be looked at."""
    import psutil

    for process in psutil.process_iter(["name"]):
        if process.info["name"] != "gcs_server":
            continue
        try:
            if f"--node-id={node_id}" not in process.cmdline():
                continue  # of another cluster on this machine
            environment = process.environ()
        except psutil.Error:
            continue
        return {k: v for k, v in environment.items() if k.startswith("RAY_health_check_")}
    return None


def interfaces(address: str, root: Path = Path("/sys/class")) -> dict[str, Any]:
    """The machine's links: the interface that has ``address``, and InfiniBand or RoCE ports.

    Returns:
        "name", "gbits" (None where the driver does not tell), "physical"; "infiniband": a list of
        (device, Gbit/s) of the active ports.
    """
    import psutil

    name = next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(item.address == address for item in addresses)
        ),
        None,
    )
    gbits = None
    if name is not None:
        try:
            megabits = int((root / "net" / name / "speed").read_text())
            gbits = megabits / 1000 if megabits > 0 else None
        except (OSError, ValueError):
            pass
    ports = []
    for port in sorted((root / "infiniband").glob("*/ports/*")):
        try:
            active = "ACTIVE" in (port / "state").read_text()
            rate = float((port / "rate").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
        if active:
            ports.append((port.parent.parent.name, rate))
    return {
        "name": name,
        "gbits": gbits,
        "physical": name is not None and (root / "net" / name / "device").exists(),
        "infiniband": ports,
    }


class Rank:
    """One process of an all-reduce; what blocks is done in a thread, so that it can be asked."""

    def __init__(self) -> None:
        self._stage = "started"
        self._error: str | None = None
        self._result: dict[str, Any] | None = None
        self._log = f"/tmp/babelray-doctor-nccl-{os.getpid()}.log"  # noqa: S108
        # Read by NCCL when the first group is made.
        os.environ.setdefault("NCCL_DEBUG", "INFO")
        os.environ.setdefault("NCCL_DEBUG_FILE", self._log)

    def hello(self, address: str) -> dict[str, Any]:
        """What it computes on, and its machine's links."""
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        nvlinks = _num_nvlinks() if gpu else 0
        return {"gpu": gpu, "nvlinks": nvlinks, "links": interfaces(address)}

    def free_port(self) -> int:
        """One where this rank can be met."""
        with socket.socket() as free:
            free.bind(("", 0))
            return int(free.getsockname()[1])

    def start(
        self, rank: int, addresses: Sequence[str], port: int, sizes: Sequence[int], join_s: float
    ) -> None:
        """Join the group that meets at ``addresses[0]`` and measure, while ``status`` is asked."""
        self._stage, self._error, self._result = "reaching", None, None
        arguments = (rank, tuple(addresses), port, tuple(sizes), join_s)
        threading.Thread(target=self._work, args=arguments, daemon=True).start()

    def status(self) -> tuple[str, str | None, dict[str, Any] | None]:
        """Stage (reaching, joining, measuring, done, failed), error, result."""
        return self._stage, self._error, self._result

    def _work(
        self, rank: int, addresses: Sequence[str], port: int, sizes: Sequence[int], join_s: float
    ) -> None:
        import torch

        try:
            begun = self._log_size()
            self._result = self._measured(rank, addresses, port, sizes, join_s)
            self._result["transports"] = self._transports(begun)
            self._stage = "done"
        except Exception as error:
            self._error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            self._error = f"while {self._stage}: {self._error}"
            self._stage = "failed"
        finally:
            if torch.distributed.is_initialized() and self._stage == "done":
                torch.distributed.destroy_process_group()

    def _measured(
        self, rank: int, addresses: Sequence[str], port: int, sizes: Sequence[int], join_s: float
    ) -> dict[str, Any]:
        from datetime import timedelta

        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(0)
        limit = timedelta(seconds=join_s)
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            addresses[0], port, len(addresses), is_master=rank == 0, timeout=limit,
            wait_for_workers=False,
        )  # fmt: skip
        self._stage = "joining"
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store, rank=rank, world_size=len(addresses), timeout=limit,
        )  # fmt: skip
        torch.distributed.barrier()
        self._stage = "measuring"
        return measure(sizes, on_gpu=on_gpu)

    def _log_size(self) -> int:
        try:
            return os.path.getsize(os.environ["NCCL_DEBUG_FILE"])
        except OSError:
            return 0

    def _transports(self, begun: int) -> list[str]:
        try:
            with open(os.environ["NCCL_DEBUG_FILE"], errors="replace") as file:
                file.seek(begun)
                return transports(file.read())
        except OSError:
            return []

    def end(self) -> None:
        """Leave nothing behind."""
        Path(self._log).unlink(missing_ok=True)


def transports(log: str) -> list[str]:
    """How NCCL says that its channels go: P2P, SHM, NET/IB, NET/IB/GDRDMA, NET/Socket."""
    found = set()
    for line in log.splitlines():
        via = line.rpartition(" via ")[2].strip() if " via " in line else ""
        parts = via.split("/")
        if parts[0] in {"P2P", "SHM"}:
            found.add(parts[0])
        elif parts[0] == "NET" and len(parts) > 1:
            direct = "/GDRDMA" if "GDRDMA" in parts else ""
            found.add(f"NET/{parts[1].split()[0]}{direct}")
    return sorted(found)


def _num_nvlinks() -> int:
    """Active NVLinks of this process's first GPU; 0 where that cannot be seen."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        return sum(pynvml.nvmlDeviceGetNvLinkState(handle, link) for link in range(18))
    except Exception:
        return 0


def measure(sizes: Sequence[int], *, on_gpu: bool, budget_s: float = 0.4) -> dict[str, Any]:
    """All-reduce float32 tensors of ``sizes`` bytes over the group that exists.

    Every rank makes the same number of turns: the slowest rank's warm-up decides, by a reduction.
    Sizes beyond one that takes two seconds are left out.

    Returns:
        "seconds": (bytes, median seconds of a turn, of the slowest rank) for each size; "right":
        whether every sum was.
    """
    import statistics

    import torch
    from torch import distributed

    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    seconds, right = [], True

    def turn(tensor: Any) -> float:
        if on_gpu:
            torch.cuda.synchronize()  # what fills the tensor is not to be counted
        began = time.perf_counter()
        distributed.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def slowest(value: float) -> float:
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        return float(shared.item())

    for size in sizes:
        tensor = torch.full((max(1, size // 4),), float(rank + 1), device=device)
        turn(tensor)
        right = right and bool((tensor == world * (world + 1) / 2).all())
        tensor.fill_(1.0 / world)  # sums stay finite however often they are summed again
        warm = slowest(turn(tensor))
        turns = max(3, min(50, int(budget_s / max(warm, 1e-6))))
        typical = statistics.median(turn(tensor.fill_(1.0 / world)) for _ in range(turns))
        seconds.append((size, slowest(typical)))
        if warm > 2.0:
            break
    return {"seconds": seconds, "right": right}
