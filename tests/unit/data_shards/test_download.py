"""Downloads over real sockets: a server on the loopback address that can also misbehave."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import data_shards.download
from data_shards.download import Expected, fetch
from data_shards.errors import DataError

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; ``requests`` records ``(path, Range header or None)``.

    Attributes:
        cuts: for each of the next requests, after how many bytes the connection is cut.
        statuses: answers to the next requests, instead of a file.
        ranges: whether Range headers are honoured.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file.gz": CONTENT}
        self.requests: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.ranges = True

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if wanted and server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert match is not None
            start = int(match.group(1))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards.download, "_BACKOFF_S", (0.0, 0.0, 0.0))


def part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "file.gz"
    said: list[str] = []
    for _ in range(2):
        assert (
            fetch(
                [server.url("/file.gz")],
                path,
                expected=Expected(sha256=SHA256),
                progress=said.append,
            )
            == path
        )
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/file.gz", None)]
    assert len(said) == 1
    assert "512,000 bytes" in said[0]
    assert not part(path).exists()


def test_a_cut_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 100_000]
    path = tmp_path / "file.gz"
    fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=400000-"]


def test_an_earlier_part_is_taken_up(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    part(path).write_bytes(CONTENT[:1000])
    fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/file.gz", "bytes=1000-")]


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [300_000]
    path = tmp_path / "file.gz"
    fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("old", [b"another file's beginning", CONTENT + b"and more"])
def test_a_part_of_something_else_is_thrown_away(
    server: Server, tmp_path: Path, old: bytes
) -> None:
    path = tmp_path / "file.gz"
    part(path).write_bytes(old)
    fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [f"bytes={len(old)}-", None]


def test_a_part_that_is_whole_is_only_checked(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    part(path).write_bytes(CONTENT)
    fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/file.gz", f"bytes={len(CONTENT)}-")]


def test_a_wrong_checksum_names_everything_and_leaves_nothing(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "file.gz"
    url = server.url("/file.gz")
    with pytest.raises(DataError) as caught:
        fetch([url], path, expected=Expected(sha256="0" * 64))
    message = str(caught.value)
    assert all(part in message for part in ("file.gz", url, "0" * 64, SHA256, "--mirror"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_earlier_download_is_replaced(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(CONTENT[:-1])
    told: list[str] = []
    expected = Expected(sha256=SHA256, num_bytes=len(CONTENT))
    fetch([server.url("/file.gz")], path, expected=expected, progress=told.append)
    assert path.read_bytes() == CONTENT
    found = f"expected {len(CONTENT):,} bytes, found {len(CONTENT) - 1:,}"
    assert told[0] == f"{path} is fetched again, for it is not as expected: {found}"


def test_the_next_address_is_tried_where_the_file_is_not(server: Server, tmp_path: Path) -> None:
    urls = [server.url("/nowhere/file.gz"), server.url("/file.gz")]
    path = fetch(urls, tmp_path / "file.gz", expected=Expected(sha256=SHA256))
    assert path.read_bytes() == CONTENT


def test_a_missing_file_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    url = server.url("/nowhere.gz")
    with pytest.raises(DataError) as caught:
        fetch([url], tmp_path / "nowhere.gz", expected=Expected(sha256=SHA256))
    assert f"cannot download nowhere.gz: the server answered 404 Not Found for {url}" in str(
        caught.value
    )
    assert "--mirror" in str(caught.value)
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch([server.url("/file.gz")], tmp_path / "file.gz", expected=Expected(sha256=SHA256))
    assert len(server.requests) == 3


def test_a_server_that_stays_broken_is_given_up(server: Server, tmp_path: Path) -> None:
    server.statuses = [500] * 10
    with pytest.raises(DataError, match=r"the server answered 500 .*--mirror"):
        fetch([server.url("/file.gz")], tmp_path / "file.gz", expected=Expected(sha256=SHA256))
    assert len(server.requests) == 4


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(
    server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    server.cuts = [1000] * 10
    with pytest.raises(DataError, match="connection broke off"):
        fetch([server.url("/file.gz")], tmp_path / "file.gz", expected=Expected(sha256=SHA256))
    assert len(server.requests) == 4
    assert part(tmp_path / "file.gz").stat().st_size == 1000


def test_no_network_is_one_clear_message(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file.gz"
        with pytest.raises(DataError, match=r"no connection .*no network.*--mirror") as caught:
            fetch([url], tmp_path / "file.gz", expected=Expected(sha256=SHA256))
    assert url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_none_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an address"):
        fetch(["http://"], tmp_path / "file.gz", expected=Expected(sha256=SHA256))


def test_two_at_once_fetch_one_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    results: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                fetch([server.url("/file.gz")], path, expected=Expected(sha256=SHA256))
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [path] * 4
    assert path.read_bytes() == CONTENT
    assert not part(path).exists()
    assert len(server.requests) == 1
