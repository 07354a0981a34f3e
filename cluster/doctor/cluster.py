"""The Ray cluster that RAY_ADDRESS names, looked at from one of its machines."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.checks import Check
from cluster.doctor import all_reduce, machine
from cluster.doctor.limits import duration, number
from cluster.doctor.machine import existing, remove_empty
from cluster.doctor.sizes import gradient_bytes
from cluster.session import connect
from data_shards.errors import UserError
from trainer.config import RunConfig

_START_S = 60.0
_DEVICES_S = 60.0
_ANSWER_S = 30.0
_SHARED_S = 10.0
_LATE_S = 1.0
_LARGEST_OFFSET_S = 1.0

_SHOWN = frozenset({"python", "babelray", "torch", "deepspeed", "ray"})

# Ray's own settings of the head, and how long a machine may be silent with them: it is asked again
# and again, and is dead when it has failed to answer so many times.
_HEALTH = {
    "RAY_health_check_period_ms": 3000,
    "RAY_health_check_timeout_ms": 10_000,
    "RAY_health_check_failure_threshold": 5,
}
_LONG_SILENCE_S = 20.0


def checks(
    config: RunConfig,
    *,
    runs: Path,
    with_all_reduce: bool = True,
    gbits: float | None = None,
    expected: int | None = None,
    requires: Sequence[str] = (),
    join_s: float = all_reduce.JOIN_S,
) -> Iterator[Check]:
    """Connect, compare the machines with each other, and measure an all-reduce.

    Args:
        config: for the folders, and the size of the gradients.
        runs: the folder of runs, which all machines should share.
        with_all_reduce: measure; else only look.
        gbits: of the links between machines, where the user knows better.
        expected: devices that were asked for; waited for a while.
        requires: packages that every machine must have alike; by default babelray's own.
        join_s: how long to wait for the ranks of a group.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in {"", "local"}:  # else we would start a Ray of our own and look at that
        mend = "set it to the head's HOST:6379, or to auto on one of the cluster's machines"
        yield Check("Ray cluster", "failure", "RAY_ADDRESS names none", mend)
        return
    try:
        connection = connect(min_cpus=1, threads=1, dashboard_port=None)
        with connection as session:
            if expected is not None and (missing := await_devices(expected)):
                yield missing
            packages = machine.names(requires or machine.requirements() or ())
            yield from _checks(
                config, session.dashboard_url, runs, packages, with_all_reduce, gbits, join_s
            )
    except UserError as error:
        found, _, mend = str(error).rpartition(": ")
        yield Check("Ray cluster", "failure", found or mend, mend if found else None)


def _checks(
    config: RunConfig,
    dashboard_url: str | None,
    runs: Path,
    packages: Sequence[str],
    with_all_reduce: bool,
    gbits: float | None,
    join_s: float,
) -> Iterator[Check]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    dead = [node for node in ray.nodes() if not node["Alive"]]
    totals = ray.cluster_resources()
    machines = f"{len(nodes)} machine{'s' * (len(nodes) > 1)}"
    devices = f"{totals.get('GPU', 0):g} GPUs, {totals.get('CPU', 0):g} CPUs for workers"
    found = f"{machines}, {devices}"
    yield Check("Ray cluster", "ok", found + (f" ({len(dead)} that are gone)" if dead else ""))
    yield authentication(os.environ.get("RAY_AUTH_MODE"), nodes, _mode(dashboard_url))
    actors, silent = _start(nodes)
    try:
        yield from silent
        if not actors:
            return
        facts = _ask(actors, "facts", packages)
        yield versions({name: value["versions"] for name, value in facts.items()})
        yield gpus(nodes, {name: value["gpus"] for name, value in facts.items()})
        yield _shared_memory(facts)
        yield clocks(_offsets(actors))
        yield health([value["health"] for value in facts.values()], num_nodes=len(nodes))
        for name, folder in _folders(config, runs):
            yield from _shared_folder(f"shared {name}", folder, actors)
    finally:
        for actor in actors.values():
            ray.kill(actor)
    if with_all_reduce:
        yield from all_reduce.checks(
            nodes, gradient_bytes=gradient_bytes(config), gbits=gbits, join_s=join_s
        )


def await_devices(expected: int, patience_s: float = _DEVICES_S) -> Check | None:
    """Machines may still be on their way; what is wrong if they do not come."""
    import ray

    deadline = time.monotonic() + patience_s
    while True:
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        found = int(resources.get(kind, 0))
        if found >= expected:
            return None
        if time.monotonic() > deadline:
            break
        time.sleep(min(1.0, patience_s))
    mend = "see why the other machines do not come (kubectl describe pods, their Ray's log)"
    said = f"{found} of {expected} {kind}s after {patience_s:g} s"
    return Check("workers", "failure", said, mend)


def _start(nodes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[Check]]:
    """A ``Node`` on every machine, by address; those that do not come up are told."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.doctor import node as code

    cloudpickle.register_pickle_by_value(code)
    actors, asked = {}, {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor = ray.remote(code.Node).options(num_cpus=0, scheduling_strategy=strategy).remote()
        # Two nodes may share an address, as on one machine.
        name = node["NodeManagerAddress"]
        name = name if name not in actors else f"{name} ({node['NodeID'][:6]})"
        actors[name], asked[name] = actor, actor.clock.remote()
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_START_S)
    silent = []
    for name, reference in asked.items():
        try:
            if reference in ready:
                ray.get(reference)
                continue
            why = f"no process started within {_START_S:g} s"
        except ray.exceptions.RayError as error:
            why = str(error).strip().partition("\n")[0]
        mend = "look at its raylet's log; ray.nodes() still says that it is alive"
        silent.append(Check(f"machine {name}", "failure", why, mend))
        ray.kill(actors.pop(name))
    return actors, silent


def _ask(actors: Mapping[str, Any], method: str, *arguments: Any) -> dict[str, Any]:
    import ray

    asked = {name: getattr(actor, method).remote(*arguments) for name, actor in actors.items()}
    return {name: ray.get(reference, timeout=_ANSWER_S) for name, reference in asked.items()}


def _mode(dashboard_url: str | None) -> str | None:
    """What the dashboard says of the cluster's authentication; it asks nobody for a token."""
    import requests

    if dashboard_url is None:
        return None
    try:
        answer = requests.get(f"{dashboard_url}/api/authentication_mode", timeout=3)
        return str(answer.json()["authentication_mode"]).lower()
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None


def authentication(
    setting: str | None, nodes: Sequence[Mapping[str, Any]], mode: str | None
) -> Check:
    """Whether the cluster asks for a token: whoever reaches one that does not runs code there.

    Args:
        setting: RAY_AUTH_MODE of this process.
        mode: what the cluster says of itself, None if it does not.
    """
    addresses = {node["NodeManagerAddress"] for node in nodes}
    mode = mode or (setting or "").lower() or None
    if mode == "token":
        return Check("authentication", "ok", "the cluster asks for a token")
    if all(address.startswith("127.") for address in addresses):
        return Check("authentication", "ok", "no token, but only this machine can reach it")
    found = "no token" if mode else "cannot be seen"
    mend = (
        "whoever reaches the cluster's ports can run code there: start every node with "
        "RAY_AUTH_MODE=token and one token (ray get-auth-token --generate), or fence the network"
    )
    return Check("authentication", "warning", found, mend)


def versions(by_machine: Mapping[str, Mapping[str, str | None]]) -> Check:
    """The same Python and packages on every machine."""
    names = sorted({name for found in by_machine.values() for name in found})
    common: list[tuple[str, str]] = []
    wrong: list[str] = []
    for name in names:
        values = {machine: found.get(name) for machine, found in by_machine.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        odd = [
            f"{machine} has {value or 'none'}"
            for machine, value in values.items()
            if value != usual
        ]
        if odd:
            wrong.append(f"{name}: {', '.join(odd[:4])}; others have {usual or 'none'}")
        elif usual is None:
            wrong.append(f"{name} is on no machine")
        else:
            common.append((name, usual))
    mend = "use one image, or one requirements.lock, on all machines"
    if wrong:
        return Check("versions", "failure", "; ".join(wrong), mend)
    shown = [f"{name} {version}" for name, version in common if name in _SHOWN]
    if more := len(common) - len(shown):
        shown.append(f"{more} more package{'s' * (more > 1)}")
    return Check("versions", "ok", f"alike everywhere: {', '.join(shown)}")


def gpus(nodes: Sequence[Mapping[str, Any]], names: Mapping[str, Sequence[str]]) -> Check:
    """How many each machine gives, and whether they are of one kind.

    Args:
        names: of the GPUs that each machine's driver sees.
    """
    counts = {node["NodeManagerAddress"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
    given = {address: count for address, count in counts.items() if count}
    present = {machine: found for machine, found in names.items() if found}
    mend = "restart Ray there where nvidia-smi shows them (ray start --num-gpus=N overrides)"
    if not given:
        if present:
            found = f"{', '.join(present)} have GPUs that Ray does not offer"
            return Check("GPUs", "failure", found, mend)
        return Check("GPUs", "ok", "none: workers will run on CPUs")
    kinds = Counter(name for found in present.values() for name in found)
    found = f"{sum(given.values())} on {len(given)} machines"
    found += f": {', '.join(kinds)}" if kinds else ""
    if len(kinds) > 1:
        mend = "choose machines of one kind (node selector): the slowest decides the speed of all"
        return Check("GPUs", "warning", found, mend)
    if len(set(given.values())) > 1:
        each = ", ".join(f"{address} {count}" for address, count in given.items())
        mend = "have as many on each machine: the links of the fewest decide"
        return Check("GPUs", "warning", f"{found}; not as many each: {each}", mend)
    return Check("GPUs", "ok", found)


def _shared_memory(facts: Mapping[str, Mapping[str, Any]]) -> Check:
    least = min(facts, key=lambda name: facts[name]["shared_memory"])
    free, num_gpus = facts[least]["shared_memory"], len(facts[least]["gpus"])
    found = f"at least {number(free)}B free on each machine"
    if free < (64 << 20) * max(2, num_gpus):
        mend = "an emptyDir with medium: Memory at /dev/shm; docker run --shm-size=2g"
        return Check("shared memory", "warning", f"{least}: {number(free)}B free", mend)
    return Check("shared memory", "ok", found)


def _offsets(actors: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """How far each machine's clock is ahead of ours, and how far that may be off; seconds."""
    import ray

    offsets = {}
    for name, actor in actors.items():
        best = (0.0, float("inf"))
        for _ in range(5):
            before = time.time()
            there = ray.get(actor.clock.remote(), timeout=_ANSWER_S)
            after = time.time()
            unsure = (after - before) / 2
            if unsure < best[1]:
                best = (there - (before + after) / 2, unsure)
        offsets[name] = best
    return offsets


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Check:
    """Logs of several machines are put in order by time, and S3 refuses a clock that is off."""
    latest = max(offsets, key=lambda name: offsets[name][0])
    earliest = min(offsets, key=lambda name: offsets[name][0])
    apart = offsets[latest][0] - offsets[earliest][0]
    unsure = offsets[latest][1] + offsets[earliest][1]
    if apart - unsure > _LARGEST_OFFSET_S:
        found = f"{latest} is {apart:.1f} s ahead of {earliest}"
        mend = "run a time service on every machine (chrony; timedatectl set-ntp true)"
        return Check("clocks", "warning", found, mend)
    return Check("clocks", "ok", f"less than {duration(max(apart + unsure, 1e-3))} apart")


def health(settings: Sequence[Mapping[str, str] | None], *, num_nodes: int) -> Check:
    """How long a machine may be silent before the cluster counts it as dead.

    Args:
        settings: what each machine says of the head's settings; None of all that are not it.
    """
    of_head = next((found for found in settings if found is not None), None)
    if of_head is None:
        mend = "docs/reliability.md says which settings of the head matter"
        return Check("health checks", "warning", "the head's settings cannot be seen", mend)
    period, patience, times = (int(of_head.get(key, value)) for key, value in _HEALTH.items())
    seconds = times * (period + patience) / 1000
    found = f"a silent machine counts as dead after about {seconds:.0f} s"
    if seconds > _LONG_SILENCE_S and num_nodes > 1:
        mend = (
            "start the head with RAY_health_check_period_ms=1000, RAY_health_check_timeout_ms=2000 "
            "and RAY_health_check_failure_threshold=3 to see it after about 9 s"
        )
        return Check("health checks", "warning", found, mend)
    return Check("health checks", "ok", found)


def _folders(config: RunConfig, runs: Path) -> list[tuple[str, Path]]:
    data = config.data.dir or config.data.root
    folders = [("runs", runs.absolute()), ("data", data.absolute())]
    storage = config.recovery.storage
    if storage is not None and "://" not in storage:
        folders.append(("checkpoints", Path(storage).absolute()))
    return folders


def _shared_folder(name: str, folder: Path, actors: Mapping[str, Any]) -> Iterator[Check]:
    """A file written on each machine is read on all others."""
    trial = f".doctor-{uuid4().hex[:8]}"
    made_from = existing(folder)
    files = {machine: (f"{trial}/{index}", uuid4().hex) for index, machine in enumerate(actors)}
    mend = (
        "mount the same storage there, on every machine at this path (NFS, ReadWriteMany volume), "
        "or name one with --runs and data.root"
    )
    import ray

    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = ray.get(
            [actors[m].write.remote(str(folder), *files[m]) for m in actors], timeout=_ANSWER_S
        )
        problems = {m: said for m, said in zip(actors, written, strict=True) if said}
        if problems:
            machine, said = next(iter(problems.items()))
            more = f" (and {len(problems) - 1} more machines)" if len(problems) > 1 else ""
            found = f"{machine}{more} cannot write: {said}"
            yield Check(name, "failure", found, mend)
            return
        asked = {
            machine: actor.read.remote(str(folder), dict(files.values()), _SHARED_S)
            for machine, actor in actors.items()
        }
        seen = {m: ray.get(r, timeout=_ANSWER_S + _SHARED_S) for m, r in asked.items()}
        yield shared(name, folder, seen, {m: file for m, (file, _) in files.items()}, mend)
    except OSError as error:
        yield Check(
            name, "failure", f"{folder}: {error.strerror}", "name a folder that can be made"
        )
    except ray.exceptions.GetTimeoutError:
        found = f"{folder}: a machine got no answer from it within {_ANSWER_S:g} s"
        yield Check(name, "failure", found, "see whether the storage's server is up")
    finally:
        removed = [actor.remove.remote(str(folder), trial) for actor in actors.values()]
        ray.wait(removed, num_returns=len(removed), timeout=_ANSWER_S)
        remove_empty(folder, above=made_from)


def shared(
    name: str,
    folder: Path,
    seen: Mapping[str, Mapping[str, float]],
    files: Mapping[str, str],
    mend: str,
) -> Check:
    """Whether every machine saw every machine's file.

    Args:
        seen: for each machine, the seconds after which it saw each file that it saw at all.
        files: the file that each machine wrote.
    """
    blind = [
        (reader, writer)
        for reader, found in seen.items()
        for writer, file in files.items()
        if file not in found
    ]
    if blind:
        # The machine that is in most of the failing pairs is the odd one.
        odd = Counter(machine for pair in blind for machine in pair).most_common(1)[0][0]
        pairs = [pair for pair in blind if odd in pair]
        other = pairs[0][0] if pairs[0][0] != odd else pairs[0][1]
        found = f"{folder} on {odd} is not the folder of that name on {other}"
        return Check(name, "failure", found, mend)
    latest = max((value for found in seen.values() for value in found.values()), default=0.0)
    if latest > _LATE_S:
        found = f"{folder}: a file is seen by others only after {latest:.1f} s"
        mend = "mount it with less caching of names (NFS: lookupcache=positive, actimeo=1)"
        return Check(name, "warning", found, mend)
    if len(seen) == 1:
        return Check(name, "ok", f"{folder}: there is one machine")
    return Check(name, "ok", f"{folder}: what one of {len(seen)} machines writes, all read")
