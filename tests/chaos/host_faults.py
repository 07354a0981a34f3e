"""The faults of several hosts: a host dies, is taken away, falls silent, comes back.

The command runs on the first host; the run is elastic, so it goes on with the hosts that are left.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos import hosts
from tests.chaos.faults import Stage, fault
from tests.chaos.history import read_notes
from tests.chaos.hosts import Host, Network
from tests.chaos.measure import Losses, Play
from tests.chaos.recorder import RECORDS
from tests.chaos.scene import Scene
from tests.chaos.workspace import NUM_STEPS, PACE_S

# Steps take so long while a host is to come or to go: Ray's own commands take seconds, and the run
# must not be over before they have done something.
_SLOW_S = 0.5
_LEAVING_S = 0.1

# The last step at which a fault strikes that leaves much to be done.
_LATEST = NUM_STEPS // 2

_GRACE_S = 30.0


def _begin(stage: Stage, *, workers: str, num_hosts: int, spare: int = 0) -> tuple[Network, Scene]:
    """Hosts with Ray on all but ``spare`` of them, and a run that has come to a random moment."""
    folder = stage.workspace.folder
    network = Network(folder, stage.workspace.environment(), num_hosts=num_hosts + spare)
    stage.stack.enter_context(network)
    network.start(*network.hosts[:num_hosts])
    scene = stage.scene(
        workers=workers, launcher=network.hosts[0].launcher, environment=network.environment
    )
    scene.start()
    scene.some_moment(latest=_LATEST)
    scene.expect(_sizes(scene) == [num_hosts], f"began with {_sizes(scene)} workers")
    return network, scene


def _sizes(scene: Scene) -> list[int]:
    """The number of ranks of each attempt that has trained, equal neighbours once."""
    notes = read_notes(scene.run_dir / RECORDS)
    trained = {update.attempt for update in notes.updates}
    sizes = [attempt.world_size for attempt in notes.attempts if attempt.name in trained]
    return [size for place, size in enumerate(sizes) if sizes[place - 1 : place] != [size]]


def _wait_for_size(scene: Scene, size: int) -> None:
    """Until as many ranks have trained a step."""
    scene.wait_for(f"a step of {size} workers", lambda: _sizes(scene)[-1:] == [size])


def _shrinks(
    stage: Stage, take_away: Callable[[Network, Host], None], *, redone: int | None
) -> Play:
    """A run on two hosts loses the second and goes on with one."""
    network, scene = _begin(stage, workers="1:2", num_hosts=2)
    scene.set_pace(_LEAVING_S)
    scene.strike()
    take_away(network, network.hosts[1])
    _wait_for_size(scene, 1)
    scene.set_pace(PACE_S)
    scene.ended()
    scene.expect(_sizes(scene) == [2, 1], f"ran with {_sizes(scene)} workers")
    assert scene.moment is not None
    return Play(scene, (scene.moment,), redone=redone, losses=Losses.CLOSE)


@fault("kill -9 of a host's processes, later started again", lacking=hosts.missing)
def host_killed(stage: Stage) -> Play:
    """The power of a host fails: smaller at once, and as before when it is back."""
    network, scene = _begin(stage, workers="1:2", num_hosts=2)
    scene.strike()
    network.kill(network.hosts[1])
    _wait_for_size(scene, 1)
    scene.set_pace(_SLOW_S)
    network.start(network.hosts[1])
    _wait_for_size(scene, 2)
    scene.set_pace(PACE_S)
    scene.ended()
    scene.expect(_sizes(scene) == [2, 1, 2], f"ran with {_sizes(scene)} workers")
    assert scene.moment is not None
    return Play(scene, (scene.moment,), losses=Losses.CLOSE)


@fault("a host is drained (preemption notice)", lacking=hosts.missing)
def host_drained(stage: Stage) -> Play:
    """Ray is told that the host will be taken away: saved first, nothing is redone."""
    return _shrinks(stage, lambda net, host: net.drain(host, deadline_s=_GRACE_S), redone=0)


@fault("SIGTERM to a host's `ray start --block`", lacking=hosts.missing)
def host_terminated(stage: Stage) -> Play:
    """What Kubernetes sends to a pod: Ray drains the node, the run saves and leaves."""
    return _shrinks(stage, lambda net, host: net.terminate(host), redone=0)


@fault("a host's network is cut, the host alive but silent", lacking=hosts.missing)
def host_silent(stage: Stage) -> Play:
    """Nobody is told; the other side lives on, and must do no harm when the cable is back."""
    network, scene = _begin(stage, workers="1:2", num_hosts=2)
    silent = network.hosts[1]
    scene.strike()
    network.silence(silent)
    _wait_for_size(scene, 1)
    scene.set_pace(_SLOW_S)
    network.heal(silent)
    # Its Ray learns that it was given up, and ends; the ranks must not stay behind.
    scene.wait_for("the end of what was cut off", lambda: not silent.pids())
    scene.set_pace(PACE_S)
    scene.ended()
    scene.expect(_sizes(scene) == [2, 1], f"ran with {_sizes(scene)} workers")
    assert scene.moment is not None
    return Play(scene, (scene.moment,), losses=Losses.CLOSE)


@fault("hosts go and come: 2, 1, 3 and 2 workers in one run", lacking=hosts.missing)
def live_resize(stage: Stage) -> Play:
    """Planned: a host is drained, two are added, one is drained; no step is redone."""
    network, scene = _begin(stage, workers="1:3", num_hosts=2, spare=2)
    first, second, third = network.hosts[1:]
    moments = []

    def drain(host: Host, *, left: int) -> None:
        scene.set_pace(_LEAVING_S)
        scene.strike()
        assert scene.moment is not None
        moments.append(scene.moment)
        network.drain(host, deadline_s=_GRACE_S)
        _wait_for_size(scene, left)
        scene.set_pace(PACE_S)

    drain(first, left=1)
    scene.set_pace(_SLOW_S)
    network.start(second, third)
    _wait_for_size(scene, 3)
    scene.set_pace(PACE_S)
    scene.reach(scene.last_step() + stage.rng.randrange(10, 40))
    drain(second, left=2)
    scene.ended()
    sizes = _sizes(scene)
    # Ray may learn of the two new hosts one after the other.
    scene.expect(sizes in ([2, 1, 3, 2], [2, 1, 2, 3, 2]), f"ran with {sizes} workers")
    return Play(scene, tuple(moments), redone=0, losses=Losses.CLOSE)
