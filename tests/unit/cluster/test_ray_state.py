"""Ray's state API: its recorded answer, and all the ways in which it may refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.launch import jobs_api
from cluster.ray_page import RUNS_PATH
from cluster.ray_state import RayStateError, attempts, train_runs
from data_shards.errors import UserError

# Of a run with two workers, one of which was killed and replaced (Ray 2.60.0).
RECORDED = Path(__file__).parent / "recorded" / "train_runs.json"


@contextmanager
def answering(
    status: int, body: str, *, headers: dict[str, str] | None = None, hang: bool = False
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on this machine, and the headers of the requests that it got."""
    over, asked = threading.Event(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({"path": self.path, **dict(self.headers)})
            if hang:
                over.wait(10)
                return
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_a_recorded_answer_becomes_attempts_and_workers() -> None:
    with answering(200, RECORDED.read_text()) as (url, asked):
        (run,) = train_runs(url)
        first, second = attempts(url, Path("/srv/runs/look"))
    assert asked[0]["path"] == RUNS_PATH
    assert "Authorization" not in asked[0]
    assert (run.name, run.status, run.ended) == ("look", "RUNNING", None)
    assert (first.status, second.status) == ("ERRORED", "RUNNING")
    assert first.detail is not None
    assert first.detail.endswith("the process 4562 of rank 1 ended (by SIGKILL)")
    assert first.ended is not None
    assert second.started > first.ended > first.started > 1.7e9
    assert [(worker.rank, worker.pid, worker.status) for worker in second.workers] == [
        (0, 7436, "ALIVE"),
        (1, 7476, "ALIVE"),
    ]
    assert {worker.status for worker in first.workers} == {"DEAD"}
    assert second.workers[1].node_ip == "127.0.0.1"
    assert second.workers[1].gpus == ()


def test_runs_of_other_folders_are_not_taken_for_this_one() -> None:
    answer = json.loads(RECORDED.read_text())
    other = json.loads(json.dumps(answer["train_runs"][0]))
    other["run_settings"]["run_config"]["storage_path"] = "/elsewhere/look/.ray"
    answer["train_runs"].append(other)
    with answering(200, json.dumps(answer)) as (url, _):
        assert len(attempts(url, Path("/srv/runs/look"))) == 2
        assert attempts(url, Path("/srv/runs/another")) == ()


def test_attempts_of_a_controller_that_was_replaced_come_first() -> None:
    answer = json.loads(RECORDED.read_text())
    earlier = json.loads(json.dumps(answer["train_runs"][0]))
    earlier["start_time_ns"] -= 10**12
    for attempt in earlier["attempts"]:
        attempt["start_time_ns"] -= 10**12
    answer["train_runs"].append(earlier)  # Ray sorts the newest first
    with answering(200, json.dumps(answer)) as (url, _):
        started = [attempt.started for attempt in attempts(url, Path("/srv/runs/look"))]
    assert len(started) == 4
    assert started == sorted(started)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, "Unauthorized", "wants a token"),
        (500, "Traceback\nKeyError: 'x'", "answers 500: Traceback KeyError"),
        (503, "", "answers 503: nothing"),
        (302, "", "answers 302"),
        (200, "<html>", "something else"),
        (200, "[]", "something else"),
        (200, '{"train_runs": [{"name": "look"}]}', "something else"),
        (200, '{"train_runs": null}', "something else"),
    ],
)
def test_a_refusal_is_said_in_one_line(status: int, body: str, says: str) -> None:
    where = {"Location": "http://127.0.0.1:9/"} if status == 302 else None
    with answering(status, body, headers=where) as (url, asked):
        with pytest.raises(RayStateError, match=says) as caught:
            train_runs(url)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(asked) == 1


def test_ray_knows_no_run_until_its_keeper_of_their_state_has_started() -> None:
    # Of Ray 2.60.0: an actor that the first run starts, and Ray's advice is of no use until then.
    advice = (
        "Train state data is not available. Please make sure Ray Train is running and that the "
        "Train state actor is enabled by setting the RAY_TRAIN_ENABLE_STATE_TRACKING environment "
        'variable to "1".'
    )
    with answering(500, advice) as (url, _):
        assert train_runs(url) == []
        assert attempts(url, Path("/srv/runs/look")) == ()


def test_a_silent_server_costs_no_more_than_the_timeout() -> None:
    with (
        answering(200, "", hang=True) as (url, _),
        pytest.raises(RayStateError, match=r"did not answer within 0\.2 s"),
    ):
        train_runs(url, timeout_s=0.2)


def test_nothing_there() -> None:
    with answering(200, "") as (url, _):
        pass  # its port is free again
    with pytest.raises(RayStateError, match="nothing answers at"):
        train_runs(url)


def test_an_address_that_is_none() -> None:
    with pytest.raises(RayStateError):
        train_runs("http://")


def test_the_token_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr(jobs_api, "token_header", lambda: {"Authorization": "Bearer given"})
    with answering(200, '{"train_runs": []}') as (url, asked):
        assert train_runs(url) == []
    assert [headers["Authorization"] for headers in asked] == ["Bearer given"]


def test_a_token_that_is_refused_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> dict[str, str]:
        raise UserError("there is no token")

    monkeypatch.setattr(jobs_api, "token_header", lambda: {"Authorization": "Bearer wrong"})
    with answering(403, "") as (url, _), pytest.raises(RayStateError, match="refuses the token"):
        train_runs(url)
    monkeypatch.setattr(jobs_api, "token_header", find_none)
    with pytest.raises(RayStateError, match="there is no token"):
        train_runs("http://127.0.0.1:9")
