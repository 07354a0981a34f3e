"""What a killed evaluation leaves behind, and who may go on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.partial import PartialResult


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "evaluation" / "test-best.partial.jsonl"


def write(file: Path, digest: str = "a") -> None:
    with PartialResult(file, digest) as partial:
        partial.add(0, ["eins", "zwei"], 1.5)
        partial.add(2, ["drei \u2028 vier\n fünf"], 0.25)


def test_what_was_added_is_found_again(file: Path) -> None:
    write(file)
    with PartialResult(file, "a") as partial:
        assert partial.batches == {0: ["eins", "zwei"], 2: ["drei \u2028 vier\n fünf"]}
        assert partial.seconds == 1.75
        assert partial.discarded == 0
        partial.add(1, [""], 1.0)
    with PartialResult(file, "a") as partial:
        assert sorted(partial.batches) == [0, 1, 2]


def test_of_every_cut_the_whole_lines_are_kept(file: Path) -> None:
    write(file)
    content = file.read_bytes()
    ends = [index for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        with PartialResult(file, "a") as partial:
            assert len(partial.batches) == max(0, sum(end < length for end in ends) - 1)
            partial.add(7, ["sieben"], 0.0)
        with PartialResult(file, "a") as partial:
            assert partial.batches[7] == ["sieben"]


def test_that_of_other_settings_is_thrown_away(file: Path) -> None:
    write(file)
    with PartialResult(file, "b") as partial:
        assert (partial.batches, partial.discarded) == ({}, 2)
    with PartialResult(file, "b") as partial:
        assert (partial.batches, partial.discarded) == ({}, 0)


def test_two_at_once_are_refused(file: Path) -> None:
    refused = pytest.raises(UserError, match=r"another process .*test-best\.partial\.jsonl")
    with PartialResult(file, "a"), refused:
        PartialResult(file, "a")
    with PartialResult(file, "a"):
        pass
