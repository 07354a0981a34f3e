"""``babelray doctor`` on real Ray: an all-reduce, machines that differ, an object store."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import Check
from cluster.doctor import remote, storage
from tests.chaos.hosts import Host, Network, missing
from tests.workplace import REPOSITORY

pytestmark = pytest.mark.timeout(500)

_ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip

# On a Ray with two CPUs: what the cluster's part finds, then an all-reduce by the same ranks, of
# which the second never begins.
_LOCAL = """
import sys
from pathlib import Path
import ray
from ray import cloudpickle
from cluster.doctor import all_reduce, cluster, node, remote
from trainer.config import load_config

class Rank(node.Rank):
    def start(self, rank, addresses, port, sizes, join_s):
        if rank != 1 or join_s > 1:
            super().start(rank, addresses, port, sizes, join_s)
        else:
            self._stage = "started"

def tell(title, found):
    for check in found:
        print(remote.to_line(title, check), flush=True)

if __name__ == "__main__":
    runs = Path(sys.argv[1])
    config = load_config(None, (f"data.root={runs}/data", "model.preset=tiny"))
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20,
             log_to_driver=False)
    node.Rank = Rank
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    measure = all_reduce._measurements

    def twice(places, gradient_bytes, gbits, join_s):
        yield from measure(places, gradient_bytes, gbits, join_s)
        tell("absent", measure(places, gradient_bytes, gbits, 1.0))

    all_reduce._measurements = twice
    tell("whole", cluster._checks(config, None, runs, ["click"], True, None, 20.0))
    tell("waiting", filter(None, [cluster.await_devices(1), cluster.await_devices(99, 0.1)]))
"""


def findings(text: str) -> dict[tuple[str, str], Check]:
    found = [parsed for line in text.splitlines() if (parsed := remote.parse(line))]
    return {(title, check.name): check for title, check in found}


def test_a_cluster_of_one_machine_and_a_rank_that_does_not_join(tmp_path: Path) -> None:
    script = tmp_path / "local.py"
    script.write_text(_LOCAL)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    runs = tmp_path / "runs"
    result = subprocess.run(
        [sys.executable, str(script), str(runs)],
        env={**environment, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    found = findings(result.stdout)
    whole = {name: check for (title, name), check in found.items() if title == "whole"}
    # Whether others can reach a Ray of this machine's own is for another test.
    outcomes = {check.outcome for name, check in whole.items() if name != "authentication"}
    assert outcomes == {"ok"}, whole
    names = ["Ray cluster", "authentication", "versions", "GPUs", "shared memory", "clocks"]
    names += ["health checks", "shared runs", "shared data"]
    assert list(whole)[: len(names)] == names
    [within] = [check for name, check in whole.items() if name.startswith("within ")]
    assert within.found.startswith(("2 ranks, ", "4 ranks, "))
    assert whole["versions"].found.endswith(", 1 more package"), "the one that was asked for"
    assert "B/s on the bus" in within.found
    assert "of the configured model over" in whole["gradients"].found
    waiting = found["waiting", "workers"]
    assert waiting.outcome == "failure"
    assert re.match(r"\d of 99 CPUs after 0.1 s", waiting.found)
    [absent] = [check for (title, _), check in found.items() if title == "absent"]
    assert absent.outcome == "failure"
    assert re.match(r"rank 1 on [0-9.]+ did not join: it did not begin in 1 s$", absent.found)
    assert not runs.exists(), "nothing is left behind"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on a server of this machine."""
    import s3fs
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # one of them may know another server
    s3fs.S3FileSystem().mkdir("doctored")
    yield "s3://doctored"
    running.stop()


def test_an_object_store_and_a_bucket_that_is_not_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(storage, "_MOST_BYTES", 4_000_000)
    options: dict[str, Any] = {"checkpoint_bytes": 10_000_000, "locks": False}
    found = list(storage.checks("checkpoints", f"{bucket}/all", **options))
    assert [check.name for check in found] == ["checkpoints", "checkpoints: speed"]
    assert {check.outcome for check in found} == {"ok"}, found
    assert found[0].found == "s3://doctored/all: written, replaced, read back, removed"
    assert "B/s read (4.00 MB); a checkpoint of 10.0 MB" in found[1].found
    assert s3fs.S3FileSystem(use_listings_cache=False).ls("doctored", refresh=True) == []

    [check] = storage.checks("checkpoints", "s3://absent/all", **options)
    assert check.outcome == "failure"
    assert "bucket does not exist" in check.found
    assert "AWS_ENDPOINT_URL" in (check.mend or "")


class Elsewhere(Host):
    """A host that has a file system of its own where the others share a folder."""

    folder: Path

    @property
    def launcher(self) -> list[str]:
        mount = f'mount -t tmpfs none {self.folder} && exec "$@"'
        return [*super().launcher, "sh", "-c", mount, "sh"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="doc", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def doctor(network: Network, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*network.hosts[0].launcher, sys.executable, "-c", _INSIDE, *map(str, arguments)],
        env=network.environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# The cluster's part of the command, alone.
_INSIDE = """
import sys
from pathlib import Path
from cluster.doctor import cluster, remote
from trainer.config import load_config
runs = Path(sys.argv[1])
config = load_config(None, (f"data.root={runs}", "model.preset=tiny"))
reduce = sys.argv[2] == "reduce"
for check in cluster.checks(config, runs=runs, with_all_reduce=reduce, join_s=8.0):
    print(remote.to_line("Cluster", check), flush=True)
"""


@pytest.mark.slow
@pytest.mark.multinode
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_hosts_that_differ_are_slow_or_fall_silent(place: Path) -> None:
    runs = place / "runs"
    runs.mkdir()
    environment = {**os.environ, **_ENVIRONMENT}
    with Network(place, environment, num_hosts=3) as network:
        odd = network.hosts[2]
        odd = Elsewhere(odd.name, odd.number, odd.address)
        odd.folder = runs
        network.hosts[2] = odd
        network.start(*network.hosts)

        # One host has another folder at the shared path.
        text, _ = doctor(network, runs, "no").communicate(timeout=120)
        found = {name: check for (_, name), check in findings(text).items()}
        assert found["shared runs"].outcome == "failure", text
        assert found["shared runs"].found.startswith(f"{runs} on {odd.address} is not the folder")
        assert found["clocks"].outcome == found["versions"].outcome == "ok"
        assert found["authentication"].outcome == "warning"
        # The head of this network is started with settings of its own.
        assert "about 9 s" in found["health checks"].found
        assert list(runs.iterdir()) == []

        # One host's cable gives 40 Mbit/s.
        slow = network.hosts[1]
        limit = ["root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "400ms"]
        inside = ["ip", "netns", "exec", slow.name]
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", "eth0", *limit], check=True)
        text, _ = doctor(network, runs, "reduce").communicate(timeout=200)
        found = {name: check for (_, name), check in findings(text).items()}
        assert found["pairs of machines"].outcome == "warning", text
        assert f"slow: {slow.address} " in found["pairs of machines"].found
        assert "nothing to compare with" in found["across 3 machines"].found
        subprocess.run([*inside, "tc", "qdisc", "del", "dev", "eth0", "root"], check=True)

        # One host's rank stands still while the group meets.
        command = doctor(network, runs, "reduce")
        stopped = stop_rank(slow, command)
        text, _ = command.communicate(timeout=120)
        with suppress(ProcessLookupError):  # Ray has ended it
            os.kill(stopped, signal.SIGCONT)
        found = {name: check for (_, name), check in findings(text).items()}
        blamed = [check for check in found.values() if slow.address in check.found + check.name]
        assert blamed, text
        assert json.loads(text.splitlines()[-1])["outcome"] != "ok"


def stop_rank(host: Host, command: subprocess.Popen[str]) -> int:
    """Stop the host's rank once it works for the group; its process id."""
    while command.poll() is None:
        for pid in host.pids():
            try:
                title = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if title.startswith(("ray::Rank.start", "ray::Rank.status", "ray::Rank.hello")):
                os.kill(pid, signal.SIGSTOP)
                return pid
        time.sleep(0.02)
    raise AssertionError("there was no rank to stop")
