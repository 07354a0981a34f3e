"""Ray as a run needs it: a private one on this machine, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import allocator
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from cluster.ray_page import RayPage

LOOPBACK = "127.0.0.1"
DEFAULT_DASHBOARD_PORT = 8265

# Ray reserves 30 % of the memory for objects by default; training passes none through it.
_OBJECT_STORE_BYTES = 128 * 1024**2

_KNOCK_S = 10.0
_ROOM_POLL_S = 1.0

# What Ray and its children read from the environment. A value that the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The state of a run, its attempts and its workers, at /api/train/v2/runs/v1.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A dead worker is seen at the next poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Longer than it takes to place workers where there is room; then the room is counted anew.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Supervisors of ranks do nothing but wait: one that is silent is lost.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
    # Whoever takes a machine away may give as little notice as half a minute.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Ranks that wait for a dead one do not answer a polite request to leave.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
    # Workers keep the driver's working directory.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Accelerators are given out whole; Ray's note on CPU workers seeing none is noise.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A libgomp that spins while it waits takes the core from its neighbours.
    "OMP_WAIT_POLICY": "PASSIVE",
    # For workers that compute themselves, such as those that decode. (Ranks have another.)
    **allocator.GLIBC,
}

# A Ray of our own listens on the loopback interface alone: without this, its ports are open to the
# network, and whoever reaches them can run code here. (The name is Ray's, the effect is the same on
# Linux.) With nobody else able to connect, the dashboard needs no token.
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    # Its Metrics page embeds Grafana's dashboards by uid, and only Ray Data's tab is there to show
    # ours in (docs/monitoring.md).
    "RAY_GRAFANA_DATA_DASHBOARD_UID": "babelray-run",
    # Gloo would take the interface of the host's name.
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    # Nobody gives notice before taking a laptop away; the watcher costs a process.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Its controller is in the command's own process, whose log takes what it has to say, and no
    # actor that could be looked for.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    # A call after the end must fail, and not start another Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray's processes wake up to look after each other, often many times a second. What follows
    # looks less often for what hardly changes on one machine; nothing that notices a failure is in
    # it. (benchmarks/LOG.md)
    "RAY_event_stats": "0",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "200",  # less than cluster.elastic waits
    "RAY_task_events_report_interval_ms": "5000",
    "REPORTER_UPDATE_INTERVAL_MS": "10000",
    # Workers that nobody uses go after a second.
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_num_workers_soft_limit": "0",
}


@dataclass(frozen=True)
class Session:
    """A connection to Ray and what the cluster offers."""

    dashboard_url: str | None
    num_cpus: float
    num_gpus: float
    is_local: bool
    page: RayPage | None = None  # of a Ray of our own


def worker_threads(workers: int, threads: int | None) -> int:
    """CPU threads for each of ``workers``: as configured, OMP_NUM_THREADS, or a fair share."""
    if threads is not None:
        return threads
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, num_cores() // workers)


def num_cores() -> int:
    """Cores this process may use: the affinity mask, cut by the container's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    if quota == "max":
        return cores
    return max(1, min(cores, math.ceil(int(quota) / int(period))))


def is_local() -> bool:
    """Whether Ray will be one of our own on this machine, as far as RAY_ADDRESS says."""
    return os.environ.get("RAY_ADDRESS", "") in {"", "local"}


@contextmanager
def connect(
    *,
    min_cpus: int,
    threads: int | None,
    dashboard_port: int | None,
    meanwhile: Callable[[], None] | None = None,
) -> Iterator[Session]:
    """Ray for the duration of the block; a Ray started here is gone afterwards.

    Args:
        min_cpus: workers that a Ray of our own must be able to place, were there fewer cores.
        threads: CPU threads a worker; None shares this machine's cores out over ``min_cpus``.
        dashboard_port: where a Ray of our own shows its page; None takes the first free port from
            8265 on.
        meanwhile: called in a thread of its own while Ray starts, in the environment that its
            workers will have; by default it imports torch.

    Raises:
        UserError: no Ray answers at RAY_ADDRESS.
    """
    address = "" if is_local() else os.environ["RAY_ADDRESS"]
    environment = dict(_ENVIRONMENT)
    if address:
        _check_address(address)
    else:
        environment |= _LOCAL_ENVIRONMENT
        environment["OMP_NUM_THREADS"] = str(worker_threads(min_cpus, threads))
    added = {name: value for name, value in environment.items() if name not in os.environ}
    os.environ.update(added)

    # What takes as long as Ray's start, which is mostly waiting, is done at the same time.
    aside = _Aside(meanwhile or _import_torch)
    aside.start()
    import ray

    with ExitStack() as stack:
        try:
            page = None
            if address:
                context = _connect_to(address)
            else:
                from cluster.local_ray import announce_metrics, lean_node
                from cluster.ray_page import RayPage

                page = _page(RayPage, dashboard_port)
                stack.callback(page.close)
                with lean_node(page):
                    context = _start_own(
                        address="local",  # and not a cluster that was started on this machine
                        num_cpus=max(num_cores(), min_cpus),
                        include_dashboard=True,
                        dashboard_host=LOOPBACK,
                        dashboard_port=page.address[1],
                        object_store_memory=_OBJECT_STORE_BYTES,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
                announce_metrics()
            aside.finish()
            resources = ray.cluster_resources()
            yield Session(
                dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
                num_cpus=resources.get("CPU", 0.0),
                num_gpus=resources.get("GPU", 0.0),
                is_local=not address,
                page=page,
            )
        finally:
            aside.join()
            ray.shutdown()
            for name in added:
                os.environ.pop(name, None)


class _Aside(threading.Thread):
    """Something that is done at the same time, and whose error is met when it is waited for."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="while-ray-starts", daemon=True)
        self._work = work
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            BaseException: what it met.
        """
        self.join()
        if self._error is not None:
            raise self._error


def _page(make: type[RayPage], port: int | None) -> RayPage:
    try:
        return make(LOOPBACK, port, first_port=DEFAULT_DASHBOARD_PORT)
    except OSError as error:  # taken since it was looked at, or fifty others
        raise UserError(
            f"--dashboard-port {port or DEFAULT_DASHBOARD_PORT}: {error.strerror}: give another"
        ) from None


def with_room(
    found: Session,
    is_enough: Callable[[Session], bool],
    *,
    patience_s: float,
    waiting: Callable[[Session], None],
) -> Session:
    """The session once the cluster offers enough, or as it is when that takes too long.

    Machines may come back one by one: after the head of a cluster was lost, for a minute or two.

    Args:
        found: as ``connect`` gave it.
        is_enough: whether the wait is over; may end it for another reason, too.
        patience_s: the longest wait (seconds).
        waiting: told once, with what is offered, when there is something to wait for.
    """
    import ray

    deadline = time.monotonic() + patience_s
    is_told = False
    while not is_enough(found) and time.monotonic() < deadline:
        if not is_told:
            waiting(found)
            is_told = True
        time.sleep(_ROOM_POLL_S)
        resources = ray.cluster_resources()
        found = replace(
            found, num_cpus=resources.get("CPU", 0.0), num_gpus=resources.get("GPU", 0.0)
        )
    return found


def _start_own(**options: Any) -> Any:
    import ray

    # Ray gives its agent 15 s, which is too little on a machine that is busy with other things.
    # The second time the files are cached, and what was started beside it is done.
    for is_last in (False, True):
        try:
            return ray.init(**options)
        except Exception as error:  # Ray has no narrower one for a node that does not come up
            if "startup" not in str(error):
                raise
            ray.shutdown()
            if is_last:
                raise RunFailedError(
                    "Ray did not start on this machine "
                    f"({str(error).strip().splitlines()[0]}): it may have too much other work; "
                    "try again when it has less"
                ) from None
    return None


def _connect_to(address: str) -> Any:
    import ray

    _check_token(address)
    try:
        return ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, str(error).strip().partition("\n")[0]) from None


def _check_token(address: str) -> None:
    """Ask the head something: Ray itself tries for 20 s, and keeps the reason to its log."""
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    from cluster.launch.jobs_api import token_problem

    try:
        GcsClient(address=canonicalize_bootstrap_address_or_die(address))
    except Exception as error:  # Ray has many, and tells of all others at once
        if (problem := token_problem(error)) is not None:
            raise problem from None


def _check_address(address: str) -> None:
    """Knock at the cluster's door: Ray itself would go on trying for five minutes."""
    from cluster.launch.jobs_api import without_password
    from cluster.launch.ray_address import is_dashboard

    address = without_password(address)
    if address.startswith("ray://"):
        raise _no_cluster(address, "that is a Ray Client address; give the head's own, HOST:6379")
    if "://" in address:
        raise _jobs_api(address)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" and the like, which Ray resolves at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None
    if is_dashboard(address):  # to which Ray would go on talking as to a head
        raise _jobs_api(address)


def _jobs_api(address: str) -> UserError:
    return UserError(
        f"RAY_ADDRESS={address} is the address of Ray's Jobs API, which babelray launch takes: "
        "launch the run, or give the cluster's own address, HOST:6379"
    )


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start it with "
        "ray start --head, correct the address, or unset RAY_ADDRESS to use this machine alone"
    )


def _import_torch() -> None:
    import torch  # noqa: F401


def check_ports(*, dashboard_port: int | None, metrics_host: str, metrics_port: int) -> None:
    """Refuse ports of this machine that something else listens on.

    Raises:
        UserError: names the setting and the mend.
    """
    if dashboard_port is not None and (problem := _in_use(LOOPBACK, dashboard_port)):
        raise UserError(
            f"--dashboard-port {dashboard_port}: {problem}: give another port, or none to take "
            f"the first free one from {DEFAULT_DASHBOARD_PORT} on"
        )
    if metrics_port and (problem := _in_use(metrics_host, metrics_port)):
        from cluster.exporter import is_served

        if is_served(metrics_host, metrics_port):
            return  # by another run, which serves this one's, too
        raise UserError(
            f"trainer.metrics_port {metrics_port}: {problem}: choose "
            f"another with --set trainer.metrics_port={metrics_port + 1}, or 0 for no metrics"
        )


def _in_use(host: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None
