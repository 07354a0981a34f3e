"""What docs/scaling.md says that ranks send, against the collectives that DeepSpeed makes."""

import importlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_ranks import LENGTH, ROWS, VOCABULARY, make_engine, run_tasks

LANES = 2
STAGES = (0, 1, 2)


def traffic(rank: int, world_size: int, stage: int) -> tuple[int, list[tuple[str, int]]]:
    """The parameters, and of a step of two lanes each collective and its bytes, sent whole."""
    engine = make_engine(world_size, stage, "bf16")
    import deepspeed

    backend, seen = deepspeed.comm.comm.cdb, []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watch(*arguments: Any, **named: Any) -> Any:
            tensors = [t for t in (*arguments, *named.values()) if isinstance(t, torch.Tensor)]
            seen.append((name, max((t.numel() * t.element_size() for t in tensors), default=0)))
            return call(*arguments, **named)

        return watch

    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(backend, name, watched(name, getattr(backend, name)))
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    for _ in range(2):  # the second step: the first may make what is kept
        seen.clear()
        for _ in range(LANES):
            loss, _ = engine(ids, 1.0)
            engine.backward(loss, target_tokens=LANES * ids.numel())
        engine.step(0.01)
    return sum(parameter.numel() for parameter in engine.module.parameters()), list(seen)


@pytest.mark.slow
def test_ranks_send_what_the_model_of_scaling_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    model = importlib.import_module("scaling_model")
    for stage, results in zip(
        STAGES, run_tasks(2, tmp_path, [(traffic, (stage,)) for stage in STAGES]), strict=True
    ):
        for parameters, seen in results:
            # An all-reduce passes everything twice, a gathering once, both times (n - 1) / n.
            twice = sum(size for name, size in seen if name == "all_reduce" and size > 8)
            once = sum(size for name, size in seen if name == "all_gather_into_tensor")
            assert {name for name, _ in seen} <= {"all_reduce", "all_gather_into_tensor"}
            expected = model.sent_bytes(parameters, 2, stage=stage, lanes=LANES)
            assert (2 * twice + once) / 2 == pytest.approx(expected, rel=1e-3), (stage, seen)
            # The step's own sum is the trainer's, not the engine's.
            messages = model.num_messages(parameters, stage=stage, lanes=LANES)
            assert len(seen) in (messages - 1, messages - 2)
