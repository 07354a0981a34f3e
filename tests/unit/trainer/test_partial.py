"""What a killed evaluation leaves behind, and who may go on with it."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.partial import PartialResult, others, partial_file, remove_others


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
        assert partial.batches == {}
    with PartialResult(file, "a") as partial:
        assert partial.batches == {}


def test_two_at_once_are_refused(file: Path) -> None:
    refused = pytest.raises(UserError, match=r"another process .*test-best\.partial\.jsonl")
    with PartialResult(file, "a"), refused:
        PartialResult(file, "a")
    with PartialResult(file, "a"):
        pass


def test_of_other_digests_lie_side_by_side(tmp_path: Path) -> None:
    first, second = (partial_file(tmp_path, "[a] best", digest * 32) for digest in ("ab", "cd"))
    unlike = partial_file(tmp_path, "[a] bestest", "ab" * 32)
    for file in (first, second, unlike):
        write(file, file.name)
    assert others(first) == [second]
    with PartialResult(second, second.name) as partial:
        assert len(partial.batches) == 2
        remove_others(first)
        assert second.exists(), "somebody works on it"
    remove_others(first)
    assert sorted(tmp_path.iterdir()) == [first, unlike]


def test_one_that_its_owner_removes_while_another_waits_for_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = PartialResult(file, "a")
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        with owner:
            owner.remove()
        monkeypatch.undo()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with PartialResult(file, "a") as partial:
        partial.add(0, ["eins"], 1.0)
    with PartialResult(file, "a") as partial:
        assert partial.batches == {0: ["eins"]}
