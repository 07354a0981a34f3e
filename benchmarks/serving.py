"""How long do 50 clients at once wait for ``babelray serve``, and what is batching worth?

Two servers of the same run, one with batching and one whose every batch is a single request
(``evaluation.batch_tokens=1``), stand side by side. In turns of a minute, 50 clients ask one of
them for one sentence after the other: those of the run's own test set, a connection a client.
Any answer but 200 is an error, and there may be none. CPU time is that of all the server's
processes, Ray's included; the clients run in this process and compete for the same cores.

    python benchmarks/serving.py --run runs/m30   # by default a run trained for a few minutes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from common import RESULTS, ROOT, default_corpora, machine, row, train_quickly, write_result

from data_shards.manifest import Manifest
from trainer.run import read_config

_START_S = 300
_PERCENTILES = (50, 95, 99)


@dataclass
class Server:
    """A ``babelray serve`` of its own session; ``turns`` are its clients' measurements."""

    name: str
    settings: tuple[str, ...]
    turns: list[dict[str, Any]] = field(default_factory=list)
    translations: dict[str, str] = field(default_factory=dict)

    def start(self, run: Path, checkpoint: str) -> None:
        """Start it and wait until it serves."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        command = [
            sys.executable, "-m", "cluster.cli", "serve", str(run), "--checkpoint", checkpoint,
            "--port", str(port),
            *(part for setting in self.settings for part in ("--set", setting)),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        if "serving" not in said:
            raise SystemExit(said + self.process.stderr.read())

    def cpu_s(self) -> float:
        """Processor time of all its processes so far."""
        total = 0.0
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    times = process.cpu_times()
                    total += times.user + times.system
            except (OSError, psutil.Error):
                continue
        return total


async def client(
    session: aiohttp.ClientSession,
    server: Server,
    sentences: list[str],
    start: int,
    ends_at: float,
    latencies: list[float],
    errors: Counter[str],
) -> None:
    """Ask for one sentence after the other until the time is over."""
    index = start
    while time.perf_counter() < ends_at:
        sentence = sentences[index % len(sentences)]
        index += 1
        asked_at = time.perf_counter()
        try:
            async with session.post(f"{server.url}translate", json={"text": sentence}) as reply:
                answer = await reply.json()
                if reply.status != 200:
                    errors[f"{reply.status}: {answer.get('error')}"] += 1
                    continue
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            errors[repr(error)] += 1
            continue
        latencies.append(time.perf_counter() - asked_at)
        server.translations[sentence] = answer["translation"]


async def turn(server: Server, sentences: list[str], clients: int, seconds: float) -> None:
    """One server's turn; its measurements are added to it."""
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    cpu_s, own_cpu_s, load = server.cpu_s(), time.process_time(), os.getloadavg()[0]
    began = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=120)
    ) as session:
        step = max(1, len(sentences) // clients)
        await asyncio.gather(
            *(
                client(session, server, sentences, n * step, began + seconds, latencies, errors)
                for n in range(clients)
            )
        )
    wall_s = time.perf_counter() - began
    used_s = server.cpu_s() - cpu_s
    server.turns.append(
        {
            "requests": len(latencies),
            "errors": dict(errors),
            "wall_s": wall_s,
            "server_cpu_s": used_s,
            "client_cpu_s": time.process_time() - own_cpu_s,
            "load_average": [load, os.getloadavg()[0]],
            "latencies_s": latencies,
        }
    )


def summary(server: Server) -> dict[str, Any]:
    """All turns of a server together; latencies in milliseconds."""
    turns = server.turns
    latencies_ms = 1000 * np.array([each for one in turns for each in one["latencies_s"]])
    requests, wall_s = len(latencies_ms), sum(one["wall_s"] for one in turns)
    cpu_s = sum(one["server_cpu_s"] for one in turns)
    return {
        "settings": list(server.settings),
        "requests": requests,
        "errors": sum(sum(one["errors"].values()) for one in turns),
        "requests_per_s": requests / wall_s,
        "requests_per_server_cpu_s": requests / cpu_s,
        "server_cores": cpu_s / wall_s,
        "client_cores": sum(one["client_cpu_s"] for one in turns) / wall_s,
        **{
            f"p{percentile}_ms": float(np.percentile(latencies_ms, percentile))
            for percentile in _PERCENTILES
        },
        "longest_ms": float(latencies_ms.max()),
        "turns": [
            {name: value for name, value in one.items() if name != "latencies_s"}
            | {
                f"p{percentile}_ms": 1000 * float(np.percentile(one["latencies_s"], percentile))
                for percentile in _PERCENTILES
            }
            for one in turns
        ],
    }


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="by default one trained for a few minutes")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or train_quickly(arguments.corpora, Path(folder))
        measure(run.resolve(), arguments)


def measure(run: Path, arguments: argparse.Namespace) -> None:
    """Both servers in turns."""
    corpus = Manifest.load(read_config(run).data.folder())
    sentences = [line for line in corpus.split_text("test")[0] if line]
    before = machine()
    servers = [Server("batching", ()), Server("one at a time", ("evaluation.batch_tokens=1",))]
    try:
        for server in servers:
            server.start(run, arguments.checkpoint)
            asyncio.run(turn(server, sentences, arguments.clients, 3))  # warm-up
            server.turns.clear()
        for number in range(arguments.rounds):
            for server in servers[:: 1 if number % 2 == 0 else -1]:
                asyncio.run(turn(server, sentences, arguments.clients, arguments.seconds))
    finally:
        for server in servers:
            if hasattr(server, "process"):
                server.process.terminate()
                server.process.wait(timeout=_START_S)
    results = {server.name: summary(server) for server in servers}
    both = set.intersection(*(set(server.translations) for server in servers))
    first, second = (server.translations for server in servers)
    print(f"{'':<14} requests errors   1/s  1/cpu-s cores   p50    p95    p99 ms")
    for name, result in results.items():
        print(
            f"{name:<14} {result['requests']:8d} {result['errors']:6d} "
            f"{result['requests_per_s']:5.1f} {result['requests_per_server_cpu_s']:8.1f} "
            f"{result['server_cores']:5.2f} {result['p50_ms']:5.0f}  {result['p95_ms']:5.0f}  "
            f"{result['p99_ms']:5.0f}"
        )
    batching, alone = results.values()
    different = sum(first[sentence] != second[sentence] for sentence in both)
    print(f"{different} of {len(both)} sentences translated otherwise in a batch")
    write_result(
        arguments.output,
        before,
        {
            "run": run.name,
            "is_quickly_trained": arguments.run is None,
            "checkpoint": arguments.checkpoint,
            "clients": arguments.clients,
            "seconds": arguments.seconds,
            "sentences": len(sentences),
            "corpus": corpus.data.corpus,
            "translated_otherwise": {"sentences": len(both), "different": different},
            "servers": results,
            "summary": [
                row(
                    f"{arguments.clients} clients",
                    batching["requests_per_s"],
                    "requests/s",
                    ratio=batching["requests_per_s"] / alone["requests_per_s"],
                    against="one at a time",
                ),
                row("p99", batching["p99_ms"], "ms", higher_is_better=False),
            ],
        },
    )
    if any(result["errors"] for result in results.values()):
        print(json.dumps([server.turns[-1]["errors"] for server in servers]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
