"""A plan that was kept: the same as a made one, and never trusted when it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.plan import PLAN_FORMAT, Plan
from data_shards.plan_file import FOLDER, open_plan

Prepared = tuple[DataConfig, Manifest]


@pytest.fixture
def corpus(prepared: Prepared, tmp_path: Path) -> Manifest:
    """A copy of the prepared corpus beside which a plan may be kept."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared[1].folder, folder)
    return Manifest.load(folder)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each plan whose windows are cut anew."""
    counts: list[int] = []
    plain = Plan._cut_batches

    def counted(self: Plan) -> Any:
        counts.append(1)
        return plain(self)

    monkeypatch.setattr(Plan, "_cut_batches", counted)
    return counts


def steps(plan: Plan) -> list[Any]:
    return [
        (b.lane, b.window, b.pair_ids.tolist(), b.source_length, b.num_target_tokens)
        for batches in plan.steps(plan.steps_per_epoch - 4, plan.steps_per_epoch + 4)
        for b in batches
    ]


def kept(manifest: Manifest) -> Path:
    [file] = (manifest.folder / FOLDER).glob("*.plan")
    return file


def test_a_kept_plan_equals_a_made_one(
    prepared: Prepared, corpus: Manifest, made: list[int]
) -> None:
    config = prepared[0]
    plans = [open_plan(corpus, config, 3, fewest_pairs=1) for _ in range(2)]
    assert len(made) == 1
    expected = Plan.of(corpus, config, 3)
    for plan in plans:
        assert plan.digest == expected.digest
        assert plan.steps_per_epoch == expected.steps_per_epoch
        assert steps(plan) == steps(expected)
        assert plan.segments(1) == expected.segments(1)
        assert plan.data_hash(5) == expected.data_hash(5)


def test_small_corpora_keep_nothing(prepared: Prepared, corpus: Manifest) -> None:
    open_plan(corpus, prepared[0], 3)
    assert not (corpus.folder / FOLDER).exists()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: flipped(content, 5), id="checksum"),
        pytest.param(lambda content: flipped(content, 50), id="head"),
        pytest.param(lambda content: flipped(content, len(content) - 100), id="arrays"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut short"),
        pytest.param(lambda content: content + b"\0", id="too long"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"x" * 20, id="another file"),
    ],
)
def test_a_damaged_file_is_made_again(
    prepared: Prepared, corpus: Manifest, made: list[int], damage: Callable[[bytes], bytes]
) -> None:
    config = prepared[0]
    expected = steps(open_plan(corpus, config, 3, fewest_pairs=1))
    good = kept(corpus).read_bytes()
    bad = damage(good)
    assert bad != good
    kept(corpus).write_bytes(bad)
    assert steps(open_plan(corpus, config, 3, fewest_pairs=1)) == expected
    assert len(made) == 2
    assert kept(corpus).read_bytes() == good
    open_plan(corpus, config, 3, fewest_pairs=1)
    assert len(made) == 2


def test_other_settings_seeds_corpora_and_versions_have_another_file(
    prepared: Prepared, corpus: Manifest, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared[0]
    index = corpus.data.index
    other = index.lengths.model_copy(update={"sha256": "0" * 64})
    another = index.model_copy(update={"lengths": other})
    cases = [
        (corpus, config, 3),
        (corpus, config, 4),
        (corpus, config.model_copy(update={"lanes": 2}), 3),
        (corpus, config.model_copy(update={"window_pairs": 100}), 3),
        (corpus, config.model_copy(update={"tokens_per_step": 1024}), 3),
        (replace(corpus, data=corpus.data.model_copy(update={"index": another})), config, 3),
    ]
    for count, (manifest, settings, seed) in enumerate(cases, 1):
        plan = open_plan(manifest, settings, seed, fewest_pairs=1)
        assert plan.digest == Plan.of(manifest, settings, seed).digest
        assert len(list((corpus.folder / FOLDER).glob("*.plan"))) == count
    monkeypatch.setattr("data_shards.plan_file.PLAN_FORMAT", PLAN_FORMAT + 1)
    made.clear()
    open_plan(*cases[0], fewest_pairs=1)
    assert len(made) == 1


def test_a_file_under_the_name_of_another_is_not_taken(
    prepared: Prepared, corpus: Manifest, made: list[int]
) -> None:
    config = prepared[0]
    open_plan(corpus, config, 3, fewest_pairs=1)
    wanted = kept(corpus)
    content = wanted.read_bytes()
    wanted.unlink()
    open_plan(corpus, config, 4, fewest_pairs=1)
    kept(corpus).rename(wanted)
    open_plan(corpus, config, 3, fewest_pairs=1)
    assert len(made) == 3
    assert wanted.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_serves_as_well(
    prepared: Prepared, corpus: Manifest, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared[0]

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    expected = steps(Plan.of(corpus, config, 3))
    assert steps(open_plan(corpus, config, 3, fewest_pairs=1)) == expected
    assert not (corpus.folder / FOLDER).exists()
    monkeypatch.undo()
    # Full, which is found only when the file is written.
    monkeypatch.setattr("os.fsync", refused)
    assert steps(open_plan(corpus, config, 3, fewest_pairs=1)) == expected
    assert [path.name for path in (corpus.folder / FOLDER).iterdir()] == [".lock"]


def test_only_the_last_used_files_are_kept(
    prepared: Prepared, corpus: Manifest, made: list[int]
) -> None:
    for seed in range(12):
        open_plan(corpus, prepared[0], seed, fewest_pairs=1)
        open_plan(corpus, prepared[0], 0, fewest_pairs=1)  # in daily use
    assert len(list((corpus.folder / FOLDER).glob("*.plan"))) == 8
    assert len(made) == 12


def test_what_a_killed_rank_left_is_cleared(prepared: Prepared, corpus: Manifest) -> None:
    open_plan(corpus, prepared[0], 3, fewest_pairs=1)
    left = kept(corpus).with_name(f"{kept(corpus).name}.12345.part")
    left.touch()
    open_plan(corpus, prepared[0], 4, fewest_pairs=1)
    assert not left.exists()
