"""Groups of ranks that communication.py starts, its own processes, in a network of their own."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import ALLOCATOR, ROOT

from trainer.config import RunConfig

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1


def own_network() -> bool:
    """Move this process into a network namespace with nothing but a loopback interface."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_NEW_NETWORK) and library.unshare(_NEW_USER | _NEW_NETWORK):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(control, _GET_FLAGS, request))
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    return True


class Group:
    """Ranks that are processes of this script; ``work`` as communication_ranks.main takes it."""

    def __init__(self, ranks: int, folder: Path, work: dict[str, Any]) -> None:
        environment = {
            **os.environ,
            **ALLOCATOR,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(ROOT),
        }
        work = {**work, "rendezvous": str((folder / "rendezvous").absolute())}
        self._logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            with log.open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [
                            *(sys.executable, sys.argv[0]),
                            *("--worker", str(rank), str(ranks), json.dumps(work)),
                        ],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env=environment,
                        text=True,
                    )
                )

    def read(self) -> Any:
        """The first rank's next word."""
        stream = self._processes[0].stdout
        assert stream is not None
        line = stream.readline()
        if not line:
            for process in self._processes:
                process.kill()
            told = "\n".join(log.read_text()[-2000:] for log in self._logs)
            raise RuntimeError(f"a rank ended ({self._codes()}): {told}")
        return json.loads(line)

    def turn(self, seconds: float) -> dict[str, Any]:
        """Train for about so long."""
        stream = self._processes[0].stdin
        assert stream is not None
        with suppress(BrokenPipeError):  # then reading says what happened
            stream.write(f"{seconds}\n")
            stream.flush()
        done: dict[str, Any] = self.read()
        return done

    def close(self) -> None:
        """End the ranks, which wait for a turn or are at their end."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def _codes(self) -> list[int]:
        """What the ranks ended with."""
        return [process.wait() for process in self._processes]


def write_config(folder: Path, name: str, config: RunConfig) -> Path:
    """A contestant's folder."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.to_json())
    return run_dir
