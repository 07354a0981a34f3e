"""A short all-reduce over the cluster's devices: within each machine, then across all of them.

A rank is a Ray actor with one GPU, or one CPU where there are none. Joining and measuring happen in
a thread of the actor, which is asked how far it is: a rank that never comes is told by its machine,
and nothing waits for it longer than ``JOIN_S``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from cluster.checks import Check
from cluster.doctor import links
from cluster.doctor.limits import duration, number
from cluster.doctor.links import ENOUGH, Link

JOIN_S = 45.0
_START_S = 60.0
_MEASURE_S = 90.0
_POLL_S = 0.1
_END_S = 3.0

# More would say little more about a CPU, and take its cores.
_MOST_CPU_RANKS = 4

_GPU_SIZES = (8, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20)
_CPU_SIZES = (8, 64 << 10, 1 << 20, 16 << 20)


@dataclass(frozen=True)
class Place:
    """A rank's machine, and what answers for the rank there."""

    node_id: str
    address: str
    actor: Any


class JoinError(Exception):
    """The group did not come to its end: who did not join, by machine."""


@dataclass(frozen=True)
class Measured:
    """Of one group: (bytes, seconds) of the slowest rank, NCCL's transports."""

    world: int
    seconds: tuple[tuple[int, float], ...]
    right: bool
    transports: tuple[str, ...]

    @property
    def latency(self) -> float:
        """Seconds of the smallest."""
        return self.seconds[0][1]

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes a second of the largest: size over time."""
        num_bytes, seconds = self.seconds[-1]
        return num_bytes / seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second that each rank sends."""
        return self.algorithm_bandwidth * 2 * (self.world - 1) / self.world


def checks(
    nodes: Sequence[Mapping[str, Any]],
    *,
    gradient_bytes: int,
    gbits: float | None = None,
    join_s: float = JOIN_S,
) -> Iterator[Check]:
    """Start a rank on every device that is free, measure, and end them.

    Args:
        nodes: alive ones of ``ray.nodes()``.
        gradient_bytes: what the configured model's ranks add up at each step.
        gbits: of the links between machines, where the user knows better.
        join_s: how long to wait for the ranks of a group.
    """
    import ray

    places, problems = _start(nodes)
    yield from problems
    try:
        if len(places) < 2:
            found = f"{len(places)} free device: there is nobody to add up with"
            yield Check("all-reduce", "ok" if places else "warning", found)
            return
        yield from _measurements(places, gradient_bytes, gbits, join_s)
    finally:
        ended = [place.actor.end.remote() for place in places]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=_END_S)
        for place in places:
            ray.kill(place.actor)


def _start(nodes: Sequence[Mapping[str, Any]]) -> tuple[list[Place], list[Check]]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.doctor import node as code

    cloudpickle.register_pickle_by_value(code)
    on_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    resource = "GPU" if on_gpu else "CPU"
    asked: list[tuple[Place, Any]] = []
    for node in nodes:
        count = int(node["Resources"].get(resource, 0))
        for _ in range(count if on_gpu else min(count, _MOST_CPU_RANKS)):
            actor = (
                ray.remote(code.Rank)
                .options(
                    num_cpus=0 if on_gpu else 1,
                    num_gpus=1 if on_gpu else 0,
                    max_concurrency=2,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                )
                .remote()
            )
            place = Place(node["NodeID"], node["NodeManagerAddress"], actor)
            asked.append((place, actor.free_port.remote()))
    waiting = [reference for _, reference in asked]
    ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_START_S) if waiting else ([], 0)
    places, late = [], {}
    for place, reference in asked:
        try:
            if reference in ready:
                ray.get(reference)
                places.append(place)
                continue
            why = f"not free within {_START_S:g} s: in use by a run, or the machine does not answer"
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[0]
        late[place.address] = why
        ray.kill(place.actor)
    mend = "end what uses it (babelray status, the Ray dashboard), or look at that machine"
    problems = [
        Check(f"{resource} of {address}", "warning", why, mend) for address, why in late.items()
    ]
    return places, problems


def _measurements(
    places: Sequence[Place], gradient_bytes: int, gbits: float | None, join_s: float
) -> Iterator[Check]:
    hellos, silent = _hellos(places)
    if silent:
        mend = "look at that machine; torch must work there: run babelray doctor on it"
        each = "; ".join(f"a rank on {address}: {why}" for address, why in silent.items())
        yield Check("all-reduce", "failure", f"did not join: {each}", mend)
        return
    about = dict(zip((place.actor for place in places), hellos, strict=True))
    on_gpu = hellos[0]["gpu"] is not None
    sizes = _GPU_SIZES if on_gpu else _CPU_SIZES
    machines = _by_machine(places)
    measured = None
    for address, ranks in machines.items():
        if len(ranks) > 1:
            theirs = [about[place.actor] for place in ranks]
            found, measured = _group(
                f"within {address}", ranks, sizes, links.within(theirs), theirs, join_s
            )
            yield found
            if measured is None:
                return  # its ranks still wait for each other
    if len(machines) > 1:
        link = links.across(hellos, gbits=gbits)
        name = f"across {len(machines)} machines"
        found, measured = _group(name, places, sizes, link, hellos, join_s)
        yield found
        if measured is None:
            return
        if len(machines) > 2 and (link.gigabytes is None or found.outcome != "ok"):
            yield from _slow_machines(machines, sizes[-2], join_s)
    assert measured is not None, "there are two ranks, of one machine or of several"
    yield gradients(measured, gradient_bytes)


def _hellos(places: Sequence[Place]) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """What each rank computes on; why a machine's did not answer."""
    import ray

    asked = [place.actor.hello.remote(place.address) for place in places]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_START_S)
    hellos, silent = [], {}
    for place, reference in zip(places, asked, strict=True):
        if reference not in ready:
            silent[place.address] = f"no answer within {_START_S:g} s"
            continue
        try:
            hellos.append(ray.get(reference))
        except ray.exceptions.RayError as error:
            silent[place.address] = str(error).strip().splitlines()[-1]
    return hellos, silent


def _by_machine(places: Sequence[Place]) -> dict[str, list[Place]]:
    machines: dict[str, list[Place]] = {}
    for place in places:
        machines.setdefault(place.address, []).append(place)
    return machines


def _group(
    name: str,
    places: Sequence[Place],
    sizes: Sequence[int],
    link: Link,
    hellos: Sequence[Mapping[str, Any]],
    join_s: float,
) -> tuple[Check, Measured | None]:
    try:
        measured = _together(places, sizes, join_s)
    except JoinError as error:
        mend = (
            "let all machines reach each other on every port (firewall, network policy), by the "
            "addresses above; with several interfaces set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        )
        return Check(name, "failure", str(error), mend), None
    return judge(name, measured, link, hellos), measured


def judge(name: str, measured: Measured, link: Link, hellos: Sequence[Mapping[str, Any]]) -> Check:
    """What was measured, against what the link should give."""
    found = (
        f"{measured.world} ranks, {number(measured.bus_bandwidth)}B/s on the bus "
        f"({number(measured.algorithm_bandwidth)}B/s, {number(measured.seconds[-1][0])}B), "
        f"latency {duration(measured.latency)}"
    )
    if measured.transports:
        found += f", by {', '.join(measured.transports)}"
    if not measured.right:
        mend = "do not train on it: find the device (babelray doctor on each machine)"
        return Check(name, "failure", f"{found}: the sums are wrong", mend)
    if link.gigabytes is None:
        return Check(name, "ok", f"{found}; nothing to compare with ({link.name})")
    part = measured.bus_bandwidth / (link.gigabytes * 1e9)
    found += f": {part:.0%} of {link.gigabytes:.3g} GB/s ({link.name})"
    if part < ENOUGH:
        return Check(name, "warning", found, links.mend(link, measured.transports, hellos))
    return Check(name, "ok", found)


def gradients(measured: Measured, gradient_bytes: int) -> Check:
    """What adding up the configured model's gradients would take in each step."""
    n = measured.world
    seconds = 2 * (n - 1) / n * gradient_bytes / measured.bus_bandwidth + measured.latency
    found = (
        f"{number(gradient_bytes)}B of the configured model over {n} ranks: about "
        f"{duration(seconds)} a step, were nothing else done meanwhile"
    )
    return Check("gradients", "ok", found)


def _slow_machines(
    machines: Mapping[str, Sequence[Place]], size: int, join_s: float
) -> Iterator[Check]:
    """Each machine with its neighbours in a ring, one rank each; two or three rounds of pairs."""

    def rate(pair: tuple[str, str]) -> float:
        ranks = [machines[address][0] for address in pair]
        try:
            return _together(ranks, (8, size), join_s).bus_bandwidth
        except JoinError:
            return 0.0

    rates: dict[tuple[str, str], float] = {}
    for pairs in rounds(list(machines)):
        with ThreadPoolExecutor(len(pairs)) as pool:
            rates |= zip(pairs, pool.map(rate, pairs), strict=True)
    yield slow_machines(rates)


def rounds(addresses: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of neighbours in a ring, in rounds in which each machine is at most once.

    Many machines take no longer than three, and pairs share nothing but what the network shares
    among all machines anyway.
    """
    ring = list(zip(addresses, [*addresses[1:], addresses[0]], strict=True))
    even = len(ring) // 2 * 2
    return [part for part in (ring[:even:2], ring[1:even:2], ring[even:]) if part]


def slow_machines(rates: Mapping[tuple[str, str], float]) -> Check:
    """Which machine makes the ring slow: the one whose pairs all are, against the typical pair.

    Args:
        rates: bytes a second of each pair of neighbours.
    """
    name = "pairs of machines"
    best: dict[str, float] = {}
    for pair, rate in rates.items():
        for address in pair:
            best[address] = max(best.get(address, 0.0), rate)
    typical = median(best.values())
    slow = {address: rate for address, rate in best.items() if rate < ENOUGH * typical}
    if slow:
        each = ", ".join(f"{address} {number(rate)}B/s" for address, rate in slow.items())
        mend = "look at that machine's cable, port and interface (ip -s link), or leave it out"
        found = f"slow: {each}, where others reach {number(typical)}B/s"
        return Check(name, "warning", found, mend)
    low, high = min(rates.values()), max(rates.values())
    if low < ENOUGH * median(rates.values()):
        (one, other) = min(rates, key=lambda pair: rates[pair])
        found = f"slow between {one} and {other}: {number(low)}B/s, elsewhere {number(high)}B/s"
        return Check(name, "warning", found, "look at what joins these two")
    return Check(name, "ok", f"{number(low)} to {number(high)}B/s: none is much slower than others")


def _together(places: Sequence[Place], sizes: Sequence[int], join_s: float) -> Measured:
    """One group from start to end.

    Raises:
        JoinError: it did not come to its end; names the machines that are to blame.
    """
    import ray

    first = places[0]
    try:
        port = ray.get(first.actor.free_port.remote(), timeout=join_s)
    except ray.exceptions.RayError:
        raise JoinError(f"no answer from {first.address}") from None
    addresses = [first.address] * len(places)
    for rank, place in enumerate(places):
        place.actor.start.remote(rank, addresses, port, tuple(sizes), join_s)
    deadline = time.monotonic() + join_s + 5
    statuses: list[tuple[str, str | None, Any]] = []
    measuring_since = None
    while True:
        asked = [place.actor.status.remote() for place in places]
        ray.wait(asked, num_returns=len(asked), timeout=5.0)
        statuses = [_status(reference) for reference in asked]
        stages = {stage for stage, _, _ in statuses}
        if stages == {"done"}:
            break
        now = time.monotonic()
        if "measuring" in stages and measuring_since is None:
            measuring_since, deadline = now, now + _MEASURE_S
        if stages & {"failed", "gone"} or now > deadline:
            raise JoinError(blame([place.address for place in places], statuses, join_s))
        time.sleep(_POLL_S)
    results = [result for _, _, result in statuses]
    seen = sorted({name for result in results for name in result["transports"]})
    right = all(result["right"] for result in results)
    return Measured(len(places), tuple(results[0]["seconds"]), right, tuple(seen))


def _status(reference: Any) -> tuple[str, str | None, Any]:
    import ray

    try:
        status: tuple[str, str | None, Any] = ray.get(reference, timeout=0.5)
    except ray.exceptions.RayError as error:
        return "gone", str(error).strip().partition("\n")[0], None
    return status


def blame(
    addresses: Sequence[str], statuses: Sequence[tuple[str, str | None, Any]], join_s: float
) -> str:
    """Which machines kept a group from its end, and how.

    Args:
        addresses: of the ranks' machines, in the order of ranks.
        statuses: as ``Rank.status``; stage "gone" where none came.
    """
    ranks = list(zip(addresses, statuses, strict=True))

    def which(chosen: Callable[[str, str], bool]) -> str:
        found = [
            f"rank {rank} on {address}"
            for rank, (address, (stage, error, _)) in enumerate(ranks)
            if chosen(stage, error or "")
        ]
        return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")

    if gone := which(lambda stage, _: stage == "gone"):
        return f"{gone} did not join: the process or the machine does not answer any more"
    if absent := which(lambda stage, _: stage == "started"):
        return f"{absent} did not join: it did not begin in {join_s:g} s"
    if cut_off := which(lambda stage, error: stage == "reaching" or "while reaching" in error):
        return f"{cut_off} did not join: cannot reach {addresses[0]} from there in {join_s:g} s"
    for address, (stage, error, _) in ranks:
        if stage == "failed":
            return f"{address}: {error}"
    late = which(lambda stage, _: stage != "done")
    return f"{late} did not come to an end in time"
