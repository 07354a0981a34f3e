from __future__ import annotations

import io
import os
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from cluster.lines import chunks


def _pipe():
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb", buffering=0), writing


@given(
    lines=st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    limit=st.integers(1, 7),
    is_ended=st.booleans(),
)
def test_every_line_once_and_in_order_however_they_come(tmp_path_factory, lines, limit, is_ended):
    raw = b"\n".join(lines) + (b"\n" if is_ended and lines else b"")
    expected = [line.removesuffix(b"\n") for line in io.BytesIO(raw)]
    file = tmp_path_factory.getbasetemp() / "lines"
    file.write_bytes(raw)
    with file.open("rb") as stream:
        of_file = list(chunks(stream, limit))
    stream, writing = _pipe()
    with stream:
        os.write(writing, raw)
        os.close(writing)
        of_pipe = list(chunks(stream, limit))
    for found in (of_file, of_pipe, list(chunks(io.BytesIO(raw), limit))):
        assert [line.removesuffix(b"\n") for chunk in found for line in chunk] == expected
        assert all(0 < len(chunk) <= limit for chunk in found)
    assert all(len(chunk) == limit for chunk in of_file[:-1])


def test_a_slow_pipe_is_answered_before_it_ends():
    stream, writing = _pipe()
    with stream:
        found = chunks(stream, 100)
        for text in (b"one\ntwo\nthr", b"ee\n", b"four\n"):
            os.write(writing, text)
            assert next(found) == text_lines(text)
        os.write(writing, b"five")
        os.close(writing)
        assert list(found) == [[b"five"]]


def text_lines(text):
    """What is complete after each of the writes above."""
    return {b"o": [b"one", b"two"], b"e": [b"three"], b"f": [b"four"]}[text[:1]]


def test_a_pipe_that_never_pauses_is_answered_too():
    stream, writing = _pipe()
    stop = threading.Event()

    def chatter():
        while not stop.wait(0.005):
            os.write(writing, b"line\n")
        os.close(writing)

    thread = threading.Thread(target=chatter)
    with stream:
        thread.start()
        try:
            began = time.monotonic()
            first = next(chunks(stream, 10**6))
            assert time.monotonic() - began < 5
            assert set(first) == {b"line"}
        finally:
            stop.set()
            thread.join()


def test_a_long_line_is_not_copied_at_each_read(tmp_path):
    file = tmp_path / "long"
    file.write_bytes(b"a" * 2**24 + b"\nb\n")
    with file.open("rb") as stream:
        began = time.process_time()
        [[long, short]] = chunks(stream, 10)
    assert (len(long), short) == (2**24, b"b")
    assert time.process_time() - began < 2
