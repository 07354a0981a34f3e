"""The stream against a plain reading of the shards, through stops, sizes and damage."""

from __future__ import annotations

import gc
import http.server
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards import reader as reader_module
from data_shards.blocks import Block, block_key, encode_block
from data_shards.config import BOS_ID, EOS_ID, PAD_ID, DataConfig
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.plan import Plan, lanes_of_rank
from data_shards.ranges import Closed
from data_shards.reader import BlockReader
from data_shards.shards import prepare
from data_shards.store import ShardStore, copy_id
from data_shards.stream import BatchSource, Stream

Prepared = tuple[DataConfig, Manifest]
MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def _no_thread_stays_behind() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("babelray")] == []


@pytest.fixture
def damaged(prepared: Prepared, tmp_path: Path) -> Manifest:
    """A copy of the prepared corpus that a test may spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared[1].folder, folder)
    return Manifest.load(folder)


def plan_of(manifest: Manifest, config: DataConfig, seed: int = 1, **changes: Any) -> Plan:
    return Plan.of(manifest, config.model_copy(update=changes), seed)


def plain_pairs(manifest: Manifest) -> list[tuple[list[int], list[int]]]:
    """All pairs by id, read with nothing but the standard library and numpy."""
    members: dict[str, Any] = {}
    for shard in range(len(manifest.data.shards)):
        with tarfile.open(manifest.shard_path(shard)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = np.load(BytesIO(file.read())).tolist()
    pairs = []
    for block in range(len(manifest.blocks)):
        source = iter(members[f"{block:09d}.source.npy"])
        target = iter(members[f"{block:09d}.target.npy"])
        for num_source, num_target in members[f"{block:09d}.lengths.npy"]:
            pairs.append(
                (
                    [next(source) for _ in range(num_source)],
                    [next(target) for _ in range(num_target)],
                )
            )
    return pairs


def padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [PAD_ID] * (width - len(row)) for row in rows]


def test_tensors_equal_the_sequential_reading(prepared: Prepared) -> None:
    config, manifest = prepared
    pairs = plain_pairs(manifest)
    plan = plan_of(manifest, config)
    assert int(manifest.blocks["num_pairs"].sum()) == len(pairs)
    steps = range(plan.steps_per_epoch - 5, plan.steps_per_epoch + 5)  # across an epoch's end
    with Stream(manifest, plan, range(plan.lanes), steps[0], prefetch_steps=2) as stream:
        for step, got in zip(steps, stream, strict=False):
            assert got.step == step
            planned = plan.step(step)
            assert [batch.lane for batch in got.batches] == [batch.lane for batch in planned]
            for batch, expected in zip(got.batches, planned, strict=True):
                sources, targets = zip(*(pairs[i] for i in expected.pair_ids), strict=True)
                assert all(ids[-1] == EOS_ID for ids in (*sources, *targets))
                assert batch.source_BS.tolist() == padded(list(sources))
                assert batch.target_out_BT.tolist() == padded(list(targets))
                assert batch.target_in_BT.tolist() == padded([[BOS_ID, *t[:-1]] for t in targets])
                tensors = (batch.source_BS, batch.target_in_BT, batch.target_out_BT)
                assert {tensor.dtype for tensor in tensors} == {torch.int64}
                assert all(tensor.is_contiguous() for tensor in tensors)
                assert batch.num_pairs == len(sources)
                assert batch.num_source_tokens == sum(map(len, sources))
                assert batch.num_target_tokens == int((batch.target_out_BT != PAD_ID).sum())


def fingerprints(batches: list[Any]) -> dict[int, tuple[int, int, int]]:
    """What identifies each lane's tensors."""
    return {
        b.lane: (
            b.data_hash,
            hash(b.source_BS.numpy().tobytes()),
            hash(b.target_in_BT.numpy().tobytes()),
        )
        for b in batches
    }


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_schedule_of_stops_and_sizes_trains_on_the_same(
    prepared: Prepared, data: st.DataObject
) -> None:
    config, manifest = prepared
    lanes = data.draw(st.sampled_from([1, 3, 4]), "lanes")
    tokens = lanes * data.draw(st.integers(300, 900), "tokens a lane")
    window = data.draw(st.sampled_from([64, 300, 5000]), "window")
    plan = plan_of(manifest, config, lanes=lanes, tokens_per_step=tokens, window_pairs=window)
    end = plan.steps_per_epoch + 3
    source = BatchSource(manifest, plan, BlockReader(manifest, ShardStore(manifest)))
    sequence = [fingerprints(source.step(step, range(lanes)).batches) for step in range(end)]

    step, rolling = 0, 0
    seen: Counter[int] = Counter()
    stops = data.draw(st.sets(st.integers(1, end - 1), max_size=3), "stops")
    for stop in sorted({*stops, end}):
        world_size = data.draw(st.integers(1, lanes), "world size")
        prefetch = data.draw(st.integers(1, 4), "prefetch")
        merged: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(step, stop)]
        for rank in range(world_size):
            mine = lanes_of_rank(rank, world_size, lanes)
            with Stream(manifest, plan, mine, step, prefetch_steps=prefetch) as stream:
                for found, got in zip(merged, stream, strict=False):
                    found |= fingerprints(got.batches)
                    rolling += sum(batch.data_hash for batch in got.batches)
        assert merged == sequence[step:stop]
        step = stop
    for at in range(plan.steps_per_epoch):
        seen.update(pair for batch in plan.step(at) for pair in batch.pair_ids.tolist())
    assert seen == dict.fromkeys(range(manifest.num_pairs), 1)
    assert rolling & MASK == sum(plan.data_hash(at) for at in range(end)) & MASK


def test_multi30k_is_padded_little_and_streamed_whole(multi30k: Path, tmp_path: Path) -> None:
    config = DataConfig(
        corpus="multi30k", mirror=str(multi30k), vocabulary_size=2000, root=tmp_path, lanes=8,
        tokens_per_step=4096, vocabulary_sample=5000,
    )  # fmt: skip
    manifest = Manifest.load(prepare(config))
    for lanes in (2, 4, 8):
        plan = plan_of(manifest, config, lanes=lanes)
        real = computed = num_pairs = 0
        with Stream(manifest, plan, range(lanes), 0, prefetch_steps=8) as stream:
            for _ in range(plan.steps_per_epoch):
                for batch in next(stream).batches:
                    real += batch.num_source_tokens + batch.num_target_tokens
                    computed += batch.source_BS.numel() + batch.target_in_BT.numel()
                    num_pairs += batch.num_pairs
                    assert max(batch.source_BS.numel(), batch.target_in_BT.numel()) <= 4096 / lanes
        assert num_pairs == manifest.num_pairs
        assert real == manifest.data.source_tokens + manifest.data.target_tokens
        assert real / computed >= 0.95


# Threads.


def test_prefetch_is_bounded(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    config, manifest = prepared
    made: list[int] = []
    plain = BatchSource.step

    def counted(self: BatchSource, step: int, lanes: Any) -> Any:
        made.append(step)
        return plain(self, step, lanes)

    monkeypatch.setattr(BatchSource, "step", counted)
    with Stream(manifest, plan_of(manifest, config), [0], 7, prefetch_steps=3) as stream:
        assert next(stream).step == 7
        wait_until(lambda: len(made) == 5)  # one taken, three ready, one waiting to be put
        time.sleep(0.05)
        assert made == [7, 8, 9, 10, 11]


def test_close_is_prompt_and_ends_the_iteration(prepared: Prepared) -> None:
    config, manifest = prepared
    stream = Stream(manifest, plan_of(manifest, config), [0], 0, prefetch_steps=1)
    next(stream)
    began = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - began < 5
    with pytest.raises(StopIteration):
        next(stream)


def test_a_forgotten_stream_is_closed_when_collected(prepared: Prepared) -> None:
    config, manifest = prepared
    stream = Stream(manifest, plan_of(manifest, config), [0], 0, prefetch_steps=1)
    next(stream)
    del stream
    gc.collect()  # the autouse fixture then looks for the thread


def test_a_bug_in_the_thread_reaches_the_consumer(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, manifest = prepared

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(BlockReader, "read", broken)
    with Stream(manifest, plan_of(manifest, config), [0], 0, prefetch_steps=4) as stream:
        for _ in range(2):  # and again, if asked again
            with pytest.raises(ZeroDivisionError):
                next(stream)


# Damage.


def steps_until_error(manifest: Manifest, config: DataConfig, **changes: Any) -> tuple[int, str]:
    """How many good steps came, and the error's message."""
    plan = plan_of(manifest, config, **changes)
    with Stream(manifest, plan, range(plan.lanes), 0, prefetch_steps=2) as stream:
        for count in range(plan.steps_per_epoch):
            try:
                next(stream)
            except DataError as error:
                return count, str(error)
    pytest.fail("the whole epoch was read")


def test_a_missing_shard_is_named(damaged: Manifest, prepared: Prepared) -> None:
    shard = Path(damaged.shard_path(1))
    shard.unlink()
    _, message = steps_until_error(damaged, prepared[0])
    assert f"shard {shard}, block" in message
    assert "missing" in message
    assert f"babelray data verify {damaged.folder}" in message


def test_a_cut_shard_is_named_with_what_was_expected(damaged: Manifest, prepared: Prepared) -> None:
    shard = Path(damaged.shard_path(0))
    block = damaged.blocks[0]
    os.truncate(shard, int(block["bytes"]) - 100)
    _, message = steps_until_error(damaged, prepared[0])
    assert f"shard {shard}, block" in message
    assert "expected bytes" in message
    assert "the file ends" in message


def test_an_altered_block_stops_the_step_that_needs_it_and_none_before(
    damaged: Manifest, prepared: Prepared
) -> None:
    config = prepared[0]
    plan = plan_of(damaged, config, lanes=2)
    # A block of a window that lane 0 opens in the middle of the epoch.
    windows = [b.window for step in plan.steps(0, plan.steps_per_epoch, [0]) for b in step]
    assert len(set(windows)) > 1
    bad_window = windows[-1]
    spoilt = plan.segments(bad_window)[1].block
    row = damaged.blocks[spoilt]
    shard = Path(damaged.shard_path(int(row["shard"])))
    with shard.open("r+b") as file:
        file.seek(int(row["offset"]) + 600)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    good = next(
        step
        for step in range(plan.steps_per_epoch)
        if any(
            spoilt in {segment.block for segment in plan.segments(batch.window)}
            for batch in plan.step(step)
        )
    )
    assert good > 0
    count, message = steps_until_error(damaged, config, lanes=2)
    assert count == good
    assert f"shard {shard}, block {spoilt}: expected sha256 {row['sha256'].decode()}" in message


def rewrite_block(manifest: Manifest, index: int, content: bytes) -> Manifest:
    """The corpus with other bytes as a block, and an index that agrees with them."""
    import hashlib

    path = Path(manifest.shard_path(0))
    blocks = np.array(manifest.blocks)
    path.write_bytes(path.read_bytes() + content)
    row = blocks[index : index + 1]
    row["shard"], row["offset"], row["bytes"] = 0, path.stat().st_size - len(content), len(content)
    row["sha256"] = hashlib.sha256(content).hexdigest().encode()
    return replace(manifest, blocks=blocks)


def read_block(manifest: Manifest, index: int) -> Block:
    return BlockReader(manifest, ShardStore(manifest)).read(index)


def test_a_block_that_is_not_the_one_wanted_is_refused(damaged: Manifest) -> None:
    block = read_block(damaged, 3)
    assert block.key == block_key(3)
    cases = {
        "expected key 000000003, found 000000004": encode_block(replace(block, key=block_key(4))),
        "index's sentence lengths": encode_block(replace(block, lengths=block.lengths[::-1] + 1)),
        "ids a side": encode_block(replace(block, source_ids=block.source_ids[1:])),
        "expected one sample": encode_block(block) + encode_block(replace(block, key="000000009")),
        "WebDataset sample": b"x" * 1024,
    }
    for message, content in cases.items():
        with pytest.raises(DataError, match=f"block 3: .*{message}"):
            read_block(rewrite_block(damaged, 3, content), 3)


def test_errors_of_a_network_file_system_are_retried(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepared[1]
    monkeypatch.setattr(reader_module, "_WAITS_S", (0.0, 0.0))
    failures = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]
    plain = Path.open

    def flaky(self: Path, *args: Any, **options: Any) -> Any:
        if self.suffix == ".tar" and failures:
            raise failures.pop()
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", flaky)
    assert read_block(manifest, 0).key == block_key(0)
    assert failures == []
    failures += [OSError(5, "Input/output error")] * 3
    with pytest.raises(DataError, match="block 0: cannot be read: Input/output error"):
        read_block(manifest, 0)


# Remote shards.


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; ``spoil`` may answer a request in its stead, given how many came before."""

    def __init__(self, folder: Path) -> None:
        handler = partial(_Handler, directory=str(folder))
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: Counter[str] = Counter()
        self.spoil: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        count = self.server.requests[self.path]
        self.server.requests[self.path] += 1
        if self.server.spoil is None or not self.server.spoil(self, count):
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class RemoteManifest(Manifest):
    """A manifest whose shards lie on a server."""

    url: str

    def shard_path(self, shard: int) -> str:
        return f"{self.url}/{self.data.shards[shard].file}"


@pytest.fixture
def server(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if shutil.which("curl") is None:
        pytest.skip("curl, through which WebDataset reads http, is not installed")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(prepared[1].folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(manifest: Manifest, url: str) -> Manifest:
    copy = RemoteManifest(**{name: getattr(manifest, name) for name in Manifest.__annotations__})
    object.__setattr__(copy, "url", url)
    return copy


def test_remote_shards_are_fetched_once_and_give_the_same(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    config, manifest = prepared
    plan = plan_of(manifest, config)
    there = remote(manifest, server.url)
    local = BatchSource(manifest, plan, BlockReader(manifest, ShardStore(manifest)))
    for _ in range(2):  # the second stream finds all in the cache
        with Stream(there, plan, [0, 1], 5, prefetch_steps=2, cache_dir=tmp_path) as stream:
            for step in range(5, 30):
                expected = local.step(step, [0, 1]).batches
                assert fingerprints(next(stream).batches) == fingerprints(expected)
    assert set(server.requests.values()) == {1}
    assert len(server.requests) == len(manifest.data.shards)
    assert not list(tmp_path.glob("*.part"))


def test_processes_on_a_machine_fetch_a_shard_once(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    there = remote(prepared[1], server.url)
    server.spoil = lambda *_: time.sleep(0.1)
    paths: list[Path] = []
    stores = [ShardStore(there, tmp_path) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda store=store: paths.append(store.path(0))) for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert sum(server.requests.values()) == 1


def send(handler: Any, content: bytes, announced: int | None = None) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(content)
    return True


def test_a_broken_transfer_is_tried_again(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    manifest = prepared[1]
    whole = Path(manifest.shard_path(0)).read_bytes()

    def spoil(handler: Any, count: int) -> bool:
        if count == 0:
            return send(handler, whole[:5000], announced=len(whole))  # breaks off
        if count == 1:
            return send(handler, whole[:5000])  # a shorter file
        if count == 2:
            return send(handler, whole[:-1] + b"x")  # another file
        return False

    server.spoil = spoil
    store = ShardStore(remote(manifest, server.url), tmp_path, backoff_s=0.01)
    assert store.path(0).read_bytes() == whole
    assert sum(server.requests.values()) == 4


def test_a_shard_that_stays_wrong_is_named(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    manifest = prepared[1]
    whole = Path(manifest.shard_path(0)).read_bytes()
    server.spoil = lambda handler, _: send(handler, whole[:-1] + b"x")
    store = ShardStore(remote(manifest, server.url), tmp_path, attempts=3, backoff_s=0.01)
    digest = manifest.data.shards[0].sha256
    with pytest.raises(DataError, match=rf"{server.url}.*3 of 3 .*expected sha256 {digest}, found"):
        store.path(0)
    assert sum(server.requests.values()) == 3
    assert not list(tmp_path.glob("*.tar"))


def test_a_shard_that_is_not_there_is_not_asked_for_again(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    store = ShardStore(remote(prepared[1], f"{server.url}/nowhere"), tmp_path)
    with pytest.raises(DataError, match=r"nowhere/shards.*1 of 5 attempts.*it is not there"):
        store.ensure([0])
    assert sum(server.requests.values()) == 1


def test_an_unknown_scheme_and_a_full_cache_are_explained(
    prepared: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"carrier://x/shards.*no gopen handler"):
        ShardStore(remote(prepared[1], "carrier://x"), tmp_path).path(0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be kept in.*data\.cache_dir"):
        ShardStore(remote(prepared[1], "http://127.0.0.1:9"), tmp_path / "file").path(0)


def test_a_damaged_cached_copy_is_fetched_again(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    there = remote(prepared[1], server.url)
    store = ShardStore(there, tmp_path)
    path = store.path(0)
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert BlockReader(there, store).read(0).key == block_key(0)
    assert sum(server.requests.values()) == 2


def test_a_copy_that_took_the_place_of_a_damaged_one_is_left(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    store = ShardStore(remote(prepared[1], server.url), tmp_path)
    path = store.path(0)
    read = copy_id(path.stat())
    draft = tmp_path / "another reader's"
    draft.write_bytes(path.read_bytes())
    draft.replace(path)
    store.discard(0, read)
    assert path.exists()
    store.discard(0, copy_id(path.stat()))
    assert not path.exists()
    store.discard(0, read)  # another reader has discarded it, and not yet fetched


def test_parts_are_dropped_when_the_whole_is_here(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    store = ShardStore(remote(prepared[1], server.url), tmp_path)
    parts = tmp_path / f"{store.path(0).name}.blocks"
    store.discard(0, copy_id(store.path(0).stat()))
    parts.touch()
    store.path(0)
    assert not parts.exists()


def test_closing_does_not_wait_for_a_transfer(
    prepared: Prepared, server: Server, tmp_path: Path
) -> None:
    config, manifest = prepared
    released = threading.Event()

    def stall(handler: Any, _: int) -> bool:
        send(handler, b"x" * 100, announced=1000)
        handler.wfile.flush()
        return released.wait(20)

    server.spoil = stall
    there = remote(manifest, server.url)
    stream = Stream(there, plan_of(manifest, config), [0], 0, prefetch_steps=1, cache_dir=tmp_path)
    wait_until(lambda: sum(server.requests.values()) > 0)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    released.set()


def test_a_closed_store_fetches_nothing(prepared: Prepared, server: Server, tmp_path: Path) -> None:
    store = ShardStore(remote(prepared[1], server.url), tmp_path)
    store.close()
    with pytest.raises(Closed):
        store.path(0)


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
