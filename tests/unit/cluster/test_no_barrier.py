"""What takes the place of Ray Train's actor in the supervisors."""

from __future__ import annotations

import subprocess
import sys

from ray import cloudpickle

from cluster.no_barrier import NoBarrier


def test_a_supervisor_that_gets_it_imports_nothing_of_rays_controller() -> None:
    pickled = cloudpickle.dumps(NoBarrier.options(num_cpus=0).remote(timeout_s=1))
    code = (
        f"import pickle, sys; pickle.loads({pickled!r})\n"
        "assert 'cluster.no_barrier' in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
