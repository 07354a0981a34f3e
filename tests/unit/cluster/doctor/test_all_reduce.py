"""What is made of measurements; the measuring itself is done in the integration test."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import links, node
from cluster.doctor.all_reduce import Measured, blame, gradients, judge, rounds, slow_machines
from cluster.doctor.links import Link

_NO_LINKS: dict[str, Any] = {"name": "eth0", "gbits": None, "physical": False, "infiniband": []}


def said(gpu: str | None = None, *, nvlinks: int = 0, **about: Any) -> dict[str, Any]:
    return {"gpu": gpu, "nvlinks": nvlinks, "links": {**_NO_LINKS, **about}}


def measured(world: int, seconds: float, *, right: bool = True) -> Measured:
    return Measured(world, ((8, 2e-5), (1_000_000_000, seconds)), right, ())


def test_bandwidth() -> None:
    result = measured(8, 0.01)
    assert result.algorithm_bandwidth == pytest.approx(100e9)
    assert result.bus_bandwidth == pytest.approx(175e9)
    assert result.latency == 2e-5


def test_gradients_take_as_long_as_the_largest_says() -> None:
    check = gradients(measured(8, 0.01), 100_000_000)
    assert "100 MB" in check.found
    assert "about 1.0 ms a step" in check.found


@pytest.mark.parametrize(
    ("seconds", "outcome", "part"), [(0.005, "ok", "78%"), (0.01, "warning", "39%")]
)
def test_what_is_much_slower_than_the_link_is_a_warning(
    seconds: float, outcome: str, part: str
) -> None:
    link = links.within([said("NVIDIA H100 80GB HBM3")])
    assert link == Link("NVLink of H100", 450.0)
    check = judge("within a", measured(8, seconds), link, [said("NVIDIA H100 80GB HBM3")])
    assert check.outcome == outcome
    assert f"{part} of 450 GB/s (NVLink of H100)" in check.found


def test_without_an_expectation_nothing_is_claimed() -> None:
    check = judge("across", measured(2, 10.0), links.across([said()]), [said()])
    assert check.outcome == "ok"
    assert "nothing to compare with (eth0, which is virtual)" in check.found


def test_wrong_sums_are_a_failure() -> None:
    check = judge("a", measured(2, 0.1, right=False), Link("x", None), [said()])
    assert check.outcome == "failure"
    assert "sums are wrong" in check.found


def test_links_within_a_machine() -> None:
    assert links.within([said("NVIDIA A100-SXM4-80GB")]).gigabytes == 300
    assert links.within([said("NVIDIA A100 80GB PCIe")]).name.startswith("PCIe")
    assert links.within([said("NVIDIA H100 NVL", nvlinks=12)]).gigabytes is None
    assert links.within([said("NVIDIA L4")]) == Link("PCIe through the host's memory", 16.0)
    assert links.within([said("Something new")]).gigabytes is None
    assert links.within([said()]).gigabytes is None


def test_links_across_machines() -> None:
    fast = said("H100", infiniband=[("mlx5_0", 400.0), ("mlx5_1", 400.0)])
    slow = said("H100", physical=True, gbits=25.0)
    assert links.across([fast, fast]) == Link("mlx5_0, mlx5_1, 800 Gbit/s together", 100.0)
    assert links.across([fast, slow]) == Link("eth0, 25 Gbit/s", 3.125), "the slowest decides"
    assert links.across([said(None, infiniband=[("mlx5_0", 400.0)])]).gigabytes is None
    assert links.across([said()], gbits=100).gigabytes == 12.5
    assert links.across([said(physical=True)]).name.endswith("does not tell")


def test_the_mend_fits_the_transport() -> None:
    infiniband = said("H100", infiniband=[("mlx5_0", 400.0)])
    link = links.across([infiniband])
    assert "NCCL_IB_DISABLE" in links.mend(link, ["NET/Socket"], [infiniband])
    assert "GPUDirect" in links.mend(link, ["NET/IB", "P2P"], [infiniband])
    assert "fabric manager" in links.mend(Link("NVLink of H100", 450), ["SHM"], [said()])
    assert "ACS" in links.mend(Link("PCIe", 16), ["SHM"], [said()])
    assert "NCCL_SOCKET_IFNAME" in links.mend(Link("eth0", 3), ["NET/Socket"], [said()])


def test_the_transports_that_nccl_tells_of() -> None:
    log = """
host:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
host:1:9 [0] NCCL INFO Channel 01/0 : 7[7] -> 8[0] [receive] via NET/IB/0/GDRDMA
host:1:9 [0] NCCL INFO Channel 02/0 : 7[7] -> 8[0] [send] via NET/Socket/1
host:1:9 [0] NCCL INFO Channel 03 : 0[0] -> 1[1] via SHM/direct/direct
host:1:9 [0] NCCL INFO Connected all rings
"""
    assert node.transports(log) == ["NET/IB/GDRDMA", "NET/Socket", "P2P", "SHM"]


def test_a_machines_links_are_read(tmp_path: Path) -> None:
    files = {
        "net/lo/speed": "10000", "infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        "infiniband/mlx5_1/ports/1/state": "1: DOWN",
        "infiniband/mlx5_1/ports/1/rate": "10 Gb/sec (4X SDR)",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    found = node.interfaces("127.0.0.1", tmp_path)
    assert found == {
        "name": "lo", "gbits": 10.0, "physical": False, "infiniband": [("mlx5_0", 400.0)],
    }  # fmt: skip
    assert node.interfaces("192.0.2.1", tmp_path / "none")["name"] is None


def test_the_slow_machine_is_found() -> None:
    names = ["a", "b", "c", "d"]
    ring = list(zip(names, names[1:] + names[:1], strict=True))
    check = slow_machines({pair: 1e8 if "c" in pair else 1e9 for pair in ring})
    assert check.outcome == "warning"
    assert check.found == "slow: c 100 MB/s, where others reach 1.00 GB/s"
    assert slow_machines(dict.fromkeys(ring, 1e9)).outcome == "ok"
    check = slow_machines({pair: 1e8 if pair == ("b", "c") else 1e9 for pair in ring})
    assert "slow between b and c" in check.found


@pytest.mark.parametrize("count", [3, 4, 7, 64])
def test_pairs_of_many_machines_take_no_more_rounds_than_those_of_three(count: int) -> None:
    names = [f"m{index}" for index in range(count)]
    found = rounds(names)
    assert len(found) == 2 + count % 2
    assert sorted(chain(*found)) == sorted(zip(names, names[1:] + names[:1], strict=True))
    for pairs in found:
        machines = [name for pair in pairs for name in pair]
        assert len(machines) == len(set(machines))


def test_who_did_not_join_is_told() -> None:
    addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    waiting = ("joining", None, None)
    late = ("failed", "while joining: DistStoreError: timed out", None)
    found = blame(addresses, [waiting, waiting, ("gone", "", None)], 5)
    assert found.startswith("rank 2 on 10.0.0.3 did not join: the process or the machine")
    found = blame(addresses, [late, ("started", None, None), late], 5)
    assert found == "rank 1 on 10.0.0.2 did not join: it did not begin in 5 s"
    unreached = ("failed", "while reaching: timed out", None)
    found = blame(addresses, [late, late, unreached], 5)
    assert found == "rank 2 on 10.0.0.3 did not join: cannot reach 10.0.0.1 from there in 5 s"
    assert blame(addresses, [late, late, late], 5) == f"10.0.0.1: {late[1]}"
    found = blame(addresses, [("done", None, {}), waiting, waiting], 5)
    assert found == "rank 1 on 10.0.0.2, rank 2 on 10.0.0.3 did not come to an end in time"
