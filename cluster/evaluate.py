"""Batches decoded by Ray Data: a pool of actors, each with the model, wherever there is room."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import session
from cluster.naming import logs_dir
from cluster.options import say
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from trainer.decoding_job import Batch, Decoded, System

# Each batch is a block of its own, and so a task of its own. Beyond as many, blocks hold several.
_MOST_BLOCKS = 2000
# Of one actor and of one batch. A batch that kills whatever decodes it (want of memory, say) would
# do so for ever: Ray Data knows no bound by itself.
_MOST_DEATHS = 3
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Actors:
    """How many processes decode: ``least`` to ``most``, by what the cluster has to do and to give.

    ``most`` None: one a GPU, or one a CPU where there is no GPU.
    """

    least: int = 1
    most: int | None = None


def decode_on_ray(
    systems: Sequence[System], batches: Sequence[Batch], *, actors: Actors
) -> Generator[Decoded, None, None]:
    """Decode on this machine, or on the cluster that RAY_ADDRESS names.

    An actor has one GPU where the cluster has GPUs, otherwise one CPU and one thread. One that dies
    is replaced, and its batch is decoded again, three times at most.

    Args:
        systems: whose runs' folders all machines reach under the same paths.
        batches: what to decode, system by system.
        actors: their number.

    Raises:
        UserError: no cluster answers at RAY_ADDRESS; an actor met a mistake of the user's.
        RunFailedError: decoding failed, or there is no room for the actors.
    """
    with (
        _ray_writes_to(_log_file(systems)),
        session.connect(
            min_cpus=min(actors.least, len(batches)), threads=1, dashboard_port=None
        ) as ray_session,
    ):
        has_gpu = ray_session.num_gpus > 0
        room = int(ray_session.num_gpus if has_gpu else ray_session.num_cpus)
        _check_room(actors, room, has_gpu=has_gpu)
        least = min(actors.least, len(batches))
        most = max(least, min(actors.most or room, room, len(batches)))
        yield from _decode(systems, batches, least, most, has_gpu=has_gpu)


def _decode(
    systems: Sequence[System], batches: Sequence[Batch], least: int, most: int, *, has_gpu: bool
) -> Generator[Decoded, None, None]:
    import ray.data

    from trainer.decoding_job import Decoded

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    rows = [{"batch": json.dumps(vars(batch))} for batch in batches]
    items = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
    with warnings.catch_warnings():
        # Ray 2.60 calls arguments of actors deprecated, and has no other bound to offer as yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        decoded = items.map_batches(
            _Actor,
            fn_constructor_args=(tuple(systems), "cuda" if has_gpu else "cpu"),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, initial_size=most),
            num_gpus=1 if has_gpu else 0,
            num_cpus=0 if has_gpu else 1,
            max_restarts=_MOST_DEATHS,
            max_task_retries=_MOST_DEATHS,
        )

    def tell() -> None:
        say(
            f"nothing was translated for {_PATIENCE_S:.0f} s. A large model takes a while to load; "
            f"if it is not that, see {_log_file(systems)}, and whether other work holds the "
            f"{'GPUs' if has_gpu else 'CPUs'}"
        )

    try:
        for row in _patiently(decoded.iter_rows(), tell, patience_s=_PATIENCE_S):
            values = json.loads(row["decoded"])
            if "error" in values:
                raise (RunFailedError if values["failed"] else UserError)(values["error"])
            yield Decoded(**values)
    except ray.exceptions.RayError as error:
        raise _explained(error) from None


def _patiently(
    rows: Iterable[dict[str, Any]], tell: Callable[[], None], *, patience_s: float
) -> Generator[dict[str, Any], None, None]:
    """The rows. ``tell`` is called when one of them keeps waiting, but only once."""
    told = threading.Event()

    def tell_once() -> None:
        if not told.is_set():
            told.set()
            tell()

    left = iter(rows)
    while True:
        timer = threading.Timer(patience_s, tell_once)
        timer.daemon = True
        timer.start()
        try:
            row = next(left, None)
        finally:
            timer.cancel()
        if row is None:
            return
        yield row


def _log_file(systems: Sequence[System]) -> Path:
    return logs_dir(systems[0].run_dir) / "evaluation.log"


class _Actor:
    """A process that decodes; rows are batches as JSON, which needs no schema of Arrow's."""

    def __init__(self, systems: Sequence[System], device: str) -> None:
        import torch

        from trainer.decoding_job import BatchDecoder

        torch.set_num_threads(1)
        self._decode = BatchDecoder(systems, device)

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        found = [json.dumps(self._decoded(row)) for row in columns["batch"]]
        return {"decoded": np.array(found, dtype=object)}

    def _decoded(self, row: str) -> dict[str, Any]:
        """A decoded batch, or the message of an error: Ray would bury it in its own."""
        import torch

        from trainer.decoding_job import Batch, out_of_memory

        try:
            return vars(self._decode(Batch(**json.loads(row))))
        except UserError as error:
            told = error
        except torch.OutOfMemoryError:
            told = out_of_memory()
        return {"error": str(told), "failed": isinstance(told, RunFailedError)}


@contextmanager
def _ray_writes_to(file: Path) -> Generator[None, None, None]:
    """Ray's own lines go to a file; our own still go to the terminal.

    Its C++ part writes to descriptor 2, which Python cannot redirect by itself.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    own, terminal = sys.stderr, os.dup(2)
    with file.open("a", encoding="utf-8") as log, redirect_stdout(log):
        os.dup2(log.fileno(), 2)
        if own is sys.__stderr__:  # else somebody else has redirected it already
            sys.stderr = os.fdopen(terminal, "w", buffering=1, closefd=False)
        try:
            yield
        finally:
            sys.stderr = own
            os.dup2(terminal, 2)
            os.close(terminal)


def _check_room(actors: Actors, room: int, *, has_gpu: bool) -> None:
    if actors.least > room:
        what = "GPUs" if has_gpu else "CPUs"
        raise UserError(
            f"--actors {actors.least}: the cluster has {room} {what}, and each actor takes one: "
            f"give --actors {room}, or 1:{actors.least} to take what there is"
        )


def _explained(error: BaseException) -> RunFailedError:
    """What Ray says last is what happened first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RunFailedError(
        f"decoding failed: {lines[-1] if lines else type(error).__name__}. What was translated is "
        "kept: the same command goes on from there"
    )
