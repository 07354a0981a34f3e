"""Several ranks of the real trainer in processes of their own, joined by gloo, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import RunConfig

TIMEOUT_S = 240


@dataclass(frozen=True)
class Job:
    """One call of ``trainer.attempt.train`` on every rank."""

    config: RunConfig
    run_dir: Path
    resume: bool = False
    train: Callable[..., str] | None = None  # in place of trainer.attempt.train


def run_ranks(world_size: int, jobs: list[Job]) -> list[str]:
    """Run the jobs one after the other in one group; rank 0's results, or the type of its error.

    An error ends its job on all ranks (the test makes it one that all ranks meet). A crash of any
    rank, or its death, fails the test with what every rank had to say.
    """
    context = multiprocessing.get_context("forkserver")
    # The imports cost seconds a process: they are paid once, in the server that forks the ranks.
    context.set_forkserver_preload(["tests.ranks_preload"])
    results: Any = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, jobs, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    outcomes: list[str] = []
    crashes: list[str] = []
    try:
        while len(outcomes) < len(jobs) and not crashes:
            _sort(results.get(timeout=TIMEOUT_S), outcomes, crashes)
    except queue.Empty:
        crashes.append(f"the ranks said nothing for {TIMEOUT_S} s")
    finally:
        for process in ranks:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
                process.join()
    while not results.empty():
        _sort(results.get(), outcomes, crashes)
    codes = {rank: process.exitcode for rank, process in enumerate(ranks)}
    crashes += [f"rank {rank} ended with status {code}" for rank, code in codes.items() if code]
    assert not crashes, "\n".join(crashes)
    return outcomes


def _sort(said: tuple[int, str], outcomes: list[str], crashes: list[str]) -> None:
    rank, outcome = said
    if outcome.startswith("crash:"):
        crashes.append(f"rank {rank}: {outcome}")
    elif rank == 0:
        outcomes.append(outcome)


def _rank(rank: int, world_size: int, port: int, jobs: list[Job], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from data_shards.errors import UserError
    from trainer.attempt import train
    from trainer.control import Handover

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    for job in jobs:
        try:
            outcome = (job.train or train)(
                job.config, job.run_dir, rank=rank, world_size=world_size, resume=job.resume
            )
        except (UserError, Handover) as error:
            outcome = f"{type(error).__name__}: {error}"
        except Exception:
            outcome = "crash: " + traceback.format_exc()
        results.put((rank, outcome))
        if outcome.startswith("crash:"):
            return
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
