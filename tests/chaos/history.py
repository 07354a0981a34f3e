"""What a run was really trained on, put together from the notes of all its ranks.

An *update* takes the weights from one state to another (``before`` and ``after``, hashes) with the
pairs of all ranks that took part. The run's effective history is the chain of updates that leads
from the first weights to those of the last checkpoint: what a crash undid is not in it, what
another attempt trained anew is in it once, and if a checkpoint brought back anything but a state
that the run had been in, the chain is broken. Counting the pairs in the chain against the corpus
gives those lost and those repeated.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class BrokenHistoryError(Exception):
    """The notes contradict each other, or lead to other weights than those of the checkpoint."""


@dataclass(frozen=True)
class Update:
    """One step of one attempt, over all its ranks.

    Attributes:
        attempt: the attempt's name; names sort by the time when the attempts began.
        step: the step's number, from 0.
        before, after: the weights; equal if the step was not trained on.
        pairs: keys of the pairs whose gradients the ranks added up.
        time: when the first rank was done with it, Unix seconds.
    """

    attempt: str
    step: int
    before: str
    after: str
    pairs: tuple[str, ...]
    time: float


@dataclass(frozen=True)
class Attempt:
    """A group of ranks from its start to its end.

    Attributes:
        began: Unix seconds.
        pids: the process of each rank.
    """

    name: str
    world_size: int
    began: float
    pids: Mapping[int, int]


@dataclass(frozen=True)
class Notes:
    """All attempts and updates of a run, in the order of time."""

    attempts: list[Attempt]
    updates: list[Update]


def read_notes(folder: Path) -> Notes:
    """Put the ranks' files together.

    Raises:
        BrokenHistoryError: ranks of one attempt had different weights after the same step.
    """
    begins: dict[str, list[dict[str, Any]]] = defaultdict(list)
    steps: dict[tuple[str, int], _Step] = defaultdict(_Step)
    for file in sorted(folder.glob("*.jsonl")):
        attempt = file.name.partition("-rank-")[0]
        for line in _lines(file):
            if line["kind"] == "begin":
                begins[attempt].append(line)
            elif line["kind"] == "trained":
                steps[attempt, line["step"]].pairs += line["pairs"]
            elif line["kind"] == "update":
                step = steps[attempt, line["step"]]
                step.states.add((line["before"], line["after"]))
                step.times.append(line["time"])
    attempts = [
        Attempt(
            name,
            lines[0]["world_size"],
            min(line["time"] for line in lines),
            {line["rank"]: line["pid"] for line in lines},
        )
        for name, lines in sorted(begins.items())
    ]
    updates = []
    for (attempt, number), step in steps.items():
        if len(step.states) > 1:
            raise BrokenHistoryError(f"attempt {attempt}, step {number}: ranks' weights differ")
        for before, after in step.states:  # none where the attempt ended in the middle of the step
            pairs = tuple(step.pairs)
            updates.append(Update(attempt, number, before, after, pairs, min(step.times)))
    return Notes(attempts, sorted(updates, key=lambda update: (update.attempt, update.step)))


@dataclass
class _Step:
    pairs: list[str] = field(default_factory=list)
    states: set[tuple[str, str]] = field(default_factory=set)
    times: list[float] = field(default_factory=list)


def _lines(file: Path) -> Iterable[dict[str, Any]]:
    """The whole lines; a rank that was killed may have left half a one at the end."""
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def surviving(updates: Sequence[Update], last: str) -> list[Update]:
    """The updates behind the weights ``last``, first to last.

    Args:
        updates: all that were made, in the order of time.
        last: the weights that the run ended with.

    Raises:
        BrokenHistoryError: the chain does not lead back to the weights that the run began with.
    """
    if not updates:
        raise BrokenHistoryError("no update was recorded")
    first = updates[0].before
    chain: list[Update] = []
    weights = last
    # Backwards in time, so that of a step trained twice with the same result the later counts.
    for update in reversed(updates):
        if update.after == weights and update.before != weights:
            chain.append(update)
            weights = update.before
    if weights != first:
        what = "the last checkpoint" if not chain else f"step {chain[-1].step}"
        raise BrokenHistoryError(f"{what} has weights ({weights}) that no recorded update led to")
    return chain[::-1]


@dataclass(frozen=True)
class Count:
    """What became of the corpus' pairs.

    Attributes:
        lost: pairs that an epoch should have trained on and did not, and nothing said so.
        repeated: times that a pair was trained on again in the same epoch.
        left_out: pairs that were not trained on, as the run itself logged.
        foreign: pairs trained on that are not in the corpus.
    """

    lost: int
    repeated: int
    left_out: int
    foreign: int


def count(
    chain: Iterable[Update],
    corpus: Collection[str],
    *,
    num_steps: int,
    steps_per_epoch: int,
    partial: Collection[str],
    announced: Mapping[int, Collection[str]],
) -> Count:
    """Compare the pairs of a surviving chain with the corpus, epoch by epoch.

    Args:
        chain: what ``surviving`` gave.
        corpus: the keys of all pairs.
        num_steps: steps of the whole run.
        steps_per_epoch: of the plan.
        partial: what the undisturbed run trained on in the last epoch, which is not whole; empty if
            the run ends with an epoch.
        announced: by step, the pairs that the run says it left out.
    """
    corpus = set(corpus)
    seen: dict[int, Counter[str]] = defaultdict(Counter)
    for update in chain:
        seen[update.step // steps_per_epoch].update(update.pairs)
    silenced: dict[int, set[str]] = defaultdict(set)
    for step, pairs in announced.items():
        silenced[step // steps_per_epoch].update(pairs)
    lost = repeated = foreign = left_out = 0
    num_epochs = -(-num_steps // steps_per_epoch)
    for epoch in range(num_epochs):
        is_whole = (epoch + 1) * steps_per_epoch <= num_steps
        expected = corpus if is_whole else set(partial)
        trained = seen.pop(epoch, Counter())
        missing = expected - trained.keys()
        lost += len(missing - silenced[epoch])
        left_out += len(missing & silenced[epoch])
        repeated += trained.total() - len(trained)
        foreign += len(trained.keys() - expected)
    foreign += sum(len(trained) for trained in seen.values())  # steps behind the run's end
    return Count(lost, repeated, left_out, foreign)


def steps_redone(updates: Iterable[Update]) -> int:
    """Updates that trained a step which an earlier attempt had trained already."""
    made = [update.step for update in updates if update.before != update.after]
    return len(made) - len(set(made))


def seconds_to_next_step(notes: Notes, moment: float, *, restarts: bool) -> float | None:
    """From a moment to the end of the next optimizer step; None if there was none.

    Args:
        moment: when the fault was caused, Unix seconds.
        restarts: the fault ends the attempt: only a step of an attempt that began later counts.
    """
    later = {attempt.name for attempt in notes.attempts if attempt.began > moment}
    times = [
        update.time - moment
        for update in notes.updates
        if update.before != update.after
        and update.time > moment
        and (not restarts or update.attempt in later)
    ]
    return min(times, default=None)
