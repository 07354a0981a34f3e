"""What ranks measure of a step and all must hear: it travels in the step's own reduction.

Each rank adds its numbers to a sum that the step makes anyway, so hearing of all ranks' work, time
and energy costs no message more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_shards.stream import Batch
from model.config import ModelConfig
from model.cost import Work, training_flops
from trainer.energy import SOURCES, EnergyMeter, Source
from trainer.phases import BUSY, Seconds


@dataclass
class Measured:
    """Of a step, over all ranks; ``+=`` sums steps up.

    Attributes:
        flops: of the model, forward and backward.
        computed_tokens: source and target, padding included.
        joules: by source, of those that tell.
        busy_s, tokens: by rank: time spent on its own, and the real tokens that it went into.
            Empty where stragglers are not looked for.
    """

    flops: float = 0.0
    computed_tokens: float = 0.0
    joules: dict[Source, float] = field(default_factory=dict)
    busy_s: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def __iadd__(self, other: Measured) -> Measured:
        self.flops += other.flops
        self.computed_tokens += other.computed_tokens
        for source, joules in other.joules.items():
            self.joules[source] = self.joules.get(source, 0.0) + joules
        self.busy_s = _added(self.busy_s, other.busy_s)
        self.tokens = _added(self.tokens, other.tokens)
        return self

    def skew(self) -> tuple[int, float] | None:
        """The slowest rank, and its own time a token over the median rank's.

        A token and not a step: ranks that were dealt more lanes than others are not slow. None for
        fewer than two ranks with work.
        """
        costs = {
            rank: busy_s / tokens
            for rank, (busy_s, tokens) in enumerate(zip(self.busy_s, self.tokens, strict=True))
            if tokens and busy_s
        }
        if len(costs) < 2:
            return None
        ordered = sorted(costs.values())
        middle = ordered[(len(ordered) - 1) // 2]  # of two ranks, the faster one
        slowest = max(costs, key=lambda rank: costs[rank])
        return slowest, costs[slowest] / middle


def _added(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other


class Measures:
    """A rank's part, packed into numbers that can be summed over ranks.

    Args:
        rank, world_size: this rank's place.
        energy: read once in ``energy_every`` steps.
        stragglers: also tell each rank's time.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        vocab_size: int,
        rank: int,
        world_size: int,
        energy: EnergyMeter,
        energy_every: int,
        stragglers: bool,
    ) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._rank, self._world_size = rank, world_size
        self._energy, self._energy_every = energy, energy_every
        self._stragglers = stragglers
        self._tokens: list[float] = []  # of the steps whose time is not known yet

    @property
    def size(self) -> int:
        """How many numbers ``pack`` gives."""
        return 2 + 2 * len(SOURCES) + (2 * self._world_size if self._stragglers else 0)

    def pack(
        self,
        step: int,
        batches: Sequence[Batch],
        before: Seconds | None,
        *,
        computed_tokens: int | None = None,
    ) -> list[float]:
        """This rank's numbers of a step.

        Args:
            before: its phases of an earlier step, the newest that is known and was not told yet.
            computed_tokens: source and target, with all that only pads; by default that of the
                batches as they are.
        """
        joules = self._energy.read() if step % self._energy_every == 0 else {}
        if computed_tokens is None:
            computed_tokens = sum(b.source_BS.numel() + b.target_out_BT.numel() for b in batches)
        numbers = [
            training_flops(self._model, _work(batches), vocab_size=self._vocab_size),
            float(computed_tokens),
        ]
        for source in SOURCES:
            numbers += [joules.get(source, 0.0), float(source in joules)]
        if self._stragglers:
            numbers += self._own_time(batches, before)
        return numbers

    def _own_time(self, batches: Sequence[Batch], before: Seconds | None) -> list[float]:
        busy_s, tokens = [0.0] * self._world_size, [0.0] * self._world_size
        if before is not None and self._tokens:
            busy_s[self._rank] = sum(before[phase] for phase in BUSY)
            tokens[self._rank] = self._tokens.pop(0)
        self._tokens.append(float(sum(b.num_source_tokens + b.num_target_tokens for b in batches)))
        return [*busy_s, *tokens]

    def unpack(self, sums: Sequence[float]) -> Measured:
        """The sums over all ranks of what they packed."""
        flops, computed_tokens, *rest = sums
        joules: dict[Source, float] = {}
        for index, source in enumerate(SOURCES):
            total, meters = rest[2 * index : 2 * index + 2]
            if meters:
                joules[source] = total
        times = list(rest[2 * len(SOURCES) :])
        half = len(times) // 2
        return Measured(flops, computed_tokens, joules, times[:half], times[half:])


def _work(batches: Sequence[Batch]) -> Work:
    return Work(
        source=sum(batch.num_source_tokens for batch in batches),
        target=sum(batch.num_target_tokens for batch in batches),
        source_source=sum(batch.length_products[0] for batch in batches),
        source_target=sum(batch.length_products[1] for batch in batches),
        target_target=sum(batch.length_products[2] for batch in batches),
    )
