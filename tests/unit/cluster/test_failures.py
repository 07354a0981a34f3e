"""From Ray's wrapped exceptions to one message, and whether a restart can help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster.failures import (
    StopRequested,
    explain,
    failures_path,
    hopeless,
    is_broken_connection,
    is_stop,
    note,
    summarize,
)
from data_shards.errors import DataError, RunFailedError
from trainer.storage import StorageError

DATA = DataError("shards/train-000000.tar is cut short: prepare it again")
DEAD = WorkerHealthCheckFailedError("Worker died", ActorDiedError())
CLOSED = RuntimeError("gloo: long\nstack\nConnection closed by peer [127.0.0.1]:1234")


def test_a_users_error_is_final_and_comes_first() -> None:
    assert hopeless([CLOSED, DATA]) is DATA
    assert hopeless([KeyError("x"), DATA]) is DATA
    assert hopeless([DEAD, DATA]) is DATA


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), ValueError("x"), ImportError()])
def test_a_bug_is_final(error: Exception) -> None:
    assert hopeless([error]) is error


@pytest.mark.parametrize("errors", [[DEAD], [CLOSED], [OSError("net")], [DEAD, ValueError("x")]])
def test_a_death_and_what_follows_from_it_are_worth_a_restart(errors: list[Exception]) -> None:
    assert hopeless(errors) is None


def test_summaries() -> None:
    assert summarize({0: CLOSED, 3: DATA}) == f"rank 3: {DATA}"
    assert summarize({0: CLOSED, 1: DEAD}).startswith("the process of rank 1 ended unexpectedly")
    assert summarize({0: DEAD, 1: DEAD}).startswith("the processes of rank 0, 1 ended")
    assert summarize({2: CLOSED}).startswith("rank 2 lost its connection to another rank")
    assert summarize({0: CLOSED, 1: OSError("first\nno space")}) == "rank 1: OSError: no space"
    assert summarize({0: ValueError()}) == "rank 0: ValueError"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CLOSED, True),
        (RuntimeError("[gloo] Connection reset by peer"), True),
        (
            RuntimeError("recvValue failed: Connection was likely closed. Did the server crash?"),
            True,
        ),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ConnectionResetError("s3: Connection reset by peer"), False),
    ],
)
def test_what_follows_from_the_loss_of_another_rank(error: Exception, expected: bool) -> None:
    assert is_broken_connection(error) == expected


def test_explains_what_the_worker_said_through_all_wrapping() -> None:
    assert explain(WorkerGroupError("text", {0: CLOSED, 1: DATA})) == str(DATA)
    assert explain(ControllerError(DATA)) == str(DATA)
    assert explain(ControllerError(ControllerError(RunFailedError("the loss is nan")))) == (
        "the loss is nan"
    )
    assert "rank 1 ended" in explain(WorkerGroupError("text", {1: DEAD}))
    assert explain(ActorDiedError()).startswith("ActorDiedError: The actor died unexpectedly")
    assert explain(OSError("first\nlast words")) == "OSError: last words"


def test_a_stop_is_told_from_a_failure() -> None:
    assert is_stop(ControllerError(StopRequested()))
    assert not is_stop(ControllerError(OSError()))
    assert not is_stop(WorkerGroupError("text", {1: DEAD}))


def test_notes_are_json_lines(tmp_path: Path) -> None:
    failures_path(tmp_path).parent.mkdir()
    note(tmp_path, "waiting", room=1)
    note(tmp_path, "resized", **{"from": 1, "to": 2})
    first, second = map(json.loads, failures_path(tmp_path).read_text().splitlines())
    assert (first["event"], first["room"]) == ("waiting", 1)
    assert (second["from"], second["to"]) == (1, 2)
    assert second["time"] >= first["time"] > 1e9


def test_what_cannot_be_noted_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note(tmp_path / "gone", "waiting", room=1)
    assert "not noted" in caplog.text


def test_a_storage_that_fails_is_no_reason_to_give_up_at_once() -> None:
    assert hopeless([StorageError("cannot write there: no space left")]) is None
    lasting = RunFailedError("5 checkpoints in a row could not be written")
    assert hopeless([StorageError("likewise"), lasting]) is lasting
