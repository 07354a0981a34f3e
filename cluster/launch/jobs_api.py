"""Ray's Jobs API over HTTP: the few requests that a launch needs, with time limits and mends.

Ray's own client waits for ever on a host that drops packets, and lets RAY_ADDRESS override the
address that it is given, so that a recorded place could not be found again. The token for the
header comes from Ray's own loader.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
from requests.auth import AuthBase

from data_shards.errors import UserError

_CONNECT_S = 10.0
_ANSWER_S = 60.0
# A connection that no longer carries anything is found out after one and a half of these.
_HEARTBEAT_S = 40.0

# All that are alive: Ray tells of a hundred unless told otherwise, and of no more than these.
_NODES = (
    "/api/v0/nodes?detail=true&limit=10000"
    "&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
)

_HEADERS_VARIABLE = "RAY_JOB_HEADERS"
MEND_ACCESS = (
    "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH=FILE or ~/.ray/auth_token "
    "with the cluster's token (docs/ray-cluster.md)"
)


class NoAnswerError(UserError):
    """Nobody answers, or not with what was asked for; it may be different in a moment."""


class JobsApi:
    """The Jobs API at ``url``, as http://HOST:8265. Asks nothing before it is used.

    ``headers`` are sent with every request; by default what the environment says, with the token.
    Every method raises ``NoAnswerError`` if there is no answer, and ``UserError`` if the cluster
    refuses the token.
    """

    def __init__(self, url: str, *, headers: dict[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = headers

    @property
    def shown(self) -> str:
        """The URL without a password."""
        return without_password(self.url)

    @property
    def _bare(self) -> str:
        """The URL for requests, which carry its password in a header."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def version(self, *, timeout_s: float = _ANSWER_S) -> str:
        """The cluster's version of Ray.

        Raises:
            NoAnswerError: also where something else than Ray answers.
        """
        found = self._json("GET", "/api/version", timeout_s=timeout_s)
        if not isinstance(found, dict) or "ray_version" not in found:
            raise NoAnswerError(f"what answers at {self.shown} is no Ray dashboard: {_ADDRESS}")
        return str(found["ray_version"])

    def python_version(self) -> str | None:
        """The version of Python that the head runs, where the cluster tells it."""
        found = self._json("GET", "/api/v0/cluster_metadata")
        value = _dig(found, "data", "pythonVersion")
        return value if isinstance(value, str) else None

    def nodes(self) -> list[dict[str, Any]]:
        """The machines that are alive: ``node_ip``, ``is_head_node``, ``resources_total``."""
        found = _dig(self._json("GET", _NODES), "data", "result", "result")
        nodes = found if isinstance(found, list) else []
        return [node for node in nodes if node.get("state") == "ALIVE"]

    def interpreter(self) -> str | None:
        """The Python that runs the head's workers, where the cluster tells it.

        ``python`` need not be on the path of a Ray that was started from a virtual environment.
        """
        found = _dig(self._json("GET", "/nodes?view=summary"), "data", "summary")
        for node in found if isinstance(found, list) else []:
            if _dig(node, "raylet", "isHeadNode"):
                for word in node.get("cmdline") or ():
                    if word.startswith("--python_worker_command="):
                        return str(word.partition("=")[2].split()[0])
        return None

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that was submitted and is not forgotten, as Ray's JobDetails."""
        found = cast("list[dict[str, Any]]", self._json("GET", "/api/jobs/") or [])
        return [job for job in found if job.get("type") == "SUBMISSION"]

    def job(self, job: str, *, timeout_s: float = _ANSWER_S) -> dict[str, Any] | None:
        """One job's JobDetails; None if the cluster knows of none."""
        found = self._json("GET", f"/api/jobs/{job}", timeout_s=timeout_s)
        return cast("dict[str, Any] | None", found)

    def submit(self, request: dict[str, Any]) -> None:
        """Hand a job over; ``request`` is Ray's JobSubmitRequest."""
        if self._json("POST", "/api/jobs/", json=request) is None:
            raise NoAnswerError(f"{self.shown} takes no jobs (404): {_ADDRESS}")

    def stop(self, job: str) -> None:
        """End the job's command: SIGTERM, and SIGKILL three seconds later."""
        self._json("POST", f"/api/jobs/{job}/stop")

    def delete(self, job: str) -> None:
        """Forget a job that is over."""
        self._json("DELETE", f"/api/jobs/{job}")

    def logs(self, job: str) -> str:
        """All that the job has written so far."""
        return str(_dig(self._json("GET", f"/api/jobs/{job}/logs"), "logs") or "")

    def upload(self, uri: str, content: bytes) -> None:
        """Bring a package, gcs://NAME, to the cluster unless it is there."""
        path = f"/api/packages/{uri.replace('://', '/')}"
        if self._request("GET", path).status_code == 200:
            return
        answer = self._request("PUT", path, data=content)
        if answer.status_code != 200:
            raise NoAnswerError(f"{self.shown} took no upload: {_said(answer)}")

    def tail(self, job: str) -> Iterator[str]:
        """What the job writes, from its beginning until it is over, in pieces of any size.

        Raises:
            NoAnswerError: the connection was cut.
        """
        pieces = self._tail(job)

        async def receive() -> str | None:
            return await anext(pieces, None)

        # Leaving the block closes the connection, however the block is left.
        with asyncio.Runner() as runner:
            while (piece := runner.run(receive())) is not None:
                yield piece

    async def _tail(self, job: str) -> AsyncIterator[str]:
        import aiohttp

        url = f"{self._bare}/api/jobs/{job}/logs/tail"
        # The same proxy as for other requests; trust_env would bring .netrc as well.
        proxies = requests.utils.get_environ_proxies(url)
        proxy = requests.utils.select_proxy(url, proxies)
        try:
            async with (
                aiohttp.ClientSession(headers=self.headers()) as session,
                session.ws_connect(
                    url, proxy=proxy, heartbeat=_HEARTBEAT_S, max_msg_size=0
                ) as socket,
            ):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield str(message.data)
                if socket.close_code != aiohttp.WSCloseCode.OK:
                    raise NoAnswerError(f"the connection to {self.shown} was cut")
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswerError(f"no log from {self.shown} ({_reason(error)})") from None

    def headers(self) -> dict[str, str]:
        """The token's header, what RAY_JOB_HEADERS holds for a proxy, or the URL's password.

        Raises:
            UserError: a token is asked for and there is none, or the variable is no JSON object.
        """
        if self._headers is None:
            self._headers = _url_header(self.url) | _given_headers() | token_header()
        return self._headers

    def _json(self, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON; None for 404."""
        answer = self._request(method, path, **options)
        if answer.status_code == 404:
            return None
        if not answer.ok:
            raise NoAnswerError(f"{self.shown} answers {_said(answer)}")
        try:
            return answer.json()
        except requests.exceptions.JSONDecodeError:
            raise NoAnswerError(
                f"what answers at {self.shown} is no Ray dashboard: {_ADDRESS}"
            ) from None

    def _request(
        self, method: str, path: str, *, timeout_s: float = _ANSWER_S, **options: Any
    ) -> requests.Response:
        try:
            answer = requests.request(
                method,
                self._bare + path,
                headers=self.headers(),
                auth=AS_GIVEN,
                timeout=(min(_CONNECT_S, timeout_s), timeout_s),
                **options,
            )
        except requests.RequestException as error:
            raise NoAnswerError(
                f"no Ray Jobs API answers at {self.shown} ({_reason(error)}): {_ADDRESS}"
            ) from None
        if answer.status_code == 401:
            raise UserError(f"the Ray cluster at {self.shown} asks for a token: {MEND_ACCESS}")
        if answer.status_code == 403:
            raise UserError(
                f"the Ray cluster at {self.shown} refuses the token that was given: {MEND_ACCESS}"
            )
        return answer


_ADDRESS = (
    "RAY_ADDRESS must be the head's dashboard, http://HOST:8265, or its own address, HOST:6379, "
    "and reachable from here (docs/ray-cluster.md)"
)


def without_password(address: str) -> str:
    """An address fit to be shown, also one that is no URL."""
    return re.sub(r"^([a-z][a-z0-9+.-]*://)?.*@", r"\1", address)


def token_problem(error: BaseException) -> UserError | None:
    """A refusal of the token by Ray's own connections, as our error; None for another error."""
    text = f"{type(error).__name__} {error}"
    if re.search(r"authenticat|unauthori[sz]ed", text, re.IGNORECASE):
        return UserError(f"the Ray cluster asks for a token, or another one: {MEND_ACCESS}")
    return None


class _AsGiven(AuthBase):
    """Leaves the headers as they are: without it, .netrc takes the token's place."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


AS_GIVEN = _AsGiven()


def token_header() -> dict[str, str]:
    """The header with the cluster's token, from where Ray itself takes it; empty without one.

    Raises:
        UserError: RAY_AUTH_MODE asks for a token, and there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() in {"", "disabled"}:
        return {}  # and nobody waits for Ray's import
    # Ray is pinned to one version; there is no public name for it.
    from ray._private.authentication.http_token_authentication import (
        get_auth_headers_if_auth_enabled,
    )
    from ray.exceptions import AuthenticationError

    try:
        return dict(get_auth_headers_if_auth_enabled({}))
    except AuthenticationError:
        raise UserError(f"RAY_AUTH_MODE=token, but there is no token: {MEND_ACCESS}") from None


def _url_header(url: str) -> dict[str, str]:
    """Of a proxy in front of the cluster that wants a password: http://USER:PASSWORD@HOST."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _given_headers() -> dict[str, str]:
    text = os.environ.get(_HEADERS_VARIABLE, "")
    if not text:
        return {}
    try:
        found = json.loads(text)
        return {str(name): str(value) for name, value in found.items()}
    except (ValueError, AttributeError):
        raise UserError(
            f'{_HEADERS_VARIABLE} must be a JSON object, such as {{"X-Name": "value"}}'
        ) from None


def _dig(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _said(answer: requests.Response) -> str:
    """An error's status and the last line of its text, which is the error of a traceback."""
    lines = answer.text.strip().splitlines()
    return f"{answer.status_code} {answer.reason}" + (f": {lines[-1][:300]}" if lines else "")


def _reason(error: BaseException) -> str:
    """The heart of an error that others have wrapped many times."""
    text = str(error)
    if isinstance(error, requests.Timeout) or "timed out" in text:
        return "it does not answer in time"
    found = re.search(r"\[Errno -?\d+\] ([^\"')\]]+)", text)
    return found[1].strip() if found else text.partition("\n")[0][:200]
