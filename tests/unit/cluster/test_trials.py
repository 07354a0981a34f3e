from __future__ import annotations

import pytest

from cluster.paper.trials import resources
from data_shards.errors import UserError


@pytest.mark.parametrize(
    ("at_a_time", "num_cpus", "num_gpus", "expected"),
    [
        (1, 2, 0, (1, 0)),
        (2, 2, 0, (1, 0)),
        (1, 0, 0, (1, 0)),
        (8, 16, 8, (0, 1)),
        (3, 16, 8, (0, 1)),
        (4, 16, 1, (0, 1 / 4)),
        (5, 16, 2, (0, 1 / 3)),  # three on one GPU and two on the other
    ],
)
def test_a_trial_takes_a_cpu_or_a_gpu_or_a_part_of_one(
    at_a_time: int, num_cpus: int, num_gpus: int, expected: tuple[float, float]
) -> None:
    found = resources(at_a_time, num_cpus, num_gpus)
    assert (found["num_cpus"], found["num_gpus"]) == expected


def test_more_trials_than_cpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"--parallel 3: Ray offers 2 CPUs.* give --parallel 2"):
        resources(3, 2, 0)
