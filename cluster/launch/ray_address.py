"""Which Ray cluster is meant, as the address of its Jobs API."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit

from cluster.launch.jobs_api import JobsApi, NoAnswerError, token_problem, without_password
from data_shards.errors import UserError

# Ray's own order.
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_KNOCK_S = 5.0
_ASK_S = 15.0
_FORWARD = (
    "start the head with --dashboard-host=0.0.0.0, or forward the port (ssh -L "
    "8265:127.0.0.1:8265 HOST) and set RAY_ADDRESS=http://127.0.0.1:8265"
)


def given(environment: Mapping[str, str] = os.environ) -> str | None:
    """The address that the environment names; None if there is none."""
    found = (environment.get(name, "") for name in _VARIABLES)
    return next((address for address in found if address and address != "local"), None)


def jobs_url(address: str) -> str:
    """The URL of the Jobs API of the cluster at ``address``: http://HOST:8265 or HOST:6379.

    Raises:
        UserError: it is an address of another kind, nobody answers there, or the cluster's
            dashboard cannot be reached from here.
    """
    scheme, mark, rest = address.partition("://")
    shown = without_password(address)
    if mark and scheme in {"http", "https"}:
        if not _is_url(address):
            raise UserError(f"RAY_ADDRESS={shown} is no URL: give http://HOST:8265")
        return address.rstrip("/")
    if mark:
        host = without_password(rest).partition(":")[0].partition("/")[0] or "HOST"
        what = "a Ray Client address" if scheme == "ray" else "no address of a Ray cluster"
        raise UserError(
            f"RAY_ADDRESS={shown} is {what}: give the head's dashboard, http://{host}:8265, or "
            f"its own address, {host}:6379"
        )
    if is_dashboard(address):
        return f"http://{address}"
    return _ask_head(address)


def _is_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def is_dashboard(address: str) -> bool:
    """Whether Ray's dashboard answers there: its address was given without http://.

    The token is not sent: it is not known yet what that is.
    """
    if not address.rpartition(":")[2].isdecimal():
        return False
    try:
        JobsApi(f"http://{address}", headers={}).version(timeout_s=_KNOCK_S)
    except NoAnswerError:
        return False
    except UserError:  # it asks for a token, and so will whatever is asked next
        return True
    return True


def _ask_head(address: str) -> str:
    """Where the head of the cluster says that its dashboard is."""
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    shown = without_password(address)
    try:
        head = canonicalize_bootstrap_address_or_die(address)
        _knock(head)
        found = GcsClient(address=head).internal_kv_get(
            DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD, _ASK_S
        )
    except Exception as error:  # Ray has many, and none of its own for each of these
        raise token_problem(error) or UserError(
            f"no Ray cluster answers at RAY_ADDRESS={shown} ({_first_line(error, address)}): "
            "correct the address, or give the head's dashboard, http://HOST:8265"
        ) from None
    if not found:
        raise UserError(
            f"the Ray cluster at {shown} runs no dashboard, which takes jobs: start its head "
            "with --include-dashboard=true and ray[default] installed"
        )
    dashboard = cast("bytes", found).decode()
    if _is_loopback(dashboard) and not _is_here(head.rpartition(":")[0]):
        raise UserError(
            f"the dashboard of the Ray cluster at {shown} listens on its own machine alone "
            f"({dashboard}): {_FORWARD}"
        )
    return f"http://{dashboard}"


def _first_line(error: BaseException, address: str) -> str:
    text = str(error).replace(address, without_password(address))
    return text.strip().partition("\n")[0][:200]


def _knock(head: str) -> None:
    """Ray itself would go on trying for long."""
    host, _, port = head.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def _is_loopback(address: str) -> bool:
    return address.rpartition(":")[0].strip("[]") in {"127.0.0.1", "localhost", "::1"}


def _is_here(host: str) -> bool:
    """Whether an address of ``host`` is this machine's: only then can a socket be bound to it."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True
