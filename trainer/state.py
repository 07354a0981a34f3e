"""Where a run stands between two steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.guard import GuardState

# What older checkpoints do not hold.
_NEWER = ("last_nll", "flops", "joules")


@dataclass
class TrainState:
    """With weights and optimizer, all that a resume needs: dropout is seeded by (seed, step, lane).

    Attributes:
        step: the position in the data: steps consumed, trained on or not.
        elapsed_s: training time over all attempts.
        data_hash: rolling hash of the pair ids consumed, modulo 2**64.
        target_tokens, source_tokens: consumed since the beginning.
        best_nll: of the validation set, nats a target token; ``best_step`` is where.
        stale_validations: validations since the best one.
        last_nll: of the last validation.
        flops: operations of the model since the beginning, forward and backward; None where they
            were not counted from there.
        joules: energy taken since the beginning; None where nothing tells.
        guard: what decides which steps are not trained on.
    """

    step: int = 0
    elapsed_s: float = 0.0
    data_hash: int = 0
    target_tokens: int = 0
    source_tokens: int = 0
    best_nll: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    last_nll: float | None = None
    flops: float | None = 0.0
    joules: float | None = None
    guard: GuardState = field(default_factory=GuardState)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the hash as text, since JSON numbers lose 64-bit integers."""
        return {**asdict(self), "data_hash": f"{self.data_hash:016x}"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of ``to_json``."""
        values = {**dict.fromkeys(_NEWER), **values}
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known["data_hash"] = int(known["data_hash"], 16)
        known["guard"] = GuardState.from_json(known["guard"])
        return cls(**known)
