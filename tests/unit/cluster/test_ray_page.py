"""The address of Ray's dashboard, behind which it starts when somebody looks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import ray_page
from cluster.ray_page import RUNS_PATH, RayPage

HOST = "127.0.0.1"


class Dashboard:
    """Says which path was asked for; counts how often it was started."""

    def __init__(self) -> None:
        self.starts = 0
        self.fails = False
        self.dies_after: float | None = None
        self.server: ThreadingHTTPServer | None = None

    def start(self) -> ray_page.Dashboard:
        self.starts += 1
        if self.fails:
            raise RuntimeError("no memory")
        if self.dies_after is not None:
            time.sleep(self.dies_after)
            with socket.socket() as nobody:
                nobody.bind((HOST, 0))
                return ray_page.Dashboard(nobody.getsockname(), lambda: False)
        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return ray_page.Dashboard((HOST, self.server.server_port))

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(self.path.encode())

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    made = Dashboard()
    yield made
    made.stop()


@pytest.fixture
def page(dashboard: Dashboard) -> Iterator[RayPage]:
    made = RayPage(HOST, None, first_port=20000)
    made.serve(dashboard.start)
    yield made
    made.close()


def ask(page: RayPage, path: str, body: bytes | None = None) -> bytes:
    connection = HTTPConnection(*page.address, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        return connection.getresponse().read()
    finally:
        connection.close()


def test_it_starts_once_when_first_asked_and_passes_everything_on(
    page: RayPage, dashboard: Dashboard
) -> None:
    told = []
    page.attach(lambda path: None, lambda: told.append(page.is_awake))
    socket.create_connection(page.address).close()  # who only knocks, wakes nobody
    assert (dashboard.starts, page.is_awake) == (0, False)
    answers: list[bytes] = []
    askers = [
        threading.Thread(target=lambda: answers.append(ask(page, "/index.html"))) for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert answers == [b"/index.html"] * 3
    assert (dashboard.starts, told) == (1, [True])
    large = bytes(range(256)) * 4000
    assert ask(page, "/", large) == large


def test_what_the_command_knows_is_answered_without_the_dashboard(
    page: RayPage, dashboard: Dashboard
) -> None:
    page.attach(lambda path: b"[1]" if path == "/runs" else None, lambda: None)
    assert ask(page, "/runs") == b"[1]"
    assert dashboard.starts == 0
    assert ask(page, "/other") == b"/other"
    assert ask(page, "/runs") == b"/runs", "now it is the dashboard's"


def test_a_dashboard_that_does_not_start_is_tried_again_by_the_next(
    page: RayPage, dashboard: Dashboard
) -> None:
    dashboard.fails = True
    with pytest.raises((HTTPException, ConnectionError)):
        ask(page, "/")
    assert dashboard.starts == 1
    dashboard.fails = False
    assert ask(page, "/again") == b"/again"


def test_a_dashboard_that_was_there_first_learns_of_the_run_too(page: RayPage) -> None:
    assert ask(page, "/") == b"/"
    told = threading.Event()
    page.attach(lambda path: None, told.set)
    assert told.wait(5)


def test_who_asks_for_the_runs_before_there_is_one_is_answered_when_there_is(
    page: RayPage, dashboard: Dashboard
) -> None:
    answers: list[bytes] = []
    asker = threading.Thread(target=lambda: answers.append(ask(page, RUNS_PATH)))
    asker.start()
    time.sleep(0.1)
    page.attach(lambda path: b"[1]" if path == RUNS_PATH else None, lambda: None)
    asker.join()
    assert (answers, dashboard.starts) == ([b"[1]"], 0)


def test_one_that_dies_at_its_start_is_noticed_at_once_and_for_all_who_wait(
    page: RayPage, dashboard: Dashboard
) -> None:
    dashboard.dies_after = 0.2
    failures: list[Exception] = []

    def fail() -> None:
        try:
            ask(page, "/")
        except (HTTPException, ConnectionError) as error:
            failures.append(error)

    askers = [threading.Thread(target=fail) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(5)
    assert (len(failures), dashboard.starts) == (3, 1)


def test_one_that_is_gone_is_started_again(page: RayPage, dashboard: Dashboard) -> None:
    told: list[int] = []

    def tell() -> None:
        told.append(dashboard.starts)
        raise RuntimeError("no actor")  # which hinders nobody

    page.attach(lambda path: None, tell)
    assert ask(page, "/") == b"/"
    dashboard.stop()
    assert ask(page, "/again") == b"/again"
    assert told == [1, 2]


def test_it_takes_the_next_free_port_unless_one_was_asked_for(page: RayPage) -> None:
    port = page.address[1]
    other = RayPage(HOST, None, first_port=port)
    assert other.address[1] > port
    other.close()
    with pytest.raises(OSError, match="in use"):
        RayPage(HOST, port, first_port=20000)
