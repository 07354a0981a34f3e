"""Was a run trained on the data of its plan, each pair exactly once an epoch?

A step's batch is a pure function of (corpus, configuration, seed, step), so what a run should have
consumed can be computed again at any time. What it did consume is in its rolling hash: the sum of
``data_shards.plan.data_hash`` over all lanes and steps, which ranks add up from the batches that
they really read and which stands in ``events.jsonl`` and in every checkpoint's ``state.json``. The
two must agree wherever a hash was recorded.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from data_shards.plan import Plan, data_hash
from data_shards.randomness import MASK, Int64
from trainer.checkpoint import STATE, Checkpoints
from trainer.run import read_config, read_events
from trainer.storage import StorageError

_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True)
class Record:
    """A rolling hash as the run noted it after ``step`` steps, and where."""

    step: int
    found: str
    where: str


@dataclass(frozen=True)
class Difference:
    """A record that is not as planned, though the records before it were.

    Attributes:
        first_step, step: the steps since the record before: the data in question.
        expected, found: the rolling hash after ``step``.
        only_record: another record of this step or a later one agrees with the plan, so the data
            was right all the same, and only this record is wrong.
    """

    first_step: int
    step: int
    where: str
    expected: str
    found: str
    only_record: bool

    def __str__(self) -> str:
        meaning = (
            "records from then on agree with the plan, so this one was altered and not the data"
            if self.only_record
            else f"the data of steps {self.first_step} to {self.step} was not that of the plan"
        )
        return (
            f"{self.where}, step {self.step}: data_hash {self.expected} expected, {self.found} "
            f"found: {meaning}"
        )


@dataclass(frozen=True)
class EpochAudit:
    """One epoch, as far as the run went.

    Attributes:
        epoch: counted from 0, as in the log.
        steps, steps_per_epoch: consumed, and of a whole epoch.
        pairs: consumed.
        pairs_untrained: of these, not trained on: skipped, or undone by a rewind.
        at_step: the epoch's last step with a recorded hash, counted from the run's beginning; None
            if there is none (steps are logged less often than epochs end).
        expected, found: the run's rolling hash there, as planned and as recorded.
        exact: all records that bear on the epoch are as planned.
        first_difference: else first and last of the steps in question.
    """

    epoch: int
    steps: int
    steps_per_epoch: int
    pairs: int
    pairs_untrained: int
    at_step: int | None
    expected: str | None
    found: str | None
    exact: bool
    first_difference: tuple[int, int] | None


@dataclass(frozen=True)
class Skipped:
    """A step whose batch was consumed and not trained on."""

    step: int
    reason: str
    pairs: int


@dataclass(frozen=True)
class Rewound:
    """After ``step`` the weights of ``to_step`` came back: what lay between is not trained on."""

    step: int
    to_step: int
    pairs: int


@dataclass(frozen=True)
class Audit:
    """What an audit found; steps are counted from 1.

    Attributes:
        steps, pairs: consumed by the run, up to its last record.
        pairs_untrained: of these, not trained on.
        differences: where the recorded hashes depart from the plan, oldest first.
        problems: whatever else is not as it must be.
    """

    run: str
    steps: int
    pairs: int
    pairs_untrained: int
    epochs: tuple[EpochAudit, ...]
    skipped: tuple[Skipped, ...]
    rewound: tuple[Rewound, ...]
    differences: tuple[Difference, ...]
    problems: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether each epoch holds every pair once and every record is as planned."""
        return not self.differences and not self.problems

    def findings(self) -> list[str]:
        """What is wrong, one line each, the earliest difference first."""
        return [*map(str, self.differences), *self.problems]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"exact": self.exact, **asdict(self)}


def audit(run_dir: Path, *, progress: Callable[[str], None] | None = None) -> Audit:
    """Compute the run's data again from its plan and compare it with what the run recorded.

    Args:
        run_dir: the run's folder; the run may still be going on.
        progress: told every few seconds how far the audit is.

    Raises:
        UserError: there is no such run, it has recorded nothing yet, or its prepared corpus is not
            there or is another one.
    """
    config = read_config(run_dir)
    manifest = Manifest.load(config.data.folder())
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    events = read_events(run_dir)
    states, problems = _checkpoint_states(Checkpoints.of(run_dir, config.recovery))
    for where, state in states:
        _check_plan(where, state, plan, manifest)
    noted = [(f"events.jsonl ({event['event']})", event) for event in events]
    records = _records([*noted, *states])
    steps = max((record.step for record in records), default=0)
    if steps == 0:
        raise UserError(
            f"the run {run_dir} has recorded no step yet, so there is nothing to audit: "
            "let it reach the first step that it logs"
        )
    rolling, num_pairs, uneven = _consume(plan, steps, len(manifest.lengths), progress)
    differences = _compare(records, rolling)
    skipped, unlisted = _skipped(events, plan, num_pairs)
    rewound = _rewound(events, num_pairs)
    untrained = np.zeros(steps, dtype=bool)
    for skip in skipped:
        untrained[skip.step - 1] = True
    for rewind in rewound:
        untrained[rewind.to_step : rewind.step] = True
    epochs = [
        _epoch(epoch, plan.steps_per_epoch, records, rolling, num_pairs, untrained, differences)
        for epoch in range(plan.locate(steps - 1)[0] + 1)
    ]
    return Audit(
        run=run_dir.name,
        steps=steps,
        pairs=int(num_pairs.sum()),
        pairs_untrained=int(num_pairs[untrained].sum()),
        epochs=tuple(epochs),
        skipped=tuple(skipped),
        rewound=tuple(rewound),
        differences=tuple(differences),
        problems=(*problems, *uneven, *unlisted, *_miscounted(states, skipped, rewound)),
    )


# What the run recorded.


def _checkpoint_states(
    checkpoints: Checkpoints,
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Every checkpoint's state with the file's name, and what cannot be read."""
    states, problems = [], []
    for step in checkpoints.committed():
        where = f"{checkpoints.folder(step)}/{STATE}"
        try:
            state = json.loads(checkpoints.storage.read(where))
        except (StorageError, ValueError) as error:
            problems.append(f"{where} cannot be read: {error}")
            continue
        if not isinstance(state, dict) or state.get("step") != step or "data_hash" not in state:
            problems.append(f"{where} is not the state of step {step} with its data_hash")
            continue
        states.append((where, state))
    return states, problems


def _check_plan(where: str, state: dict[str, Any], plan: Plan, manifest: Manifest) -> None:
    settings = state.get("settings", {})
    for what, now in (("data", manifest.sha256), ("plan", plan.digest)):
        then = settings.get(what, now)
        if then != now:
            raise UserError(
                f"{where}: the run was trained on another corpus or plan than {manifest.folder} "
                f"gives now ({what} {then}, now {now}): put the run's corpus back there and its "
                "config.json as it was, or audit it with the version of babelray that trained it"
            )


def _records(sources: Iterable[tuple[str, dict[str, Any]]]) -> list[Record]:
    """The recorded hashes, in the order of their steps."""
    records = [
        Record(values["step"], str(values["data_hash"]), where)
        for where, values in sources
        if "data_hash" in values and isinstance(values.get("step"), int)
    ]
    return sorted(records, key=lambda record: record.step)


def _skipped(
    events: list[dict[str, Any]], plan: Plan, num_pairs: Int64
) -> tuple[list[Skipped], list[str]]:
    """The skipped steps, and where the pairs listed for them are not those of the plan."""
    skipped, problems = [], []
    for event in _of_kind("skipped", events, len(num_pairs)):
        step = event["step"]
        skipped.append(Skipped(step, str(event.get("reason")), int(num_pairs[step - 1])))
        planned = {str(batch.lane): sorted(batch.pair_ids) for batch in plan.step(step - 1)}
        problems += [
            f"events.jsonl (skipped), step {step}: the pairs listed for lane {lane} are not those "
            "of its batch"
            for lane, listed in (event.get("pairs") or {}).items()
            if sorted(listed) != planned.get(str(lane), [])
        ]
    return skipped, problems


def _rewound(events: list[dict[str, Any]], num_pairs: Int64) -> list[Rewound]:
    return [
        Rewound(step, to_step, int(num_pairs[to_step:step].sum()))
        for event in _of_kind("rewound", events, len(num_pairs))
        for step, to_step in [(event["step"], event["to_step"])]
    ]


def _miscounted(
    states: list[tuple[str, dict[str, Any]]],
    skipped: list[Skipped],
    rewound: list[Rewound],
) -> list[str]:
    """Checkpoints that count other numbers of skips and rewinds than the log lists.

    Only where they agree is it certain that every other pair was trained on.
    """
    problems = []
    for where, state in states:
        counts = state.get("guard", {})
        for name, listed in (("skipped", skipped), ("rewinds", rewound)):
            known = sum(one.step <= state["step"] for one in listed)
            if counts.get(name, known) != known:
                problems.append(
                    f"{where} counts {counts[name]} {name}, events.jsonl lists {known} up to "
                    f"step {state['step']}"
                )
    return problems


def _of_kind(kind: str, events: list[dict[str, Any]], steps: int) -> Iterator[dict[str, Any]]:
    """Those that happened up to the last record; later ones are for the next audit."""
    return (event for event in events if event["event"] == kind and event["step"] <= steps)


# What the plan says.


def _consume(
    plan: Plan, steps: int, corpus_pairs: int, progress: Callable[[str], None] | None
) -> tuple[list[int], Int64, list[str]]:
    """Go through the plan's first ``steps`` steps.

    Returns:
        The rolling hash after 0, 1, … ``steps`` steps; the pairs of each step; and the epochs in
        which a pair does not come exactly once (at most once in one that is not over).
    """
    rolling, num_pairs, problems = [0], np.zeros(steps, dtype=np.int64), []
    told_s = time.monotonic()
    for start in range(0, steps, plan.steps_per_epoch):
        stop = min(start + plan.steps_per_epoch, steps)
        times = np.zeros(corpus_pairs, dtype=np.int32)
        for step in range(start, stop):
            hashed = rolling[-1]
            for batch in plan.step(step):
                np.add.at(times, batch.pair_ids, 1)
                num_pairs[step] += len(batch.pair_ids)
                hashed += data_hash(step, batch.lane, batch.pair_ids)
            rolling.append(hashed & MASK)
            if progress is not None and time.monotonic() > told_s + _PROGRESS_EVERY_S:
                told_s = time.monotonic()
                progress(f"audited {step + 1:,} of {steps:,} steps")
        least = 1 if stop - start == plan.steps_per_epoch else 0
        wrong = np.flatnonzero((times < least) | (times > 1))
        if len(wrong):
            problems.append(
                f"epoch {start // plan.steps_per_epoch} of the plan: {len(wrong):,} pairs do not "
                f"come exactly once, the first is pair {wrong[0]} ({times[wrong[0]]} times)"
            )
    return rolling, num_pairs, problems


# The two against each other.


def _compare(records: list[Record], rolling: list[int]) -> list[Difference]:
    """The records where a departure from the plan shows first.

    A rolling hash is a sum. So once something is wrong, all later records are off by the same
    amount: only a change of that amount is news, and a return to 0 says that nothing was wrong
    with the data in between.
    """
    off = [_off_by(record, rolling) for record in records]
    agrees = [record.step for record, amount in zip(records, off, strict=True) if amount == 0]
    last_agreeing = max(agrees, default=0)
    differences: list[Difference] = []
    before, current = 0, 0
    for step, group in groupby(zip(records, off, strict=True), key=lambda pair: pair[0].step):
        known = {0, current}
        found = set()
        for record, amount in group:
            found.add(amount)
            if amount in known:
                continue
            if amount is not None:
                known.add(amount)
                current = amount
            differences.append(
                Difference(
                    first_step=before + 1,
                    step=step,
                    where=record.where,
                    expected=_hex(rolling[step]),
                    found=record.found,
                    only_record=step <= last_agreeing,
                )
            )
        before, current = step, 0 if 0 in found else current
    return differences


def _off_by(record: Record, rolling: list[int]) -> int | None:
    """By how much the record is off, modulo 2**64; None if it is no hash at all."""
    try:
        found = int(record.found, 16)
    except ValueError:
        return None
    return (found - rolling[record.step]) & MASK


def _epoch(
    epoch: int,
    steps_per_epoch: int,
    records: list[Record],
    rolling: list[int],
    num_pairs: Int64,
    untrained: NDArray[np.bool_],
    differences: list[Difference],
) -> EpochAudit:
    start, stop = epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, len(num_pairs))
    pairs = num_pairs[start:stop]
    place = bisect_right(records, stop, key=lambda record: record.step) - 1
    last = records[place] if place >= 0 and records[place].step > start else None
    touching = [
        (difference.first_step, difference.step)
        for difference in differences
        if difference.first_step <= stop and difference.step > start
    ]
    return EpochAudit(
        epoch=epoch,
        steps=len(pairs),
        steps_per_epoch=steps_per_epoch,
        pairs=int(pairs.sum()),
        pairs_untrained=int(pairs[untrained[start:stop]].sum()),
        at_step=None if last is None else last.step,
        expected=None if last is None else _hex(rolling[last.step]),
        found=None if last is None else last.found,
        exact=not touching,
        first_difference=touching[0] if touching else None,
    )


def _hex(number: int) -> str:
    return f"{number:016x}"
