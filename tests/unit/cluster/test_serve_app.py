"""The HTTP side without Ray and without a model: every answer, good and bad."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.serve_app import Alternative, Attention, Busy, Gate, Line, Served, build_app
from cluster.serve_limits import Limits, digest


class BrokenModel(Exception):
    pass


SERVED = Served("demo", "best", 40, "en", "de", max_num_best=4, longest=23)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def shout(
    lines: Sequence[str], *, num_best: int, attention: bool
) -> tuple[list[Line], Attention | str | None]:
    """A model that only knows capital letters."""
    if "busy" in lines:
        raise Busy
    if "broken" in lines:
        raise BrokenModel("secret detail")
    described = [
        Line(
            source=line,
            source_pieces=line.split(),
            unknown_pieces=line.count("你"),
            cut=len(line.split()) > SERVED.longest,
            alternatives=[
                Alternative(text=line.upper(), score=-n, log_prob=-n, pieces=line.upper().split())
                for n in range(num_best)
            ],
        )
        for line in lines
    ]
    return described, "too long to show" if attention else None


class Server:
    def __init__(self, **limits: Any) -> None:
        self.app, self.gate = build_app(SERVED, Limits(**{"max_characters": 50, **limits}), shout)

    def ask(
        self,
        path: str = "/translate",
        body: bytes | object = b"",
        *,
        method: str = "POST",
        client: str = "10.0.0.1",
        is_stuck: bool = False,
        **headers: str,
    ) -> Reply:
        """The answer; a stuck request's second half never arrives."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"host": "127.0.0.1:8000", "content-type": "application/json", **given}
        return asyncio.run(request(self.app, method, path, raw, client, sent, is_stuck))


async def request(
    app: Any,
    method: str,
    path: str,
    body: bytes,
    client: str,
    headers: dict[str, str],
    is_stuck: bool,
) -> Reply:
    half = len(body) // 2
    parts = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
    ]
    if is_stuck:
        parts.pop()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()  # a connection that is kept open
        return parts.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
        "scheme": "http", "query_string": b"", "http_version": "1.1", "client": (client, 1),
        "server": ("127.0.0.1", 8000),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    with suppress(BrokenModel):  # raised again for the log, after the answer
        await app(scope, receive, send)
    return Reply(
        sent[0]["status"],
        {name.decode(): value.decode() for name, value in sent[0]["headers"]},
        b"".join(message.get("body", b"") for message in sent[1:]),
    )


def test_a_sentence() -> None:
    reply = Server().ask(body={"text": "a dog\nruns", "num_best": 2})
    assert reply.status == 200
    answer = reply.json
    assert answer["translation"] == "A DOG\nRUNS"
    assert [line["source"] for line in answer["lines"]] == ["a dog", "runs"]
    assert len(answer["lines"][0]["alternatives"]) == 2
    assert answer["attention"] is None
    assert answer["notes"] == []
    assert answer["seconds"] >= 0


def test_nothing_gives_nothing() -> None:
    assert Server().ask(body={"text": ""}).json["translation"] == ""


def test_what_a_person_should_know_is_noted() -> None:
    text = "你 你\n" + "a " * 24
    reply = Server(max_characters=100).ask(body={"text": text, "num_best": 9, "attention": True})
    notes = reply.json["notes"]
    assert [len(line["alternatives"]) for line in reply.json["lines"]] == [4, 4]
    assert "9 alternatives" in notes[0]
    assert "line 2 is longer than the model's 23 pieces" in notes[1]
    assert "line 1 is mostly of characters that the model never saw" in notes[2]
    assert notes[3] == "too long to show"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (b"", 422, "Content-Type: application/json"),
        (b"[]", 422, "send a JSON object"),
        (b"{", 400, "not JSON"),
        (b'{"text": "\xff"}', 400, "UTF-8"),
        (b'{"text": "\\ud800"}', 422, "lone surrogate"),
        ({}, 422, "text: Field required"),
        ({"text": 1}, 422, "text: Input should be a valid string"),
        ({"text": None}, 422, "text:"),
        ({"text": "a", "num_best": 0}, 422, "num_best:"),
        ({"text": "a", "attention": "maybe"}, 422, "attention:"),
        ({"text": "a", "beam": 4}, 422, "beam: Extra inputs"),
        ({"text": "a" * 51}, 413, "too long (51): at most 50 characters"),
        ({"text": "a" * 100_000}, 413, "at most 50 characters"),
        (b"[" * 1500, 400, "JSON"),
        ({"text": "busy"}, 503, "try again"),
        ({"text": "broken"}, 500, "failed"),
    ],
)
def test_one_form_for_every_error(body: bytes | object, status: int, part: str) -> None:
    reply = Server().ask(body=body)
    assert reply.status == status
    assert list(reply.json) == ["error"]
    assert part in reply.json["error"]
    assert "secret" not in reply.json["error"]
    assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"text": "a"}, {"authorization": "Bearer geheim"}, 408),
        ({"text": "a"}, {}, 401),
        ({"text": "a" * 100_000}, {"authorization": "Bearer geheim"}, 413),
    ],
)
def test_a_request_that_never_ends_is_not_waited_for(
    body: object, headers: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("_READ_S", "_DRAIN_S"):
        monkeypatch.setattr(f"cluster.serve_app.{limit}", 0.05)
    server = Server(token=digest("geheim"))
    reply = server.ask(body=body, is_stuck=True, **headers)
    assert (reply.status, list(reply.json)) == (status, ["error"])
    assert reply.headers["connection"] == "close"
    assert "connection" not in server.ask(body={"text": "a"}).headers
    assert server.gate.num_inside == 0


def test_plain_text_is_not_taken_for_json() -> None:
    """Else any page in the browser could post here without asking first."""
    reply = Server().ask(body={"text": "a"}, content_type="text/plain")
    assert reply.status == 422
    assert "application/json" in reply.json["error"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nix", 404), ("PUT", "/", 405)])
def test_other_paths_and_methods(method: str, path: str, status: int) -> None:
    reply = Server().ask(path, method=method)
    assert reply.status == status
    assert "openapi.json" in reply.json["error"]


def test_a_busy_server_says_when_to_come_back() -> None:
    assert Server().ask(body={"text": "busy"}).headers["retry-after"] == "1"


def test_the_token() -> None:
    server = Server(token=digest("geheim"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic geheim"}):
        for path, method in (("/translate", "POST"), ("/info", "GET")):
            reply = server.ask(path, {"text": "a"}, method=method, **headers)
            assert (reply.status, list(reply.json)) == (401, ["error"])
            assert reply.headers["www-authenticate"] == "Bearer"
    assert server.ask(body={"text": "a"}, authorization="Bearer geheim").status == 200
    # The page itself asks for the token.
    assert server.ask("/", method="GET").status == 200
    assert server.ask("/healthz", method="GET").json == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "method"), [("/translate\n", "POST"), ("/info\n", "GET"), ("/nix", "GET")]
)
def test_no_spelling_of_a_path_gets_round_token_and_rate(path: str, method: str) -> None:
    server = Server(rate=2, token=digest("geheim"))
    asked = [server.ask(path, {"text": "a"}, method=method) for _ in range(3)]
    assert [reply.status for reply in asked] == [401, 401, 429]


def test_the_rate_is_each_clients_own() -> None:
    server = Server(rate=2)
    asked = [server.ask(body={"text": "a"}) for _ in range(3)]
    assert [reply.status for reply in asked] == [200, 200, 429]
    assert 1 <= int(asked[2].headers["retry-after"]) <= 30
    assert server.ask(body={"text": "a"}, client="10.0.0.2").status == 200
    assert server.ask("/healthz", method="GET").status == 200


def test_guessing_tokens_is_limited_as_well() -> None:
    server = Server(rate=2, token=digest("geheim"))
    asked = [server.ask("/info", method="GET", authorization=f"Bearer {n}") for n in range(3)]
    assert [reply.status for reply in asked] == [401, 401, 429]


def test_another_name_for_this_machine_is_refused() -> None:
    server = Server(hosts=frozenset({"localhost", "127.0.0.1"}))
    assert server.ask("/", method="GET", host="localhost:1234").status == 200
    for path in ("/", "/info", "/healthz"):
        assert server.ask(path, method="GET", host="evil.example").status == 421


def test_an_ending_server_lets_nobody_in() -> None:
    server = Server()
    server.gate.closing = True
    reply = server.ask("/healthz", method="GET")
    assert reply.status == 503
    assert "retry-after" in reply.headers


def test_those_inside_are_counted() -> None:
    server = Server()
    inside = []

    async def count(*arguments: Any, **options: Any) -> tuple[list[Line], None]:
        inside.append(gate.num_inside)
        return [
            Line(source="", source_pieces=[], unknown_pieces=0, cut=False, alternatives=[
                Alternative(text="", score=0, log_prob=0, pieces=[])
            ])
        ], None  # fmt: skip

    gate: Gate
    server.app, gate = build_app(SERVED, Limits(max_characters=50), count)
    assert server.ask(body={"text": "a"}).status == 200
    assert server.ask(body=b"{").status == 400
    assert (inside, gate.num_inside) == ([1], 0)


def test_the_page_asks_nobody_else_and_nobody_may_frame_it() -> None:
    server = Server()
    for path, kind in (
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/attention.js", "text/javascript"),
    ):
        reply = server.ask(path, method="GET", accept_encoding="identity")
        assert reply.status == 200
        assert reply.headers["content-type"].startswith(kind)
        assert b"http://" not in reply.body
        assert b"https://" not in reply.body
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "access-control-allow-origin" not in reply.headers
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_interface_is_described() -> None:
    described = Server().ask("/openapi.json", method="GET", accept_encoding="identity").json
    assert set(described["paths"]) == {"/healthz", "/info", "/translate"}
