"""The server's HTTP side: a page, a JSON endpoint, and the gate before both; knows nothing of Ray.

    GET  /            the page, with page.css, page.js and attention.js
    GET  /info        what the page has to know: run, languages, limits
    POST /translate   {"text", "num_best", "attention"} -> translation, alternatives, attention
    GET  /healthz     {"status": "ok"}
    GET  /openapi.json

Every error is {"error": message} with the status that fits.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serve_limits import (
    Limits,
    TokenBuckets,
    client_of,
    host_name,
    shows_token,
    split_lines,
)

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/attention.js": ("attention.js", "text/javascript; charset=utf-8"),
}

# What needs neither token nor allowance. Everything else does, for the router takes more spellings
# of a path than one.
_OPEN = frozenset({*_PAGE, "/healthz", "/openapi.json"})

_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

# A request may take so long to arrive.
_READ_S = 10.0

# One that is refused is read to its end, so that its sender hears why; but not for ever.
_DRAIN_S = 5.0
_DRAINED_BYTES = 16 * 1024**2

_MANY_LINES = 3


class Question(BaseModel):
    """What is asked of ``POST /translate``."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(description="what to translate; each line is a sentence of its own")
    num_best: int = Field(1, ge=1, description="alternatives of each line, best first")
    attention: bool = Field(False, description="whether the first line's attention is wanted")

    @field_validator("text")
    @classmethod
    def _is_unicode(cls, text: str) -> str:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("a lone surrogate is no character")
        return text


class Alternative(BaseModel):
    """One translation of a line."""

    text: str
    score: float = Field(description="what alternatives are ordered by, as evaluation.* says")
    log_prob: float = Field(description="natural logarithm of the probability")
    pieces: list[str]


class Line(BaseModel):
    """One line of the text."""

    source: str
    source_pieces: list[str]
    unknown_pieces: int = Field(description="source pieces that are not in the vocabulary")
    cut: bool = Field(description="whether it was longer than the model's longest sentence")
    alternatives: list[Alternative]


class Attention(BaseModel):
    """Weights of every layer and head, three decimals: [layer][head][query][key].

    The encoder's queries and keys are ``source``; the decoder's are ``inputs``; those of ``cross``
    ``inputs`` and ``source``. Row t of decoder and cross is what predicts ``outputs[t]``. A model
    without self-attention has ``cross`` only.
    """

    source: list[str]
    inputs: list[str]
    outputs: list[str]
    cross: list[list[list[list[float]]]]
    encoder: list[list[list[list[float]]]] | None = None
    decoder: list[list[list[list[float]]]] | None = None


class Answer(BaseModel):
    """What ``POST /translate`` gives."""

    translation: str
    lines: list[Line]
    attention: Attention | None = None
    notes: list[str] = Field(description="what a person should know about this answer")
    seconds: float = Field(description="from the request to the answer, waiting included")


class Busy(Exception):  # noqa: N818  (not an error of ours: there is too much to do)
    """The queue is full."""


@dataclass(frozen=True)
class Served:
    """What is served, for the page and for notes to the person who asks."""

    run: str
    checkpoint: str
    step: int
    source_language: str
    target_language: str
    max_num_best: int
    longest: int


class Translate(Protocol):
    """The model behind the endpoint: lines in, what is known of each out; ``Busy`` when it is."""

    def __call__(  # noqa: D102
        self, lines: Sequence[str], *, num_best: int, attention: bool
    ) -> Awaitable[tuple[list[Line], Attention | str | None]]: ...


def build_app(served: Served, limits: Limits, translate: Translate) -> tuple[FastAPI, Gate]:
    """The application, and the gate that every request to it passes.

    Args:
        translate: the attention is None where none was asked for, and a sentence where there is
            a reason not to give it.
    """
    app = FastAPI(title=f"babelray: {served.run}", docs_url=None, redoc_url=None)
    app.add_api_route("/healthz", _healthy, methods=["GET"])
    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, _static(name, kind), methods=["GET"], include_in_schema=False)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {
            "run": served.run,
            "checkpoint": served.checkpoint,
            "step": served.step,
            "source_language": served.source_language,
            "target_language": served.target_language,
            "max_characters": limits.max_characters,
            "max_num_best": served.max_num_best,
        }

    @app.post("/translate")
    async def answer(question: Question) -> Answer:
        started = time.perf_counter()
        if len(question.text) > limits.max_characters:
            raise HTTPException(413, _too_long(limits, len(question.text)))
        lines, attention = await translate(
            split_lines(question.text),
            num_best=min(question.num_best, served.max_num_best),
            attention=question.attention,
        )
        return Answer(
            translation="\n".join(line.alternatives[0].text for line in lines),
            lines=lines,
            attention=attention if isinstance(attention, Attention) else None,
            notes=_notes(served, question, lines, attention),
            seconds=round(time.perf_counter() - started, 4),
        )

    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(GZipMiddleware, minimum_size=2048, compresslevel=3)
    gate = Gate(limits)
    app.add_middleware(_Gated, gate=gate)
    return app, gate


class Gate:
    """What every request passes first: host, rate, token and length; and who is still inside."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.closing = False
        self.num_inside = 0
        self._buckets = TokenBuckets(limits.rate) if limits.rate else None

    def refusal(self, path: str, headers: Headers, client: str) -> Response | None:
        """The answer to a request that may not enter, by its head alone."""
        hosts = self.limits.hosts
        host = host_name(headers.get("host", ""))
        if hosts is not None and host not in hosts:
            return error(421, f"this server is not {host or 'nameless'}: call it by its address")
        if self.closing:
            return error(
                503, "the server is ending: ask again when it is back", {"retry-after": "5"}
            )
        if path in _OPEN:
            return None
        if self._buckets and (wait_s := self._buckets.take(client_of(client), time.monotonic())):
            return error(
                429,
                f"more than {self.limits.rate} requests a minute: wait {wait_s} s",
                {"retry-after": str(wait_s)},
            )
        token = self.limits.token
        if token is not None and not shows_token(headers.get("authorization"), token):
            return error(
                401,
                "this server wants its token: send the header Authorization: Bearer TOKEN",
                {"www-authenticate": "Bearer"},
            )
        return None


class _Gated:
    """ASGI middleware: the gate, the body within its limit, security headers on every answer."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        gate = self._gate
        client = (scope.get("client") or ("",))[0]
        refusal = gate.refusal(_path(scope), Headers(scope=scope), client)
        if refusal is not None:
            await _drain(receive, refusal)
            await refusal(scope, receive, send_headers)
            return
        gate.num_inside += 1
        try:
            body = await _read(receive, gate.limits)
            if isinstance(body, bytes):
                await self._app(scope, _replay(body, receive), send_headers)
            else:
                await body(scope, receive, send_headers)
        finally:
            gate.num_inside -= 1


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says what is wrong."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _read(receive: Receive, limits: Limits) -> bytes | Response:
    """The request's body, or the answer to one that is too long, too slow or broken off."""
    parts: list[bytes] = []
    length = 0
    try:
        async with asyncio.timeout(_READ_S):
            while length <= limits.max_bytes:
                message = await receive()
                if message["type"] != "http.request":
                    return error(400, "the request broke off")
                parts.append(message.get("body", b""))
                length += len(parts[-1])
                if not message.get("more_body"):
                    break
    except TimeoutError:
        return error(
            408,
            f"the request did not arrive within {_READ_S:g} s: send it again",
            {"connection": "close"},
        )
    if length <= limits.max_bytes:
        return b"".join(parts)
    refusal = error(413, _too_long(limits))
    if message.get("more_body"):
        await _drain(receive, refusal)
    return refusal


async def _drain(receive: Receive, refusal: Response) -> None:
    """Read a refused request to its end, or let the refusal end the connection."""
    length = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while length < _DRAINED_BYTES:
                message = await receive()
                length += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
    refusal.headers["connection"] = "close"


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _static(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (resources.files("cluster") / "page" / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind)

    return page


async def _healthy() -> dict[str, str]:
    return {"status": "ok"}


def _too_long(limits: Limits, length: int | None = None) -> str:
    given = f" ({length:,})" if length is not None else ""
    return (
        f"the text is too long{given}: at most {limits.max_characters:,} characters in one "
        "request; send it in parts"
    )


def _notes(
    served: Served, question: Question, lines: list[Line], attention: Attention | str | None
) -> list[str]:
    notes = []
    if question.num_best > served.max_num_best:
        notes.append(
            f"{question.num_best} alternatives were asked for; the search keeps "
            f"{served.max_num_best} (evaluation.beam)"
        )
    cut = [number for number, line in enumerate(lines, start=1) if line.cut]
    if cut:
        notes.append(
            f"{_listed(cut)} longer than the model's {served.longest} pieces: the rest was cut off"
        )
    strange = [
        number
        for number, line in enumerate(lines, start=1)
        if line.unknown_pieces and line.unknown_pieces * 2 >= len(line.source_pieces)
    ]
    if strange:
        notes.append(
            f"{_listed(strange)} mostly of characters that the model never saw (it knows "
            f"{served.source_language}): do not trust the translation"
        )
    if isinstance(attention, str):
        notes.append(attention)
    return notes


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MANY_LINES]))
    more = " and more" if len(numbers) > _MANY_LINES else ""
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown}{more} are"


async def _refused(request: Request, raised: Exception) -> Response:
    assert isinstance(raised, HTTPException)
    message = {
        400: "the request is not JSON in UTF-8",
        404: f"there is no {request.url.path} here: see /openapi.json",
        405: f"{request.method} does not fit {request.url.path}: see /openapi.json",
    }.get(raised.status_code, raised.detail)
    return error(raised.status_code, message, dict(raised.headers or {}))


async def _invalid(request: Request, raised: Exception) -> Response:
    assert isinstance(raised, RequestValidationError)
    problems = []
    for problem in raised.errors():
        if problem["type"] == "json_invalid":
            return error(400, f"the request is not JSON: {problem['ctx']['error']}")
        name = ".".join(str(part) for part in problem["loc"][1:])
        problems.append(
            f"{name}: {problem['msg'].removeprefix('Value error, ')}" if name else _NO_BODY
        )
    return error(422, "; ".join(problems))


_NO_BODY = (
    "send a JSON object with the header Content-Type: application/json, such as "
    + json.dumps({"text": "A dog runs."})
)


async def _busy(request: Request, raised: Exception) -> Response:
    return error(503, "too many requests are waiting: try again", {"retry-after": "1"})


async def _failed(request: Request, raised: Exception) -> Response:
    # Sent from outside the middleware that adds them to the others.
    return error(500, "the translation failed; the server's log says why", _SECURITY_HEADERS)
