"""Work is timed in turns; no test looks at how long anything takes."""

from __future__ import annotations

import pytest

from trainer.paper import timing


def test_every_round_takes_each_job_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    seconds = iter([0.0] + [1.0] * 1000)
    now = 0.0

    def clock(device: object) -> float:
        nonlocal now
        now += next(seconds)
        return now

    def job(name: str) -> timing.Work:
        made.append(name)
        return lambda: None

    monkeypatch.setattr(timing, "_clock", clock)
    said: list[str] = []
    found = timing.time_in_turns([lambda: job("a"), lambda: job("b")], rounds=4, say=said.append)
    # Once to see how long it takes, then there and back; what takes a second has three rounds.
    assert "".join(made) == "ab" + "abbaab"
    assert [one.rounds for one in found] == [3, 3]
    assert all(one.lowest_s <= one.median_s <= one.highest_s for one in found)
    assert len(said) == 4


def test_the_spread_is_of_the_slowest_to_the_fastest() -> None:
    ranges = [(1.0, 1.0 + place / 10) for place in range(10)] + [(2.0, 6.0)]
    words = timing.spread(ranges)
    assert "took 1.50 times" in words
    assert "1.90 times or less in nine of ten" in words
    assert "3.00 times at most" in words
