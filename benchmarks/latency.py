"""What training loses where shards answer late: local files against HTTP with injected latency.

    python benchmarks/latency.py           # prints a table, writes benchmarks/results/latency.json

An HTTP server in a process of its own waits before it answers any request. Contestants train tiny
by the trainer's own loop, in turns; each is stopped (SIGSTOP) while another works, so that nobody
reads ahead meanwhile. Every read is of one block: shards are fetched in parts whatever their size,
and the caches begin empty, so that nothing is read twice from the network. Windows are small, to
have many of them in a turn. *Waiting* is the time that the loop stood still for a batch, as a part
of the clock's time: on a machine that others use too, rates by the clock differ by more than that.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import (
    ALLOCATOR,
    RESULTS,
    Meter,
    Spread,
    Turn,
    Worker,
    corpus_config,
    default_corpora,
    machine,
    ratios,
    row,
    take_turns,
    uninterrupted,
    write_result,
)
from train import train_ours

from data_shards import store
from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.shards import prepare
from model.config import ModelConfig
from trainer.config import RunConfig

DELAYS_S = (0.05, 0.2)
GOAL_LOSS = 0.02


# The server.


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers late, with a part of a file if asked for one."""

    delay_s = 0.0

    def do_GET(self) -> None:
        """Wait, then answer."""
        time.sleep(self.delay_s)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            super().do_GET()
            return
        first, last = map(int, wanted.groups())
        with Path(self.translate_path(self.path)).open("rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Takes as many connections at once as readers make."""

    request_queue_size = 128
    daemon_threads = True


def serve(folder: str, delay_s: float) -> None:
    """Serve a folder until the process is ended; says its port first."""
    Handler.delay_s = delay_s
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    print(server.server_port, flush=True)
    server.serve_forever()


def start_server(folder: Path, delay_s: float) -> tuple[subprocess.Popen[str], str]:
    """A server's process, and its address."""
    command = [sys.executable, __file__, "--serve", str(folder), str(delay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


# The contestants.


def train(run_dir: Path, meter: Meter) -> None:
    """The trainer's loop; notes how long each step waited for its batches."""
    from data_shards.stream import Stream

    store.WHOLE_SHARD_BYTES = 0  # every block is a read
    plain = Stream.__next__
    with (run_dir / "waits").open("w", buffering=1) as waits:

        def timed(stream: Stream) -> Any:
            began = time.perf_counter()
            batches = plain(stream)
            waits.write(f"{time.perf_counter() - began}\n")
            return batches

        Stream.__next__ = timed  # type: ignore[method-assign, assignment]
        train_ours(run_dir, meter)


class Stopped(Worker):
    """A contestant that does nothing at all outside its turns."""

    def __init__(self, name: str, run_dir: Path) -> None:
        super().__init__(name, "train", run_dir, environment=ALLOCATOR)
        self._waits = run_dir / "waits"
        self._seen = 0
        self.shares: list[float] = []
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Turn:
        """A turn, and what part of it was waiting."""
        self._process.send_signal(signal.SIGCONT)
        turn = super().turn(seconds)
        self._process.send_signal(signal.SIGSTOP)
        waits = [float(line) for line in self._waits.read_text().splitlines()]
        # The last wait is of the step after the turn, if it was noted already.
        self.shares.append(sum(waits[self._seen : self._seen + turn.steps]) / turn.wall_s)
        self._seen += turn.steps
        return turn

    def close(self) -> None:
        """Let it go on, to its end."""
        self._process.send_signal(signal.SIGCONT)
        super().close()


def cold_start(data: DataConfig, url: str | None, *, in_parts: bool) -> float:
    """Seconds from opening the stream to the first step, with an empty cache."""
    from data_shards.stream import Stream

    manifest = Manifest.load(data.folder(), url)
    plan = Plan.of(manifest, data, 1)
    before = store.WHOLE_SHARD_BYTES
    store.WHOLE_SHARD_BYTES = 0 if in_parts else before
    try:
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            with Stream(
                manifest, plan, range(data.lanes), 0, prefetch_steps=8, cache_dir=Path(cache)
            ) as stream:
                next(stream)
                return time.perf_counter() - began
    finally:
        store.WHOLE_SHARD_BYTES = before


def name_of(delay_s: float | None) -> str:
    """How a case is called."""
    return "local files" if delay_s is None else f"HTTP, {delay_s * 1e3:.0f} ms a read"


def compare(
    data: DataConfig, urls: dict[float, str], folder: Path, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Train in turns; the rows of the table."""
    trainer = uninterrupted(precision="bf16")
    workers = []
    delays: list[float | None] = [None, *urls]
    for delay_s in delays:
        run_dir = folder / f"run {delay_s}"
        run_dir.mkdir()
        there = {"shards_url": urls[delay_s], "cache_dir": run_dir / "cache"} if delay_s else {}
        config = RunConfig(
            model=ModelConfig(preset="tiny"), data=data.model_copy(update=there), trainer=trainer
        )
        (run_dir / "config.json").write_text(config.to_json())
        workers.append(Stopped(name_of(delay_s), run_dir))
    try:
        turns = take_turns(workers, rounds=rounds, seconds=seconds, say=print)
    finally:
        for worker in workers:
            worker.close()
    rows = []
    for worker, own in zip(workers, turns, strict=True):
        by_clock = [
            (one.tokens / one.wall_s) / (other.tokens / other.wall_s)
            for one, other in zip(own, turns[0], strict=True)
        ]
        rows.append(
            {
                "name": worker.name,
                "waiting": asdict(Spread.of(worker.shares[1:])),
                "rate_by_clock": asdict(Spread.of(by_clock)),
                "rate_by_cpu": asdict(ratios(own, turns[0])),
                "turns": [asdict(turn) for turn in own],
            }
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8, help="CPU seconds a turn")
    parser.add_argument("--starts", type=int, default=3, help="cold starts of each kind")
    parser.add_argument("--window-pairs", type=int, default=2048)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], float(arguments.serve[1]))
        return
    if arguments.worker:
        train(Path(arguments.worker[1]), Meter())
        return
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = corpus_config(
            arguments.corpora, folder, vocabulary_size=8000, tokens_per_step=4096, lanes=2,
            max_length=128,
        )  # fmt: skip
        manifest = Manifest.load(prepare(whole))
        data = whole.model_copy(update={"window_pairs": arguments.window_pairs})
        servers, urls = [], {}
        try:
            for late_s in DELAYS_S:
                process, urls[late_s] = start_server(manifest.folder, late_s)
                servers.append(process)
            num_blocks = len(manifest.blocks)
            print(f"tiny, {whole.corpus}, {manifest.num_pairs:,} pairs in {num_blocks} blocks")
            starts = []
            cases: list[float | None] = [None, *urls]
            for delay_s in cases:
                for config in (data, whole):
                    for in_parts in (False, True):
                        took = [
                            cold_start(
                                config, urls[delay_s] if delay_s else None, in_parts=in_parts
                            )
                            for _ in range(arguments.starts)
                        ]
                        starts.append(
                            {
                                "name": name_of(delay_s),
                                "window_pairs": config.window_pairs,
                                "in_parts": in_parts,
                                "seconds": statistics.median(took),
                            }
                        )
                        start = starts[-1]
                        how = "block by block" if in_parts else "as by default"
                        print(
                            f"  first step, {start['name']}, windows of "
                            f"{config.window_pairs:,}, {how}: {start['seconds']:.2f} s"
                        )
            rows = compare(data, urls, folder, arguments.rounds, arguments.seconds)
        finally:
            for process in servers:
                process.terminate()
                process.wait()
    print(f"  {'':24}{'waiting':>10}{'highest':>10}{'rate, clock':>13}{'rate, CPU':>12}")
    for line in rows:
        waiting = line["waiting"]
        print(
            f"  {line['name']:24}{waiting['median']:10.2%}{waiting['highest']:10.2%}"
            f"{line['rate_by_clock']['median']:13.3f}{line['rate_by_cpu']['median']:12.3f}"
        )
    slowest = rows[-1]
    print(
        f"goal: under {GOAL_LOSS:.0%} lost with {name_of(DELAYS_S[-1])} "
        f"(load {before['load_average']:.1f})"
    )
    summary = [
        row(
            f"waiting for data, {line['name']}", Spread(**line["waiting"]), "of the time",
            goal=GOAL_LOSS, higher_is_better=False,
        )
        for line in (rows[1], slowest)
    ]  # fmt: skip
    write_result(
        arguments.output,
        before,
        {"summary": summary, "goal_loss": GOAL_LOSS, "cold_starts": starts, "training": rows},
    )


if __name__ == "__main__":
    main()
