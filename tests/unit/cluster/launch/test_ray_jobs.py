"""Jobs through Ray's Jobs API, against a server of our own that answers as Ray's does, or worse."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import click
import pytest
import yaml
from click.testing import CliRunner

from cluster import session
from cluster.cli import cli
from cluster.commands import train
from cluster.console import JsonConsole, errors_told
from cluster.launch import jobs_api, ray_address, ray_jobs
from cluster.launch.job_log import JobLog
from cluster.launch.jobs_api import JobsApi, NoAnswerError
from cluster.launch.ray_checks import check_python, check_ray, check_room
from cluster.launch.ray_jobs import RayJobsTarget
from cluster.launch.target import (
    Ended,
    LogLine,
    Place,
    RemoteCommandError,
    Submission,
    Update,
    Waiting,
)
from cluster.launch.upload import pack
from data_shards.errors import RunFailedError, UserError
from tests.workplace import REPOSITORY

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

TRAIN = Submission("demo", "train", ("train", "--name", "demo", "--workers", "2"), "model: {}\n")


_PACK = functools.cache(pack)


class Head:
    """A cluster's head as the Jobs API shows it. Change its fields to change what it answers.

    Attributes:
        token: that it asks for; None asks for none.
        jobs: JobDetails by submission id; a submitted job stays PENDING until a test changes it.
        texts: what each job has written.
        cuts: after how many characters each connection to a log is cut; then none is.
        statuses: answers to come instead of the right one, by path.
        nodes: what it tells of machines, also of those that are gone; at most 100 unless asked.
        end_s: how long a job takes to end that is stopped.
    """

    def __init__(self) -> None:
        self.token: str | None = None
        self.version = "2.60.0"
        self.jobs: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.packages: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.statuses: dict[str, list[tuple[int, str]]] = {}
        self.nodes = [{"state": "ALIVE", "resources_total": {"CPU": 1.0}}] * 2
        self.nodes.append({"state": "DEAD"})
        self.end_s = 0.0
        self.seen: list[str] = []
        self.submitted: Callable[[dict[str, Any]], None] = lambda details: None
        head = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                head.handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def handle(self, request: Any) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        what = f"{request.command} {request.path}"
        self.seen.append(what)
        given = request.headers.get("Authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            answer(request, 401 if given is None else 403, b"no")
            return
        if replies := self.statuses.get(request.path):
            status, text = replies.pop(0)
            answer(request, status, text.encode())
            return
        if request.path.endswith("/logs/tail"):
            self.tail(request, request.path.split("/")[3])
            return
        status, value = self.reply(what, body)
        answer(request, status, json.dumps(value).encode())

    def reply(self, what: str, body: bytes) -> tuple[int, Any]:
        match what.split("/"):
            case ["GET ", "api", "version"]:
                return 200, {"ray_version": self.version}
            case ["GET ", "api", "v0", "cluster_metadata"]:
                return 200, {"data": {"pythonVersion": "3.11.7"}}
            case ["GET ", "api", "v0", name] if name.startswith("nodes?"):
                asked = parse_qs(name.partition("?")[2])
                found = self.nodes
                if asked.get("filter_keys") == ["state"] and asked["filter_predicates"] == ["="]:
                    found = [node for node in found if [node["state"]] == asked["filter_values"]]
                found = found[: int(asked.get("limit", ["100"])[0])]
                return 200, {"data": {"result": {"result": found}}}
            case ["GET ", "nodes?view=summary"]:
                words = ["raylet", "--python_worker_command=/venv/bin/python default_worker.py"]
                return 200, {
                    "data": {"summary": [{"raylet": {"isHeadNode": True}, "cmdline": words}]}
                }
            case ["GET ", "api", "packages", "gcs", name]:
                return (200, {}) if name in self.packages else (404, {})
            case ["PUT ", "api", "packages", "gcs", name]:
                self.packages[name] = body
                return 200, {}
            case ["POST ", "api", "jobs", ""]:
                details = {**json.loads(body), "type": "SUBMISSION", "status": "PENDING"}
                details["start_time"] = 1000 + len(self.jobs)
                self.jobs[details["submission_id"]] = details
                self.submitted(details)
                return 200, {"submission_id": details["submission_id"]}
            case ["GET ", "api", "jobs", ""]:
                return 200, [*self.jobs.values(), {"type": "DRIVER", "status": "RUNNING"}]
            case ["GET ", "api", "jobs", name] if name in self.jobs:
                return 200, self.jobs[name]
            case ["GET ", "api", "jobs", name, "logs"] if name in self.jobs:
                return 200, {"logs": self.texts.get(name, "")}
            case ["POST ", "api", "jobs", name, "stop"] if name in self.jobs:
                end = functools.partial(self.jobs[name].update, status="STOPPED")
                threading.Timer(self.end_s, end).start() if self.end_s else end()
                return 200, {"stopped": True}
            case ["DELETE ", "api", "jobs", name] if name in self.jobs:
                del self.jobs[name]
                return 200, {"deleted": True}
        return 404, "none"

    def tail(self, request: Any, name: str) -> None:
        """A web socket that sends the job's log in pieces of seven characters."""
        if name not in self.jobs:
            answer(request, 404, b"none")
            return
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        request.send_response(101)
        request.send_header("Upgrade", "websocket")
        request.send_header("Connection", "Upgrade")
        request.send_header("Sec-WebSocket-Accept", accept)
        request.end_headers()
        request.close_connection = True
        text, cut = self.texts.get(name, ""), self.cuts.pop(0) if self.cuts else None
        for start in range(0, len(text[:cut]), 7):
            piece = text[:cut][start : start + 7].encode()
            request.wfile.write(bytes([0x81, len(piece)]) + piece)
        if cut is None:
            request.wfile.write(bytes([0x88, 2, 0x03, 0xE8]))  # a close that is meant
            request.rfile.read(8)  # the client's own


def answer(request: Any, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def head() -> Iterator[Head]:
    server = Head()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, no proxy, no waiting, and the code is packed once."""
    monkeypatch.setattr(ray_jobs, "pack", _PACK)
    names = ("AUTH_TOKEN", "AUTH_TOKEN_PATH", "JOB_HEADERS", "ADDRESS", "API_SERVER_ADDRESS")
    for name in names:
        monkeypatch.delenv(f"RAY_{name}", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_jobs, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_jobs, "_QUICK_POLL_S", 0.01)


@pytest.fixture
def target(head: Head) -> RayJobsTarget:
    return target_at(head.address)


def target_at(address: str) -> RayJobsTarget:
    return RayJobsTarget(Place("ray", "/shared", address=address))


RAYS = "2026-11-23 04:59:56,056\tINFO job_manager.py:581 -- Runtime env is setting up."


def wrote(job: str, text: str) -> str:
    """A job's log as Ray has it: its own lines come first."""
    return f"{RAYS}\nRunning entrypoint for job {job}: python\n{text}"


# --- handing a job over


def test_a_job_carries_its_code_its_configuration_and_who_it_is(
    head: Head, target: RayJobsTarget
) -> None:
    job = target.submit(TRAIN)

    sent = head.jobs[job.id]
    assert sent["entrypoint"] == (
        "/venv/bin/python -m cluster.cli train --name demo --workers 2 --config run.yaml"
    )
    assert sent["entrypoint_num_cpus"] == 0
    assert (
        sent["metadata"].items()
        >= {
            "babelray-run": "demo",
            "babelray-kind": "train",
            "babelray-storage": "/shared",
        }.items()
    )
    [(name, content)] = head.packages.items()
    assert sent["runtime_env"] == {"working_dir": f"gcs://{name}"}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("run.yaml") == b"model: {}\n"
        assert "cluster/cli.py" in archive.namelist()
        assert "trainer/templates" in {str(Path(name).parent) for name in archive.namelist()}
        assert not [name for name in archive.namelist() if "__pycache__" in name]
    assert (job.run, job.kind, job.phase) == ("demo", "train", "starting")


def test_code_that_is_there_is_not_sent_again(head: Head, target: RayJobsTarget) -> None:
    first = target.submit(TRAIN)
    head.jobs[first.id]["status"] = "SUCCEEDED"
    second = target.submit(TRAIN)
    assert second.id != first.id
    assert len([what for what in head.seen if what.startswith("PUT ")]) == 1


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    for package in ("cluster", "trainer", "model", "data_shards", "k8s"):
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / "a.py").write_text("a")
    before = pack("x: 1\n", root=tmp_path)
    (tmp_path / "model" / "__pycache__" / "a.pyc").write_text("compiled")
    (tmp_path / "model" / "a.py").touch()
    assert pack("x: 1\n", root=tmp_path).uri == before.uri
    assert pack("x: 2\n", root=tmp_path).uri != before.uri
    assert before.files[-1] == ("run.yaml", 5)
    (tmp_path / "model" / "a.py").unlink()
    (tmp_path / "model" / "__pycache__" / "a.pyc").unlink()
    (tmp_path / "model" / "__pycache__").rmdir()
    (tmp_path / "model").rmdir()
    with pytest.raises(UserError, match=r"model is missing: install babelray anew"):
        pack(root=tmp_path)


def test_a_run_that_is_not_over_is_not_launched_again(head: Head, target: RayJobsTarget) -> None:
    job = target.submit(TRAIN)
    for status in ("PENDING", "RUNNING"):
        head.jobs[job.id]["status"] = status
        with pytest.raises(UserError, match=rf"the run demo is not over .*{job.id}.*babelray stop"):
            target.submit(TRAIN)
    # Evaluation is another job of it, and the same name in another storage another run.
    evaluation = Submission("demo", "evaluate", ("evaluate", "demo"))
    again = target.submit(evaluation)
    with pytest.raises(UserError, match=rf"an evaluation .* ray job stop --address .* {again.id}$"):
        target.submit(evaluation)
    RayJobsTarget(Place("ray", "/other", address=head.address)).submit(TRAIN)
    assert len(head.jobs) == 3


def test_messages_tell_what_can_be_typed_here(head: Head) -> None:
    place = Place("ray", "/shared", address=head.address)
    target = RayJobsTarget(place, runs=Path("/my runs"))
    target.submit(TRAIN)
    with pytest.raises(UserError, match=r"logs demo --follow --runs '/my runs', or stop .*runs'$"):
        target.submit(TRAIN)
    doctor = Submission("doctor", "doctor", ("doctor",))
    job = target.submit(doctor)
    with pytest.raises(UserError, match=rf"a doctor is at work .* wait .*ray job stop .*{job.id}$"):
        target.submit(doctor)


def test_a_doctor_that_was_ended_makes_room_for_another(head: Head, target: RayJobsTarget) -> None:
    head.end_s = 0.05
    doctor = Submission("doctor", "doctor", ("doctor",))
    target.cancel(target.submit(doctor))
    target.submit(doctor)


def test_what_would_be_submitted_is_shown_and_nothing_is_sent(
    head: Head, target: RayJobsTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Secret": "hidden"}')
    described, config = yaml.safe_load_all(target.render(TRAIN))
    assert described["request"]["entrypoint"].startswith("/venv/bin/python -m cluster.cli train")
    assert described["upload"]["content"]["run.yaml"] == len("model: {}\n")
    assert described["upload"]["files"] == len(described["upload"]["content"])
    assert config == {"model": {}}
    assert "hidden" not in target.render(TRAIN)
    assert {what.split()[0] for what in head.seen} == {"GET"}


# --- finding and following it


def in_json(error: UserError) -> str:
    """What a command writes that logs as JSON and ends with that error."""
    stream = io.StringIO()
    console = JsonConsole(stream)
    console.say("--workers 2: all is well", "warning")
    with suppress(click.exceptions.Exit), errors_told(console):
        raise error
    return stream.getvalue()


@pytest.mark.parametrize(
    ("status", "message", "phase", "expected"),
    [
        ("PENDING", "Job has not started yet.", "starting", "Ray prepares the job"),
        ("RUNNING", "Job is currently running.", "running", None),
        ("SUCCEEDED", "Job finished successfully.", "succeeded", None),
        ("STOPPED", "Job was intentionally stopped.", "stopped", None),
        ("FAILED", "failed with exit code 2, last available logs (x):\nmore", "failed", "code 2"),
        ("FAILED", "x\nbabelray: error: no such file\n", "failed", "no such file"),
        ("FAILED", "code 2, last:\n" + in_json(UserError("no lanes\n  x")), "failed", "no lanes"),
    ],
)
def test_how_far_a_job_is(
    head: Head, target: RayJobsTarget, status: str, message: str, phase: str, expected: str | None
) -> None:
    assert target.find("demo") is None
    name = target.submit(TRAIN).id
    head.jobs[name] |= {"status": status, "message": message, "driver_exit_code": 2}
    job = target.find("demo")
    assert job is not None
    assert job.phase == phase
    assert ("exit status", "2") in job.facts
    if expected is None:
        assert job.message is None
    else:
        assert expected in str(job.message)
        assert "\n" not in str(job.message)


def test_the_newest_of_a_runs_jobs_is_found(head: Head, target: RayJobsTarget) -> None:
    for _ in range(3):
        name = target.submit(TRAIN).id
        head.jobs[name]["status"] = "FAILED"
    found = target.find("demo")
    assert found is not None
    assert found.id == name
    assert target.find("demo", "evaluate") is None


def test_a_connection_that_is_cut_neither_repeats_nor_loses_a_line(
    head: Head, target: RayJobsTarget
) -> None:
    job = target.submit(TRAIN)
    lines = [f"step {number}" for number in range(40)]
    head.texts[job.id] = wrote(job.id, "\n".join(lines))  # the last one without an end
    head.cuts = [3, 150, 151, 300]
    updates = following(head, target, job.id)

    assert next(updates) == Waiting("Ray prepares the job on the cluster's head")
    head.jobs[job.id]["status"] = "RUNNING"
    told = [next(updates) for _ in range(30)]
    head.jobs[job.id] |= {"status": "SUCCEEDED"}
    told += list(updates)
    assert [update.text for update in told if isinstance(update, LogLine)] == lines
    # A cut that is mended at once is nobody's business.
    assert not [update for update in told if isinstance(update, Waiting)]
    end = told[-1]
    assert isinstance(end, Ended)
    assert end.job.phase == "succeeded"


def following(head: Head, target: RayJobsTarget, name: str) -> Iterator[Update]:
    job = target.find("demo")
    assert job is not None
    assert job.id == name
    return target.follow(job)


def test_a_job_whose_log_is_gone_still_ends(head: Head, target: RayJobsTarget) -> None:
    job = target.submit(TRAIN)
    head.jobs[job.id]["status"] = "FAILED"
    head.statuses[f"/api/jobs/{job.id}/logs/tail"] = [(500, "the machine is gone")] * 10
    *_, end = target.follow(job)
    assert isinstance(end, Ended)
    assert end.job.phase == "failed"


def test_a_head_that_began_anew_ends_the_job(head: Head, target: RayJobsTarget) -> None:
    job = target.submit(TRAIN)
    head.jobs.clear()
    *_, end = target.follow(job)
    assert isinstance(end, Ended)
    assert end.job.phase == "failed"
    assert "launch the run again to go on from its last checkpoint" in str(end.job.message)


def test_following_gives_up_in_the_end(
    head: Head, target: RayJobsTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = target.submit(TRAIN)
    monkeypatch.setattr(ray_jobs, "_SILENCE_S", 0.02)
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.3)
    updates = target.follow(job)
    assert next(updates) == Waiting("Ray prepares the job on the cluster's head")
    head.statuses[f"/api/jobs/{job.id}"] = [(502, "bad gateway")] * 1000
    assert next(updates) == Waiting("the cluster does not answer; trying again")
    with pytest.raises(RunFailedError, match=r"502 .*: bad gateway\n.* may go on all the same"):
        next(updates)


def test_a_job_is_cancelled(head: Head, target: RayJobsTarget) -> None:
    target.cancel(target.submit(TRAIN))
    found = target.find("demo")
    assert found is not None
    assert found.phase == "stopped"


# --- a command there


def test_a_command_gives_its_lines_and_its_exit_status(head: Head, target: RayJobsTarget) -> None:
    def run_it(details: dict[str, Any]) -> None:
        head.texts[details["submission_id"]] = wrote(details["submission_id"], "one\ntwo\nthree")
        details |= {"status": "FAILED", "driver_exit_code": 3}

    head.submitted = run_it
    lines: list[str] = []
    with pytest.raises(RemoteCommandError) as failed:
        lines.extend(target.run("demo", ["status", "demo", "--runs", "/shared/my runs"]))
    assert lines == ["one", "two", "three"]
    assert failed.value.exit_status == 3
    [details] = head.jobs.values()
    assert details["entrypoint"].endswith("cluster.cli status demo --runs '/shared/my runs'")
    assert target.find("demo") is None


def test_commands_of_long_ago_are_forgotten(head: Head, target: RayJobsTarget) -> None:
    def succeed(details: dict[str, Any]) -> None:
        details |= {"status": "SUCCEEDED", "end_time": 2000}

    head.submitted = succeed
    training = target.submit(TRAIN)
    assert list(target.run("demo", ["--version"])) == []
    assert list(head.jobs) == [training.id]


def test_a_command_that_nobody_listens_to_is_ended(head: Head, target: RayJobsTarget) -> None:
    def run_on(details: dict[str, Any]) -> None:
        head.texts[details["submission_id"]] = wrote(details["submission_id"], "one\ntwo")
        details |= {"status": "RUNNING"}

    head.submitted = run_on
    lines = target.run("demo", ["logs", "demo", "--follow"])
    assert next(lines) == "one"
    lines.close()  # type: ignore[attr-defined]
    [details] = head.jobs.values()
    assert details["status"] == "STOPPED"


def test_a_command_outlasts_silence(
    head: Head, target: RayJobsTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_silent(details: dict[str, Any]) -> None:
        name = details["submission_id"]
        head.texts[name] = wrote(name, "saved\n")
        details |= {"status": "SUCCEEDED"}
        for path in (f"/api/jobs/{name}", f"/api/jobs/{name}/logs"):
            head.statuses[path] = [(502, "bad gateway")] * silences

    head.submitted = be_silent
    silences = 2
    assert list(target.run("demo", ["stop", "demo"])) == ["saved"]
    silences = 1000
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", 0.05)
    with pytest.raises(NoAnswerError, match="bad gateway"):
        list(target.run("demo", ["stop", "demo"]))
    assert not [what for what in head.seen if what.endswith("/stop")]


def test_a_command_that_cannot_begin_says_why(head: Head, target: RayJobsTarget) -> None:
    def refuse(details: dict[str, Any]) -> None:
        details |= {"status": "FAILED", "message": "runtime_env setup failed: no space\nmore"}

    head.submitted = refuse
    with pytest.raises(UserError, match=r"could not run a command: runtime_env .*: no space$"):
        list(target.run("demo", ["--version"]))


# --- what can be wrong


def test_nobody_answers() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        target = target_at(f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(UserError, match=r"no Ray Jobs API answers at .*Connection refused"):
            target.find("demo")
        [check] = target.preflight(TRAIN)
        assert (check.outcome, check.name) == ("failure", "Ray's Jobs API")


def test_nobody_says_anything() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        api = JobsApi(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(NoAnswerError, match="it does not answer in time"):
            api.version(timeout_s=0.1)


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (404, "nothing here", "is no Ray dashboard: RAY_ADDRESS must be the head's dashboard"),
        (200, "<html>", "is no Ray dashboard"),
        (200, "[]", "is no Ray dashboard"),
        (500, "Traceback\nKeyError: 'x'", r"answers 500 Internal Server Error: KeyError: 'x'$"),
        (401, "", "asks for a token: export RAY_AUTH_MODE=token"),
        (403, "", "refuses the token that was given: export RAY_AUTH_MODE=token"),
    ],
)
def test_another_answer_than_ray_gives(
    head: Head, target: RayJobsTarget, status: int, text: str, expected: str
) -> None:
    head.statuses["/api/version"] = [(status, text)] * 2
    [check] = target.preflight(TRAIN)
    assert check.outcome == "failure"
    assert re.search(expected, str(check.mend))
    with pytest.raises(UserError, match=expected), target.dashboard("demo"):
        pass


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/packages/gcs/"])
def test_a_job_that_is_not_taken(head: Head, target: RayJobsTarget, path: str) -> None:
    if path == "/api/jobs/":
        head.statuses[path] = [(200, "[]"), (404, "")]
        expected = "takes no jobs"
    else:
        head.statuses |= {f"{path}{_PACK(TRAIN.config).uri[6:]}": [(404, ""), (500, "too large")]}
        expected = "took no upload: 500 .*: too large"
    with pytest.raises(UserError, match=expected):
        target.submit(TRAIN)


def test_the_token_goes_along_and_nowhere_else(
    head: Head, target: RayJobsTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head.token = "right"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # which requests prefer
    with pytest.raises(UserError, match="asks for a token") as refused:
        target.find("demo")
    assert refused.value.exit_status == 2

    monkeypatch.setattr(jobs_api, "token_header", lambda: {"Authorization": "Bearer wrong"})
    with pytest.raises(UserError, match="refuses the token") as refused:
        target_at(head.address).find("demo")
    assert "wrong" not in str(refused.value)

    monkeypatch.setattr(jobs_api, "token_header", lambda: {"Authorization": "Bearer right"})
    target = target_at(head.address)
    job = target.submit(TRAIN)
    head.jobs[job.id]["status"] = "SUCCEEDED"
    head.texts[job.id] = wrote(job.id, "one\n")
    assert LogLine("one") in list(target.follow(job))
    assert "right" not in target.render(TRAIN)
    assert "right" not in json.dumps(head.jobs)


def test_token_mode_without_a_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication import http_token_authentication
    from ray.exceptions import AuthenticationError

    def find_none(given: dict[str, str]) -> dict[str, str]:
        raise AuthenticationError("RAY_AUTH_TOKEN_PATH is set but the file is empty")

    monkeypatch.setattr(http_token_authentication, "get_auth_headers_if_auth_enabled", find_none)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token, but there is no token: export"):
        target_at(head.address).find("demo")


def test_further_headers(
    head: Head, target: RayJobsTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.token = "proxy"
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer proxy"}')
    assert target.find("demo") is None
    monkeypatch.setenv("RAY_JOB_HEADERS", "Bearer proxy")
    with pytest.raises(UserError, match="RAY_JOB_HEADERS must be a JSON object"):
        target_at(head.address).find("demo")


def test_a_storage_that_means_something_only_here() -> None:
    with pytest.raises(UserError, match="storage runs: give the folder's absolute path"):
        RayJobsTarget(Place("ray", "runs", address="http://head:8265"))


# --- what a look tells


def test_all_is_well(target: RayJobsTarget) -> None:
    assert [check.outcome for check in target.preflight(TRAIN)] == ["ok"] * 4


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("2.60.0", "ok"), ("2.60.1", "warning"), ("2.61.0", "warning"), ("2.9.3", "failure")],
)
def test_versions_of_ray(version: str, outcome: str) -> None:
    check = check_ray(version)
    assert check.outcome == outcome
    assert (check.mend is None) == (outcome == "ok")


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("3.11.99", "ok"), ("3.99.1", "warning"), ("3.9.18", "failure"), (None, "warning")],
)
def test_versions_of_python(
    version: str | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.version_info", (3, 11, 4, "final", 0))
    assert check_python(version).outcome == outcome


def test_room_for_the_workers() -> None:
    nodes = [{"resources_total": {"CPU": 64.0, "GPU": 8.0}}, {"resources_total": {"CPU": 2.0}}]
    assert check_room(nodes, ["train"]).outcome == "ok"
    assert check_room(nodes, ["train", "--workers", "8"]).outcome == "ok"
    assert check_room(nodes, ["train", "--workers", "4:16"]).outcome == "ok"
    few = check_room(nodes, ["train", "--workers", "16"])
    assert few.outcome == "warning"
    assert few.found == "2 machines with 66 CPUs and 8 GPUs; 16 workers need one GPU each"
    assert "waits five minutes" in str(few.mend)
    assert train._PATIENCE_S == 5 * 60


def test_every_machine_is_counted(head: Head) -> None:
    head.nodes = [{"state": state} for state in ["DEAD"] * 90 + ["ALIVE"] * 120]
    assert len(JobsApi(head.address).nodes()) == 120


@pytest.mark.parametrize(
    ("gpus_there", "nodes", "gpus", "expected"),
    [
        ([], None, None, None),
        ([], "4", 8, "32"),
        ([], "1:4", 2, "2:8"),
        ([], "4", None, "4"),
        ([8, 8], "4", None, "32"),
        ([8], "1:4", None, "8:32"),
        ([8], None, 8, "--gpus 8: on how many machines"),
        ([4, 8], "2", None, r"different numbers of GPUs \(4, 8\): give --gpus"),
    ],
)
def test_machines_and_workers(
    head: Head, gpus_there: list[int], nodes: str | None, gpus: int | None, expected: str | None
) -> None:
    there = [{"state": "ALIVE", "resources_total": {"GPU": float(n)}} for n in gpus_there]
    head.nodes += there
    target = RayJobsTarget(Place("ray", "/shared", address=head.address, nodes=nodes, gpus=gpus))
    if expected is not None and "GPUs" in expected.replace("--gpus", "GPUs"):
        with pytest.raises(UserError, match=expected):
            target.workers()
    else:
        assert target.workers() == expected


# --- addresses


def test_which_address_is_meant() -> None:
    assert ray_address.given({}) is None
    assert ray_address.given({"RAY_ADDRESS": "local"}) is None
    assert ray_address.given({"RAY_ADDRESS": "a:1"}) == "a:1"
    assert ray_address.given({"RAY_ADDRESS": "a:1", "RAY_API_SERVER_ADDRESS": "http://b"}) == (
        "http://b"
    )


def test_a_dashboards_address_with_and_without_its_scheme(head: Head) -> None:
    assert ray_address.jobs_url(f"{head.address}/") == head.address
    assert ray_address.jobs_url(head.address.removeprefix("http://")) == head.address
    head.token = "right"
    assert ray_address.jobs_url(head.address.removeprefix("http://")) == head.address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ray://head:10001", "is a Ray Client address: give .* http://head:8265, or .* head:6379"),
        ("tcp://head:1", "is no address of a Ray cluster"),
        ("http://", "is no URL"),
        ("http://head:port", "is no URL"),
        ("nowhere", "no Ray cluster answers at RAY_ADDRESS=nowhere"),
    ],
)
def test_addresses_that_are_none(address: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        ray_address.jobs_url(address)


def test_a_dashboards_address_is_told_from_a_heads(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.token = "right"
    monkeypatch.setenv("RAY_ADDRESS", head.address.removeprefix("http://"))
    with (
        pytest.raises(UserError, match=r"Jobs API, which babelray launch takes.*HOST:6379"),
        session.connect(min_cpus=1, threads=1, dashboard_port=None),
    ):
        pass


def test_a_token_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray._raylet
    from ray.exceptions import AuthenticationError

    def refuse(address: str) -> None:
        raise AuthenticationError("RPC error: InvalidAuthToken")

    def connect(**options: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")  # all that Ray says of it

    monkeypatch.setattr(ray._raylet, "GcsClient", refuse)
    monkeypatch.setattr(ray, "init", connect)
    with pytest.raises(UserError, match="asks for a token, or another one: export RAY_AUTH_MODE"):
        session._connect_to("192.0.2.7:6379")


def test_a_head_that_does_not_answer() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
            ray_address.jobs_url(address)


@pytest.mark.parametrize(
    ("dashboard", "expected"),
    [
        (b"127.0.0.1:8265", r"listens on its own machine alone .*ssh -L 8265:127\.0\.0\.1:8265"),
        (b"", "runs no dashboard, which takes jobs"),
        (None, "runs no dashboard, which takes jobs"),
    ],
)
def test_a_head_whose_dashboard_cannot_be_reached(
    dashboard: bytes | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, lambda: dashboard)
    with pytest.raises(UserError, match=expected):
        ray_address.jobs_url("192.0.2.7:6379")


def test_a_head_tells_where_its_dashboard_is(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda: b"192.0.2.7:8265")
    assert ray_address.jobs_url("192.0.2.7:6379") == "http://192.0.2.7:8265"
    answering(monkeypatch, lambda: b"127.0.0.1:8265")  # the head is this machine
    assert ray_address.jobs_url("127.0.0.1:6379") == "http://127.0.0.1:8265"


def test_a_head_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bytes:
        raise RuntimeError("Unauthenticated: InvalidAuthToken")

    answering(monkeypatch, refuse)
    with pytest.raises(UserError, match="asks for a token, or another one: export RAY_AUTH_MODE"):
        ray_address.jobs_url("192.0.2.7:6379")


def answering(monkeypatch: pytest.MonkeyPatch, reply: Callable[[], bytes | None]) -> None:
    """A head that can be reached and answers every question with ``reply()``."""
    import ray._raylet

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def internal_kv_get(self, *question: object) -> bytes | None:
            return reply()

    monkeypatch.setattr(ray._raylet, "GcsClient", Client)
    monkeypatch.setattr(ray_address, "_knock", lambda head: None)
    monkeypatch.setattr(ray_address, "is_dashboard", lambda address: False)


def test_a_password_is_not_shown() -> None:
    target = target_at("http://me:secret@127.0.0.1:1")
    assert target.describe() == "the Ray cluster at http://127.0.0.1:1"
    with pytest.raises(UserError) as refused:
        target.find("demo")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["http://me:secret@head:port", "ray://me:secret@head:1", "me:secret@127.0.0.1:1"]
)
def test_a_password_is_not_shown_where_the_address_is_wrong(address: str) -> None:
    with pytest.raises(UserError) as refused:
        ray_address.jobs_url(address)
    assert "secret" not in str(refused.value)
    with pytest.raises(UserError) as refused:
        session._check_address(address)
    assert "secret" not in str(refused.value)


def test_a_password_goes_along_unless_there_is_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://me:s%40t@head:8265"
    basic = base64.b64encode(b"me:s@t").decode()
    assert JobsApi(url).headers() == {"Authorization": f"Basic {basic}"}
    monkeypatch.setattr(jobs_api, "token_header", lambda: {"Authorization": "Bearer right"})
    assert JobsApi(url).headers() == {"Authorization": "Bearer right"}


# --- what the documents tell to type


def documented() -> list[str]:
    """Commands on Ray clusters, in blocks and where lines begin with them, one line each."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, mark, rest = readme.partition("\n## On a GPU cluster\n")
    assert mark
    page = (REPOSITORY / "docs" / "ray-cluster.md").read_text(encoding="utf-8")
    text = (rest.partition("\n## ")[0] + page).replace("\\\n", "")
    blocks = re.findall(
        r"^\$ (?:RAY_ADDRESS=\S+ )?((?:babelray|make launch) .*)", text, re.MULTILINE
    )
    spans = re.findall(r"^(?:\| |)`(babelray [^`]+|make launch [^`]+)`", text, re.MULTILINE)
    return [line for line in [*blocks, *spans] if "OVERLAY" not in line]  # Kubernetes' own


def test_what_the_documents_tell_to_type(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    plain_make = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    commands = documented()
    assert len({command.split()[1] for command in commands}) >= 6
    launched = 0
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            asked = ["make", "-n", *words[1:]]
            ran = subprocess.run(asked, capture_output=True, text=True, check=True, env=plain_make)
            words = shlex.split(ran.stdout.replace("\\\n", "").splitlines()[-1])
        cli.commands[words[1]].make_context(words[1], words[2:])
        if words[1] == "launch":
            launched += 1
            # The checkout's own folder of runs may hold a run of that name.
            arguments = [*words[1:], "--dry-run", "--runs", str(tmp_path)]
            result = CliRunner().invoke(cli, arguments)
            assert result.exit_code == 0, (command, result.output)
            assert "--workers" in result.stdout
    assert launched >= 4


def test_lines_of_a_log() -> None:
    log = JobLog("j")
    assert list(log.read(f"{RAYS}\nRunning entrypoint for job j: x\na\r\nb")) == ["a"]
    log.cut()
    assert list(log.read(f"{RAYS}\nRunning entrypoint")) == []
    assert list(log.read(" for job j: x\na\r\nbc\n\nd")) == ["bc", ""]
    assert list(log.rest()) == ["d"]
    assert list(log.rest()) == []
    log = JobLog("j")
    assert list(log.read(f"{RAYS}\nsh: x: not found\n")) == []
    assert list(log.read("Running entrypoint for job j: x\n")) == ["sh: x: not found"]
