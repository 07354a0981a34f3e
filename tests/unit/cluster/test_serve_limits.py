"""How long, how often, from whom."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serve_limits import (
    Limits,
    TokenBuckets,
    client_of,
    digest,
    host_name,
    is_loopback,
    shows_token,
    split_lines,
)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("one", ["one"]),
        ("one\ntwo", ["one", "two"]),
        ("one\r\ntwo\rthree\u2028four\x85five", ["one", "two", "three", "four", "five"]),
        ("one\n\ntwo\n", ["one", "", "two"]),
        ("a\x00b\x1b[31mc\x7f\ufeff", ["a b [31mc  "]),
        ("tab\there", ["tab\there"]),
    ],
)
def test_text_becomes_lines_without_control_characters(text: str, lines: list[str]) -> None:
    assert split_lines(text) == lines


@given(st.text())
def test_a_line_holds_no_line_end_whatever_the_text(text: str) -> None:
    lines = split_lines(text)
    assert lines
    assert all(len(line.splitlines()) <= 1 for line in lines)


@given(st.text(max_size=200))
def test_no_text_within_the_limit_makes_too_long_a_request(text: str) -> None:
    request = json.dumps({"text": text, "num_best": 4, "attention": True})
    assert len(request.encode()) <= Limits(max_characters=max(1, len(text))).max_bytes


def test_the_token_is_known_again_and_no_other() -> None:
    kept = digest("geheim")
    assert b"geheim" not in kept
    assert shows_token("Bearer geheim", kept)
    assert shows_token("bearer geheim", kept)
    for wrong in (None, "", "geheim", "Bearer", "Bearer geheim2", "Basic geheim", "Bearer  x"):
        assert not shows_token(wrong, kept)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("LocalHost", "localhost"),
        ("[::1]:8000", "::1"),
        ("evil.example:8000", "evil.example"),
        ("", ""),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


def test_clients_are_told_apart() -> None:
    assert client_of("10.0.0.1") != client_of("10.0.0.2")
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1")
    assert client_of("2001:db8::1") != client_of("2001:db8:0:1::1")
    assert client_of("::ffff:10.0.0.1") == client_of("10.0.0.1")
    assert client_of("testclient") == "testclient"


def test_a_bucket_empties_and_fills() -> None:
    buckets = TokenBuckets(rate=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0, 0, 0, 20]
    assert buckets.take("b", 0.0) == 0
    assert buckets.take("a", 19.9) == 1
    assert buckets.take("a", 20.1) == 0
    assert buckets.take("a", 20.1) > 0
    assert [buckets.take("a", 10_000.0) for _ in range(4)] == [0, 0, 0, 20]  # never more than full


@given(st.integers(1, 100), st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=300))
def test_never_more_than_two_rates_in_any_minute(rate: int, pauses: list[float]) -> None:
    """A full bucket at once, and what flows in meanwhile."""
    buckets, now, taken = TokenBuckets(rate), 0.0, []
    for pause in pauses:
        now += pause
        if buckets.take("a", now) == 0:
            taken.append(now)
    for start in taken:
        assert sum(start <= moment < start + 60 for moment in taken) <= 2 * rate


def test_memory_is_bounded_and_who_is_out_of_requests_stays_so() -> None:
    buckets = TokenBuckets(rate=2)
    assert [buckets.take("greedy", 0.0) for _ in range(3)] == [0, 0, 30]
    for number in range(25_000):
        buckets.take(f"client {number}", 0.001)
    assert len(buckets._buckets) <= 10_000
    assert buckets.take("greedy", 0.001) > 0
