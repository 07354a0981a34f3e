"""What a disturbed run cost, against the undisturbed one; and whether that is as it should be."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import psutil
from safetensors.torch import load_file

from tests.chaos.history import (
    BrokenHistoryError,
    Notes,
    Update,
    count,
    read_notes,
    seconds_to_next_step,
    steps_redone,
    surviving,
)
from tests.chaos.recorder import RECORDS, weights_key
from tests.chaos.scene import Scene
from tests.chaos.workspace import CHECKPOINT_EVERY, NUM_STEPS, descendants, is_alive

# Another number of workers adds the same numbers up in another order.
_CLOSE = 1e-4


class Losses(Enum):
    """How the losses compare with those of the undisturbed run, at every step."""

    EXACT = "bitwise the same"
    CLOSE = f"within {_CLOSE:g}"
    # Some steps were not trained on, as the policy wants: what follows is another curve.
    OWN = "finite"


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: its loss at every step, and what it trained on in the last epoch."""

    losses: dict[int, float]
    partial: frozenset[str]
    data_hash: str


@dataclass(frozen=True)
class Play:
    """A fault that was played to its end, and what is expected of it.

    Attributes:
        moments: when it struck, Unix seconds.
        restarts: it ends the group of ranks; else the next step of any group counts.
        redone: the most steps that may be trained on again; None: what was trained on since the
            newest checkpoint at the time, which is an interval, and the time that saving takes.
    """

    scene: Scene
    moments: tuple[float, ...]
    restarts: bool = True
    redone: int | None = None
    losses: Losses = Losses.EXACT


@dataclass
class Row:
    """One line of the table."""

    fault: str
    seconds: float | None = None
    redone: int | None = None
    lost: int | None = None
    repeated: int | None = None
    left_out: int = 0
    final_loss: float | None = None
    difference: float | None = None
    took_s: float = 0.0
    skipped: str | None = None
    problems: list[str] = field(default_factory=list)


def measure_reference(scene: Scene) -> Reference:
    """The numbers that the disturbed runs are compared with.

    Raises:
        BrokenHistoryError: the recorder does not understand what it sees.
    """
    notes = read_notes(scene.run_dir / RECORDS)
    chain = surviving(notes.updates, _last_weights(scene))
    per_epoch = scene.workspace.steps_per_epoch
    partial = [
        pair
        for update in chain
        if update.step // per_epoch == NUM_STEPS // per_epoch
        for pair in update.pairs
    ]
    found = count(
        chain,
        scene.workspace.pair_keys,
        num_steps=NUM_STEPS,
        steps_per_epoch=per_epoch,
        partial=partial,
        announced={},
    )
    if [update.step for update in chain] != list(range(NUM_STEPS)) or found.lost or found.repeated:
        raise BrokenHistoryError(f"even the undisturbed run is not exact: {found}")
    return Reference(_losses(scene), frozenset(partial), _data_hash(scene))


def measure(title: str, play: Play, reference: Reference) -> Row:
    """The line of a fault, with every expectation that was not met."""
    scene = play.scene
    row = Row(title, problems=scene.problems)
    try:
        notes = read_notes(scene.run_dir / RECORDS)
        _expect_no_rank_left(scene, notes)
        chain = surviving(notes.updates, _last_weights(scene))
    except (BrokenHistoryError, OSError) as error:
        row.problems.append(str(error))
        return row
    _measure_data(row, scene, notes, chain, reference)
    _measure_time(row, play, notes)
    _measure_losses(row, play, reference)
    scene.expect(_data_hash(scene) == reference.data_hash, "the data hash is not the undisturbed")
    return row


def _expect_no_rank_left(scene: Scene, notes: Notes) -> None:
    """Ranks of any attempt: each would keep its memory, and its GPU."""
    pids = {pid for attempt in notes.attempts for pid in attempt.pids.values()}
    ranks = [process for process in descendants() if process.pid in pids and is_alive(process)]
    left = [rank.pid for rank in psutil.wait_procs(ranks, timeout=5)[1] if is_alive(rank)]
    scene.expect(not left, f"the ranks {left} have outlived the run")


def _measure_data(
    row: Row, scene: Scene, notes: Notes, chain: list[Update], reference: Reference
) -> None:
    left_out = {
        event["step"] - 1: [scene.workspace.pair_keys[i] for ids in pairs.values() for i in ids]
        for event in scene.events("skipped")
        if (pairs := event["pairs"]) is not None
    }
    untrained = {u.step: set(u.pairs) for u in notes.updates if u.before == u.after}
    scene.expect(
        {step: set(pairs) for step, pairs in left_out.items()} == untrained,
        "the pairs of the steps that were skipped are not those that the run logged",
    )
    for event in scene.events("rewound"):
        for update in notes.updates:
            if event["to_step"] <= update.step < event["step"]:
                left_out[update.step] = list(update.pairs)
    found = count(
        chain,
        scene.workspace.pair_keys,
        num_steps=NUM_STEPS,
        steps_per_epoch=scene.workspace.steps_per_epoch,
        partial=reference.partial,
        announced=left_out,
    )
    row.lost, row.repeated, row.left_out = found.lost, found.repeated, found.left_out
    scene.expect(not found.lost, f"{found.lost} pairs lost")
    scene.expect(not found.repeated, f"{found.repeated} pairs repeated")
    scene.expect(not found.foreign, f"{found.foreign} pairs that the corpus does not have there")
    audit = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "data", "audit", str(scene.run_dir)],
        cwd=scene.workspace.folder,
        env=scene.workspace.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    said = (audit.stderr or audit.stdout).strip().splitlines()[-1:]
    scene.expect(audit.returncode == 0, f"babelray data audit: {' '.join(said)}")


def _measure_time(row: Row, play: Play, notes: Notes) -> None:
    scene = play.scene
    waits = [seconds_to_next_step(notes, moment, restarts=play.restarts) for moment in play.moments]
    known = [wait for wait in waits if wait is not None]
    row.seconds = max(known, default=None)
    scene.expect(known and len(known) == len(waits), "no step was made after the fault")
    row.redone = steps_redone(notes.updates)
    if play.redone is not None:
        scene.expect(
            row.redone <= play.redone, f"{row.redone} steps redone, more than {play.redone}"
        )
        return
    _expect_newest_checkpoint(row, play, notes)


def _expect_newest_checkpoint(row: Row, play: Play, notes: Notes) -> None:
    """After a crash: on from the newest checkpoint, which is at most an interval old.

    Counted from commit to commit: a save that was in flight when the fault struck is lost too, and
    so are the steps made while it was.
    """
    scene, moment = play.scene, play.moments[0]
    assert scene.committed is not None
    later = {attempt.name for attempt in notes.attempts if attempt.began > moment}
    done = 1 + max(update.step for update in notes.updates if update.attempt not in later)
    # The first that came so far as to train.
    resumed_at = next((update.step for update in notes.updates if update.attempt in later), done)
    scene.expect(
        resumed_at >= scene.committed,
        f"resumed from step {resumed_at}, though that of {scene.committed} was committed",
    )
    in_flight = done - done % CHECKPOINT_EVERY
    bound = CHECKPOINT_EVERY + (done - in_flight if in_flight > scene.committed else 0)
    scene.expect(row.redone is not None and row.redone <= bound, f"{row.redone} steps redone")


def _measure_losses(row: Row, play: Play, reference: Reference) -> None:
    scene, losses = play.scene, _losses(play.scene)
    row.final_loss = losses.get(NUM_STEPS)
    if row.final_loss is None:
        scene.expect(False, "the last step has no loss")
        return
    row.difference = row.final_loss - reference.losses[NUM_STEPS]
    if play.losses is Losses.OWN:
        first = min(event["step"] for event in scene.events("skipped"))
        common = {step: loss for step, loss in reference.losses.items() if step < first}
        scene.expect(math.isfinite(row.final_loss), "the final loss is not finite")
    else:
        common = reference.losses
        scene.expect(losses.keys() == common.keys(), "steps are missing in events.jsonl")
    tolerance = _CLOSE if play.losses is Losses.CLOSE else 0.0
    apart = [
        step
        for step, loss in common.items()
        if step in losses and abs(losses[step] - loss) > tolerance * abs(loss)
    ]
    scene.expect(
        not apart,
        f"the loss of step {min(apart, default=0)} and {len(apart) - 1} others is not "
        f"{play.losses.value}",
    )


def _losses(scene: Scene) -> dict[int, float]:
    """The loss of every step, as logged last: a step that is redone is logged again."""
    return {event["step"]: event["loss"] for event in scene.events("step")}


def _data_hash(scene: Scene) -> str:
    last: dict[str, Any] = scene.events("step", "skipped")[-1]
    return str(last["data_hash"])


def _last_weights(scene: Scene) -> str:
    file = scene.checkpoints_dir() / f"step-{NUM_STEPS:08d}" / "model.safetensors"
    return weights_key(load_file(file))
