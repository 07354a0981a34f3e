"""What Ray knows of a run: the attempts and workers of Ray Train, by its dashboard's HTTP API.

The API is Ray's own and not promised to stay (``/api/train/v2/runs/v1``, Ray 2.60); what it says
is for people to look at, and nothing is decided by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from cluster.launch import jobs_api
from cluster.ray_page import RUNS_PATH
from data_shards.errors import UserError

# Ray's answer, with advice on its settings, until its actor that keeps the state has started.
_NOTHING_YET = "Train state data is not available"

_TIMEOUT_S = 5.0


class RayStateError(Exception):
    """Ray's API gave no answer that can be used; the message is one line for a person."""


@dataclass(frozen=True)
class Worker:
    """A supervisor of one rank, an actor of Ray Train's; ``pid`` is its own, not the rank's."""

    rank: int
    local_rank: int
    node_id: str
    node_ip: str
    pid: int
    gpus: tuple[int, ...]
    status: str | None
    log_file: str | None


@dataclass(frozen=True)
class Attempt:
    """A group of workers from its start to its end; times in Unix seconds."""

    status: str
    detail: str | None
    started: float
    ended: float | None
    workers: tuple[Worker, ...]


@dataclass(frozen=True)
class TrainRun:
    """What one controller of Ray Train has done; a run that lost its controller has several."""

    name: str
    status: str
    detail: str | None
    storage_path: str | None
    started: float
    ended: float | None
    attempts: tuple[Attempt, ...]


def attempts(
    dashboard_url: str, run_dir: Path, *, timeout_s: float = _TIMEOUT_S
) -> tuple[Attempt, ...]:
    """The attempts of a run, oldest first; none if Ray does not know the run.

    Args:
        dashboard_url: of the Ray that trains, or has trained, the run.
        run_dir: its folder.
        timeout_s: how long to wait for the connection, and for each part of the answer.

    Raises:
        RayStateError: Ray does not answer, refuses, or answers something else.
    """
    found = [
        run for run in train_runs(dashboard_url, timeout_s=timeout_s) if run.name == run_dir.name
    ]
    # Another folder of runs may hold one of the same name, on the same cluster.
    storage = str(run_dir.absolute() / ".ray")
    found = [run for run in found if run.storage_path == storage] or found
    return tuple(
        attempt for run in sorted(found, key=lambda run: run.started) for attempt in run.attempts
    )


def train_runs(dashboard_url: str, *, timeout_s: float = _TIMEOUT_S) -> list[TrainRun]:
    """All runs of Ray Train that the Ray behind ``dashboard_url`` remembers, newest first.

    Raises:
        RayStateError: as ``attempts``.
    """
    url = dashboard_url.rstrip("/") + RUNS_PATH
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, and no .netrc in place of the token
            response = session.get(
                url, headers=_headers(), timeout=timeout_s, allow_redirects=False
            )
    except requests.Timeout:
        raise RayStateError(f"{dashboard_url} did not answer within {timeout_s:g} s") from None
    except requests.ConnectionError:
        raise RayStateError(f"nothing answers at {dashboard_url}") from None
    except (requests.RequestException, ValueError) as error:
        raise RayStateError(f"{dashboard_url}: {error}") from None
    if response.status_code in {401, 403}:
        given = "refuses the token" if "Authorization" in _headers() else "wants a token"
        raise RayStateError(
            f"{dashboard_url} {given} ({response.status_code}): {jobs_api.MEND_ACCESS}"
        )
    if response.status_code == 500 and _NOTHING_YET in response.text:
        return []
    if response.status_code != 200:
        said = " ".join(response.text.split())[:200]
        raise RayStateError(f"{dashboard_url} answers {response.status_code}: {said or 'nothing'}")
    try:
        return [_train_run(run) for run in response.json()["train_runs"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RayStateError(
            f"{dashboard_url}{RUNS_PATH} answers something else than Ray 2.60 does"
        ) from None


def _headers() -> dict[str, str]:
    """The cluster's token, from where Ray itself takes it.

    Raises:
        RayStateError: RAY_AUTH_MODE asks for one, and there is none.
    """
    try:
        return jobs_api.token_header()
    except UserError as error:
        raise RayStateError(str(error)) from None


def _train_run(value: dict[str, Any]) -> TrainRun:
    config = (value.get("run_settings") or {}).get("run_config") or {}
    return TrainRun(
        name=str(value["name"]),
        status=str(value["status"]),
        detail=_first_line(value.get("status_detail")),
        storage_path=config.get("storage_path"),
        started=value["start_time_ns"] / 1e9,
        ended=_seconds(value.get("end_time_ns")),
        attempts=tuple(
            sorted(map(_attempt, value["attempts"]), key=lambda attempt: attempt.started)
        ),
    )


def _attempt(value: dict[str, Any]) -> Attempt:
    return Attempt(
        status=str(value["status"]),
        detail=_last_line(value.get("status_detail")),
        started=value["start_time_ns"] / 1e9,
        ended=_seconds(value.get("end_time_ns")),
        workers=tuple(sorted(map(_worker, value["workers"]), key=lambda worker: worker.rank)),
    )


def _worker(value: dict[str, Any]) -> Worker:
    return Worker(
        rank=int(value["world_rank"]),
        local_rank=int(value["local_rank"]),
        node_id=str(value["node_id"]),
        node_ip=str(value["node_ip"]),
        pid=int(value["pid"]),
        gpus=tuple(int(gpu) for gpu in value.get("gpu_ids") or ()),
        status=value.get("status"),
        log_file=value.get("log_file_path"),
    )


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9


def _first_line(text: str | None) -> str | None:
    return next(iter(_lines(text)), None)


def _last_line(text: str | None) -> str | None:
    """Of a traceback, the error itself."""
    lines = _lines(text)
    return lines[-1] if lines else None


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
