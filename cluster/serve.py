"""Serve a run over HTTP with Ray Serve: a private Ray here, or the cluster of RAY_ADDRESS.

    HTTP proxy -> Front (page, limits; one) -> Model (batches; as many replicas as asked for)

The weights are read once, here, and handed to the replicas through Ray: all translate with the
same checkpoint, however long the run goes on training, and no storage has to be shared.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster import session
from cluster.serve_app import Attention, Busy, Gate, Line, Served, build_app
from cluster.serve_limits import Limits, digest, is_loopback
from cluster.serve_replica import listen_on_loopback
from data_shards.errors import RunFailedError, UserError
from trainer.config import EvaluationConfig

if TYPE_CHECKING:
    from trainer.run import LoadedModel

# Alternatives of a line, however wide the beam.
_MAX_NUM_BEST = 16

# How long a request waits for others to share its batch while the model has nothing to do.
_BATCH_WAIT_S = 0.005

# Requests at work in one replica (most of them waiting for their batch), and those that may wait
# for a replica besides; more are turned away.
_ONGOING = 64
_QUEUED = 256
# Waiting in a replica, on average, before another is started.
_TARGET_ONGOING = 16

# Requests that are inside when the server is asked to end may take so long.
_DRAIN_S = 10.0
# Their answers still have to leave the proxy.
_FLUSH_S = 0.3

_APPLICATION = "babelray"

# Read by every process of Serve.
_ENVIRONMENT = {"RAY_SERVE_LOG_TO_STDERR": "0"}


@dataclass(frozen=True)
class ServeOptions:
    """Where and how to serve.

    ``replicas`` are the least and the most; ``rate`` is requests a minute and client, None for no
    limit.
    """

    host: str = session.LOOPBACK
    port: int = 8000
    token: str | None = None
    replicas: tuple[int, int] = (1, 1)
    max_characters: int = 2000
    rate: int | None = None


def serve(
    run_dir: Path,
    checkpoint: str,
    evaluation: EvaluationConfig,
    options: ServeOptions,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests at work are finished first.

    Must be called in the main thread.

    Raises:
        UserError: no such run or checkpoint, a port in use, a cluster that serves already.
        RunFailedError: Serve did not come up.
    """
    on_cluster = os.environ.get("RAY_ADDRESS", "") not in {"", "local"}
    if not on_cluster:
        check_address(options.host, options.port)
    from trainer.run import load_model

    loaded = load_model(run_dir, checkpoint)
    if options.token is None and not is_loopback(options.host):
        say(
            f"warning: whoever reaches {options.host}:{options.port} can use this server: give "
            "--token-file, and let a proxy with TLS face the network"
        )
    most = options.replicas[1]
    with (
        _environment(),
        # Ray prints the deaths of processes on standard output.
        Path(os.devnull).open("w") as nothing,
        redirect_stdout(nothing),
        session.connect(min_cpus=most, threads=None, dashboard_port=None) as ray_session,
        _Stop() as stop,
    ):
        front = _deploy(loaded, run_dir.name, evaluation, options, ray_session)
        del loaded
        try:
            say(
                f"serving {run_dir.name}, checkpoint {checkpoint}, at "
                f"{_url(options, ray_session.is_local)} (Ctrl-C ends)"
            )
            stop.wait()
            with suppress(Exception):  # ending goes on if the front is gone
                front.drain.remote(_DRAIN_S).result(timeout_s=_DRAIN_S + 1)
            time.sleep(_FLUSH_S)
        finally:
            if not ray_session.is_local:  # else it ends with its Ray
                from ray import serve as ray_serve

                ray_serve.shutdown()


def check_address(host: str, port: int) -> None:
    """Refuse an address that this machine does not have or that something else listens on.

    Raises:
        UserError: names the option and the mend.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(
            f"--host {host}: {error.strerror}: give an address of this machine"
        ) from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: {error.strerror}: choose another with --port"
            ) from None


def _deploy(
    loaded: LoadedModel,
    name: str,
    evaluation: EvaluationConfig,
    options: ServeOptions,
    ray_session: session.Session,
) -> Any:
    """Start Serve and its two deployments; returns a handle of the front."""
    import ray
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    is_local = ray_session.is_local
    if not is_local and ray_serve.status().applications:
        raise UserError(
            "the cluster of RAY_ADDRESS serves already: end that with `serve shutdown`, or use "
            "another cluster"
        )
    model, front = _deployments(evaluation, options, ray_session)
    served = Served(
        run=name,
        checkpoint=loaded.label,
        step=loaded.step,
        source_language=loaded.manifest.source_language,
        target_language=loaded.manifest.target_language,
        max_num_best=_max_num_best(evaluation),
        longest=loaded.config.model.max_positions - 1,
    )
    everywhere = not is_local and not is_loopback(options.host)
    try:
        ray_serve.start(
            proxy_location="EveryNode" if everywhere else "HeadOnly",
            http_options={"host": options.host, "port": options.port},
        )
        bound = model.bind(
            [ray.put(loaded)], evaluation, served.max_num_best, _BATCH_WAIT_S, is_local
        )
        return ray_serve.run(
            front.bind(served, _limits(options), bound, is_local),
            name=_APPLICATION,
            route_prefix="/",
        )
    except BaseException as error:
        if not is_local:
            ray_serve.shutdown()  # else it would stay in the cluster
        if isinstance(error, RuntimeError):
            raise RunFailedError(
                f"the server did not start: {error}; see serve/ among the logs of Ray, here those "
                "in /tmp/ray/session_latest/logs"
            ) from None
        raise


def _deployments(
    evaluation: EvaluationConfig, options: ServeOptions, ray_session: session.Session
) -> tuple[Any, Any]:
    from ray import serve as ray_serve

    from cluster.serve_model import Model

    least, most = options.replicas
    scale: dict[str, Any] = (
        {"num_replicas": most}
        if least == most
        else {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": _TARGET_ONGOING,
            }
        }
    )
    resources: dict[str, Any] = {"num_cpus": 1}
    if ray_session.num_gpus:
        resources["num_gpus"] = 1 / math.ceil(most / ray_session.num_gpus)
    if not ray_session.is_local:
        resources["runtime_env"] = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    ending = {"graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 5}
    model = ray_serve.deployment(
        Model,
        name="Model",
        ray_actor_options=resources,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        **scale,
        **ending,
    )
    front = ray_serve.deployment(
        ray_serve.ingress()(Front),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        # More than the model takes, so that whoever is turned away hears it from the front.
        max_ongoing_requests=2 * (_ONGOING * most + _QUEUED),
        max_queued_requests=_QUEUED,
        **ending,
    )
    return model, front


class Front:
    """The server's HTTP side as a deployment; one, so that a client's requests are counted once."""

    def __init__(self, served: Served, limits: Limits, model: Any, is_local: bool) -> None:
        if is_local:
            listen_on_loopback()
        self._served, self._limits, self._model = served, limits, model
        self._gate: Gate | None = None

    def __serve_build_asgi_app__(self) -> Any:
        app, self._gate = build_app(self._served, self._limits, self._translate)
        return app

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more, and wait until those inside are served."""
        assert self._gate is not None
        self._gate.closing = True
        ends_at = asyncio.get_running_loop().time() + seconds
        while self._gate.num_inside and asyncio.get_running_loop().time() < ends_at:
            await asyncio.sleep(0.02)

    async def _translate(
        self, lines: Sequence[str], *, num_best: int, attention: bool
    ) -> tuple[list[Line], Attention | str | None]:
        from ray.serve.exceptions import BackPressureError

        try:
            found: tuple[list[Line], Attention | str | None] = await self._model.translate.remote(
                list(lines), num_best, attention
            )
        except BackPressureError:
            raise Busy from None
        return found


class _Stop:
    """SIGINT and SIGTERM: the first lets ``wait`` return, the second ends at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Return when asked to end."""
        self._asked.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


def _limits(options: ServeOptions) -> Limits:
    """What the front lets in.

    A page of somebody else's whose name was made to point at this machine (DNS rebinding) could
    talk to a server on the loopback interface: only the token or the right name tells it apart.
    """
    local_only = is_loopback(options.host) and options.token is None
    return Limits(
        max_characters=options.max_characters,
        rate=options.rate,
        token=digest(options.token) if options.token is not None else None,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", options.host}) if local_only else None,
    )


def _max_num_best(evaluation: EvaluationConfig) -> int:
    if evaluation.search == "greedy":
        return 1
    return min(evaluation.beam, _MAX_NUM_BEST) if evaluation.search == "beam" else _MAX_NUM_BEST


def _url(options: ServeOptions, is_local: bool) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}/"
    if is_local:
        return url
    where = "the head node" if is_loopback(options.host) else "every node that runs a replica"
    return f"{url} of {where} of the cluster"


@contextmanager
def _environment() -> Iterator[None]:
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
