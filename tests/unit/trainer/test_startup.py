"""Where the seconds of a start went."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainer import startup


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    startup.begin({})


def test_the_parts_add_up_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    startup.mark("data")
    assert startup.seconds() == {}, "nobody has said when it began"
    startup.begin({"begin": 100.0, "command": 100.5, "ray": 104.6})
    monkeypatch.setattr("time.time", lambda: 106.62)
    startup.mark("workers")
    parts = startup.seconds()
    assert parts == {"command": 0.5, "ray": 4.1, "workers": 2.02}
    assert list(parts) == ["command", "ray", "workers"]
    assert startup.described({**parts, "data": 0.04}) == (
        "command and configuration 0.5, Ray 4.1, workers 2.0 s"
    )
