"""The bookkeeping itself, on made-up notes: what it must see, it sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.history import (
    Attempt,
    BrokenHistoryError,
    Count,
    Notes,
    Update,
    count,
    read_notes,
    seconds_to_next_step,
    steps_redone,
    surviving,
)

# Eight pairs, two a step: an epoch has four steps, the run one and a half epochs.
CORPUS = [f"pair-{number}" for number in range(8)]
STEPS, STEPS_PER_EPOCH = 6, 4
PARTIAL = CORPUS[:4]


def pairs_of(step: int) -> tuple[str, ...]:
    first = 2 * (step % STEPS_PER_EPOCH)
    return tuple(CORPUS[first : first + 2])


def attempt(name: str, steps: range, *, start: float, state: str = "w") -> list[Update]:
    """An attempt that trains these steps, one a second; weights are named after their step."""
    return [
        Update(name, s, f"{state}{s}", f"{state}{s + 1}", pairs_of(s), start + place)
        for place, s in enumerate(steps, start=1)
    ]


UNDISTURBED = attempt("a", range(6), start=0)
# Killed after step 4, resumed from the checkpoint of step 2.
CRASHED = [*attempt("a", range(5), start=0), *attempt("b", range(2, 6), start=100)]


def counted(updates: list[Update], **changes: Any) -> Count:
    arguments: dict[str, Any] = {
        "num_steps": STEPS, "steps_per_epoch": STEPS_PER_EPOCH, "partial": PARTIAL,
        "announced": {}, **changes,
    }  # fmt: skip
    return count(surviving(updates, "w6"), CORPUS, **arguments)


def test_an_undisturbed_run_is_exact() -> None:
    assert surviving(UNDISTURBED, "w6") == UNDISTURBED
    assert counted(UNDISTURBED) == Count(0, 0, 0, 0)
    assert steps_redone(UNDISTURBED) == 0


def test_what_a_crash_undid_is_redone_and_neither_lost_nor_repeated() -> None:
    chain = surviving(CRASHED, "w6")
    assert [(update.attempt, update.step) for update in chain] == [
        ("a", 0), ("a", 1), ("b", 2), ("b", 3), ("b", 4), ("b", 5),
    ]  # fmt: skip
    assert counted(CRASHED) == Count(0, 0, 0, 0)
    assert steps_redone(CRASHED) == 3


def test_an_attempt_with_other_rounding_replaces_what_it_redid() -> None:
    later = attempt("b", range(3, 6), start=100, state="v")
    later[0] = replace(later[0], before="w3")
    chain = surviving([*attempt("a", range(5), start=0), *later], "v6")
    assert [update.attempt for update in chain] == ["a", "a", "a", "b", "b", "b"]


def test_a_pair_that_no_rank_trained_on_is_lost() -> None:
    lane_missing = [replace(update, pairs=update.pairs[:1]) if update.step == 1 else update
                    for update in UNDISTURBED]  # fmt: skip
    assert counted(lane_missing) == Count(lost=1, repeated=0, left_out=0, foreign=0)


def test_a_step_jumped_over_is_lost() -> None:
    # Resumed with the weights of step 3 but the data of step 4.
    jumped = [*UNDISTURBED[:3], replace(UNDISTURBED[4], before="w3"), UNDISTURBED[5]]
    assert counted(jumped).lost == 2


def test_a_pair_trained_on_twice_is_repeated() -> None:
    # Resumed with the weights of step 3 but the data of step 2.
    again = replace(UNDISTURBED[2], attempt="b", before="w3", after="w3b", time=50.0)
    rest = [replace(UNDISTURBED[3], attempt="b", before="w3b", time=51.0), *UNDISTURBED[4:]]
    assert counted([*UNDISTURBED[:3], again, *rest]).repeated == 2


def test_a_pair_in_place_of_another_is_lost_and_repeated() -> None:
    wrong = [replace(update, pairs=pairs_of(0)) if update.step == 1 else update
             for update in UNDISTURBED]  # fmt: skip
    assert counted(wrong) == Count(lost=2, repeated=2, left_out=0, foreign=0)


def test_a_partial_epoch_must_be_that_of_the_undisturbed_run() -> None:
    other = [replace(update, pairs=pairs_of(3)) if update.step == 5 else update
             for update in UNDISTURBED]  # fmt: skip
    assert counted(other) == Count(lost=2, repeated=0, left_out=0, foreign=2)


def test_a_sentence_that_is_not_in_the_corpus_is_foreign() -> None:
    strange = [replace(update, pairs=(*update.pairs, "?")) if update.step == 0 else update
               for update in UNDISTURBED]  # fmt: skip
    assert counted(strange).foreign == 1


def test_a_skipped_step_is_lost_unless_the_run_said_so() -> None:
    skipped = [*UNDISTURBED[:2], replace(UNDISTURBED[2], after="w2"),
               replace(UNDISTURBED[3], before="w2"), *UNDISTURBED[4:]]  # fmt: skip
    assert counted(skipped).lost == 2
    assert counted(skipped, announced={2: pairs_of(2)}) == Count(0, 0, left_out=2, foreign=0)
    # Saying so of the same pairs in another epoch does not excuse it.
    assert counted(skipped, announced={2 + STEPS_PER_EPOCH: pairs_of(2)}).lost == 2


def test_steps_undone_by_going_back_are_out_of_the_chain() -> None:
    # After step 3 back to the weights of step 1, on with the data of step 4.
    rewound = [*UNDISTURBED[:4], replace(UNDISTURBED[4], before="w1"), UNDISTURBED[5]]
    assert [update.step for update in surviving(rewound, "w6")] == [0, 4, 5]
    announced = {step: pairs_of(step) for step in (1, 2, 3)}
    assert counted(rewound, announced=announced) == Count(0, 0, left_out=6, foreign=0)
    assert steps_redone(rewound) == 0


@pytest.mark.parametrize("last", ["w7", "v6"])
def test_weights_that_nothing_led_to_are_found(last: str) -> None:
    with pytest.raises(BrokenHistoryError, match="the last checkpoint"):
        surviving(UNDISTURBED, last)


def test_a_checkpoint_that_brings_back_other_weights_is_found() -> None:
    altered = [*UNDISTURBED[:3], replace(UNDISTURBED[3], before="other"), *UNDISTURBED[4:]]
    with pytest.raises(BrokenHistoryError, match="step 3"):
        surviving(altered, "w6")


def test_the_wait_ends_with_the_first_step_of_a_later_attempt() -> None:
    notes = Notes([Attempt("a", 2, 0.0, {}), Attempt("b", 2, 99.5, {})], CRASHED)
    assert seconds_to_next_step(notes, 4.5, restarts=True) == pytest.approx(96.5)
    assert seconds_to_next_step(notes, 4.5, restarts=False) == pytest.approx(0.5)
    assert seconds_to_next_step(notes, 99.9, restarts=True) is None


def write(folder: Path, name: str, rank: int, lines: list[dict[str, Any]]) -> None:
    begin = {"kind": "begin", "rank": rank, "world_size": 2, "pid": 7 + rank, "time": 1.0}
    text = "".join(json.dumps(line) + "\n" for line in [begin, *lines])
    (folder / f"{name}-rank-{rank}.jsonl").write_text(text + '{"kind": "upd')


def rank_lines(rank: int, *, after: str = "w1") -> Iterator[dict[str, Any]]:
    yield {"kind": "trained", "step": 0, "lane": rank, "pairs": [CORPUS[rank]], "time": 2.0}
    yield {"kind": "update", "step": 0, "before": "w0", "after": after, "time": 3.0 + rank}
    yield {"kind": "trained", "step": 1, "lane": rank, "pairs": [CORPUS[2 + rank]], "time": 4.0}


def test_ranks_are_put_together_up_to_the_last_update(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, "a", rank, list(rank_lines(rank)))
    notes = read_notes(tmp_path)
    assert notes.attempts == [Attempt("a", 2, 1.0, {0: 7, 1: 8})]
    assert notes.updates == [Update("a", 0, "w0", "w1", pairs_of(0), 3.0)]


def test_ranks_that_drifted_apart_are_found(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, list(rank_lines(0)))
    write(tmp_path, "a", 1, list(rank_lines(1, after="other")))
    with pytest.raises(BrokenHistoryError, match="step 0: ranks' weights differ"):
        read_notes(tmp_path)
