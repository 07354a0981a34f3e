"""Blocks of large remote shards, fetched one by one and ahead of their turn."""

from __future__ import annotations

import contextlib
import functools
import http.server
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_shards import ranges as ranges_module
from data_shards import store as store_module
from data_shards.blocks import block_key
from data_shards.config import DataConfig
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.ranges import Closed
from data_shards.reader import BlockReader
from data_shards.store import ShardStore
from data_shards.stream import BatchSource, Stream

Prepared = tuple[DataConfig, Manifest]


class Server(http.server.ThreadingHTTPServer):
    """Serves ranges of a folder's files; ``before`` may answer in its stead."""

    request_queue_size = 64  # as many readers ask at once

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.requests: list[str | None] = []
        self.before: Callable[[Any, int], bool] = lambda handler, count: False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if self.server.before(self, len(self.server.requests)):
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match is None:
            super().do_GET()
            return
        first, last = map(int, match.groups())
        with Path(self.translate_path(self.path)).open("rb") as file:
            file.seek(first)
            send(self, 206, file.read(last + 1 - first))

    def log_message(self, *_: Any) -> None:
        pass


def send(handler: Any, status: int, content: bytes = b"") -> bool:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    return True


@pytest.fixture
def server(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(store_module, "WHOLE_SHARD_BYTES", 0)
    with Server(prepared[1].folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def there(prepared: Prepared, server: Server) -> Manifest:
    return Manifest.load(prepared[1].folder, f"{server.url}/")


def reader_of(manifest: Manifest, cache: Path) -> BlockReader:
    return BlockReader(manifest, ShardStore(manifest, cache, attempts=3, backoff_s=0.01))


def contents(batches: Any) -> list[Any]:
    return [(b.lane, b.source_BS.tolist(), b.target_out_BT.tolist(), b.data_hash) for b in batches]


def test_a_block_is_fetched_by_itself_and_once(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    manifest = there(prepared, server)
    for _ in range(2):  # the second reader finds it in the cache
        for block in (3, 100):
            assert reader_of(manifest, tmp_path).read(block).key == block_key(block)
    row = manifest.blocks[3]
    first = f"bytes={row['offset']}-{row['offset'] + row['bytes'] - 1}"
    assert server.requests[0] == first
    assert len(server.requests) == 2


def test_a_damaged_part_is_fetched_again(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    manifest = there(prepared, server)
    reader_of(manifest, tmp_path).read(3)
    [file] = tmp_path.glob("*.blocks")
    content = bytearray(file.read_bytes())
    content[int(manifest.blocks[3]["offset"]) + 700] ^= 1
    file.write_bytes(content)
    assert reader_of(manifest, tmp_path).read(3).key == block_key(3)
    assert len(server.requests) == 2


def test_errors_of_the_server_are_tried_again(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    def before(handler: Any, count: int) -> bool:
        return count < 3 and (
            send(handler, 503) if count == 1 else send(handler, 206, b"something else")
        )

    server.before = before
    assert reader_of(there(prepared, server), tmp_path).read(3).key == block_key(3)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "attempts", "message"),
    [
        pytest.param(404, 1, "the server answers 404", id="not there"),
        pytest.param(500, 3, "the server answers 500", id="broken"),
        pytest.param(206, 3, "expected sha256 [0-9a-f]{64}, found", id="another content"),
    ],
)
def test_a_block_that_cannot_be_had_is_named(
    prepared: Prepared, server: Server, tmp_path: Path, status: int, attempts: int, message: str
) -> None:
    server.before = lambda handler, _: send(handler, status)
    with pytest.raises(
        DataError, match=rf"{server.url}/shards.*\({attempts} of 3 attempts\): .*{message}"
    ):
        reader_of(there(prepared, server), tmp_path).read(3)
    assert len(server.requests) == attempts


def test_a_cache_that_cannot_be_written_is_explained(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be kept in.*data\.cache_dir"):
        reader_of(there(prepared, server), tmp_path / "file").read(3)


def test_a_server_without_ranges_is_asked_for_whole_shards(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl, through which WebDataset reads http, is not installed")

    def before(handler: Any, _: int) -> bool:
        del handler.headers["Range"]
        http.server.SimpleHTTPRequestHandler.do_GET(handler)
        return True

    server.before = before
    reader = reader_of(there(prepared, server), tmp_path)
    for block in (3, 4, 100):
        assert reader.read(block).key == block_key(block)
    assert sum(wanted is not None for wanted in server.requests) == 1


def test_the_next_windows_are_read_while_these_are_used_and_no_others(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    config, manifest = prepared
    plan = Plan.of(manifest, config.model_copy(update={"window_pairs": 256}), 1)
    opened: dict[int, list[int]] = {lane: [] for lane in range(4)}
    for batches in plan.steps(0, plan.steps_per_epoch):
        for batch in batches:
            if batch.window not in opened[batch.lane]:
                opened[batch.lane].append(batch.window)
    rows = [
        manifest.blocks[segment.block]
        for windows in opened.values()
        for window in windows[:2]
        for segment in plan.segments(window)
    ]
    expected = {f"bytes={row['offset']}-{row['offset'] + row['bytes'] - 1}" for row in rows}
    local = BatchSource(manifest, plan, BlockReader(manifest, ShardStore(manifest)))
    with Stream(
        there(prepared, server), plan, range(4), 0, prefetch_steps=1, cache_dir=tmp_path
    ) as stream:
        got = [next(stream)]
        deadline = time.monotonic() + 10
        while not set(server.requests) >= expected and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert set(server.requests) == expected
        got += [next(stream) for _ in range(plan.steps_per_epoch + 3)]
    for step, made in enumerate(got):
        assert contents(made.batches) == contents(local.step(step, range(4)).batches)


def drip(released: threading.Event) -> Callable[[Any, int], bool]:
    """Answers with a byte now and then."""

    def before(handler: Any, _: int) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not released.wait(0.02):
                handler.wfile.write(b"x")
        return True

    return before


def silence(released: threading.Event) -> Callable[[Any, int], bool]:
    return lambda *_: released.wait(20)


@pytest.mark.parametrize("badly", [drip, silence])
def test_closing_does_not_wait_for_a_server_that_answers_badly(
    prepared: Prepared,
    server: Server,
    tmp_path: Path,
    badly: Callable[[threading.Event], Callable[[Any, int], bool]],
) -> None:
    config, manifest = prepared
    released = threading.Event()
    server.before = badly(released)
    plan = Plan.of(manifest, config, 1)
    try:
        stream = Stream(
            there(prepared, server), plan, range(4), 0, prefetch_steps=1, cache_dir=tmp_path
        )
        deadline = time.monotonic() + 10
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.005)
        began = time.monotonic()
        stream.close()
        assert time.monotonic() - began < 2
    finally:
        released.set()


def test_a_dripping_server_is_given_up_and_the_request_with_it(
    prepared: Prepared, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges_module, "_SILENCE_S", 0.1)
    monkeypatch.setattr(ranges_module, "_SLOWEST_BYTES_PER_S", 1 << 30)
    released = threading.Event()
    server.before = drip(released)
    try:
        with pytest.raises(DataError, match=r"3 of 3 attempts\): .*(within|too slowly)"):
            reader_of(there(prepared, server), tmp_path).read(3)
        deadline = time.monotonic() + 5
        while requests_going_on() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not requests_going_on()
    finally:
        released.set()


def requests_going_on() -> bool:
    return any(thread.name == "babelray-range" for thread in threading.enumerate())


def test_a_closed_store_asks_for_nothing(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    manifest = there(prepared, server)
    store = ShardStore(manifest, tmp_path)
    store.close()
    with pytest.raises(Closed):
        BlockReader(manifest, store).read(3)
    assert not server.requests
