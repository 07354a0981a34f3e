"""What ranks write of themselves, as a scraper of their machine would see it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from trainer.metrics import (
    CAUSES,
    RankMetrics,
    RunMetrics,
    ServerMetrics,
    Slot,
    declared,
    declared_evaluation,
)
from trainer.metrics_page import page
from trainer.phases import PHASES

_REPO = Path(__file__).parents[3]


def exposition(folder: Path) -> str:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()


def scrape(folder: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(folder))
        for sample in family.samples
    }


def series(folder: Path, name: str, **labels: str) -> float | None:
    return scrape(folder).get(
        (f"babelray_{name}", tuple(sorted({"run": "demo", **labels}.items())))
    )


def test_counters_go_on_where_a_dead_rank_was_and_its_gauges_go(tmp_path: Path) -> None:
    slot = Slot(tmp_path, "rank0")
    before = RunMetrics("demo", slot)
    before.steps.inc(100)
    before.loss.set(2.5)
    before.last_step_time.set(1000.0)
    before.step_seconds.observe(0.2)
    slot.vacate()
    assert series(tmp_path, "loss_nats") is None
    assert series(tmp_path, "steps_total") == 100
    assert series(tmp_path, "last_step_timestamp_seconds") == 1000  # or no alert could see it age
    after = RunMetrics("demo", Slot(tmp_path, "rank0"))
    after.steps.inc(5)
    after.last_step_time.set(1010.0)
    after.step_seconds.observe(0.3)
    assert series(tmp_path, "steps_total") == 105
    assert series(tmp_path, "step_seconds_count") == 2
    assert series(tmp_path, "last_step_timestamp_seconds") == 1010
    assert series(tmp_path, "loss_nats") is None  # nothing was logged yet


def test_ranks_of_a_machine_add_up_and_stay_apart_where_they_should(tmp_path: Path) -> None:
    for rank in range(2):
        metrics = RankMetrics("demo", rank, Slot(tmp_path, f"rank{rank}"))
        metrics.phases["forward"].observe(0.25)
        metrics.busy.set(1.0 + rank)
        metrics.set_memory(allocated=1, reserved=2, peak=3 + rank)
    assert series(tmp_path, "step_phase_seconds_count", phase="forward") == 2
    assert series(tmp_path, "step_phase_seconds_sum", phase="forward") == 0.5
    assert series(tmp_path, "rank_busy_seconds", rank="1") == 2.0
    assert series(tmp_path, "gpu_memory_bytes", rank="1", kind="peak") == 4
    assert series(tmp_path, "steps_total") is None  # is the first rank's to tell


def test_what_is_not_known_is_absent(tmp_path: Path) -> None:
    metrics = RunMetrics("demo", Slot(tmp_path, "rank0"))
    RankMetrics("demo", 0, Slot(tmp_path, "rank0"))
    names = {name for name, _ in scrape(tmp_path)}
    assert not names & {
        "babelray_energy_joules_total",
        "babelray_valid_bleu",
        "babelray_gpu_memory_bytes",
        "babelray_rank_skew_ratio",
    }
    assert series(tmp_path, "restarts_total", cause="killed") == 0  # nothing is known, and it is 0
    metrics.add_energy("gpu", 3.5)
    assert series(tmp_path, "energy_joules_total", source="gpu") == 3.5


def test_a_full_disk_is_told_before_a_store_can_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        RunMetrics("demo", Slot(tmp_path, "rank0"))


def test_families_of_a_process_share_its_files(tmp_path: Path) -> None:
    slot = Slot(tmp_path, "rank0")
    rank = RankMetrics("demo", 0, slot)
    run = RunMetrics("demo", slot)
    for number in range(3):  # each makes series that the other does not know of
        rank.set_memory(allocated=number, reserved=number, peak=number)
        run.add_energy("gpu", 1.0)
        run.loss.set(number)
    assert series(tmp_path, "gpu_memory_bytes", rank="0", kind="peak") == 2
    assert series(tmp_path, "loss_nats") == 2
    assert all(file.stat().st_blocks * 512 >= 128 * 1024 for file in tmp_path.iterdir())


def test_the_environment_is_left_as_it_was(tmp_path: Path) -> None:
    environment = dict(os.environ)
    RunMetrics("demo", Slot(tmp_path, "rank0")).steps.inc()
    assert dict(os.environ) == environment


def test_series_are_bounded_by_ranks_causes_and_phases(tmp_path: Path) -> None:
    """A week of restarts must not make a new series or a new file."""

    def work() -> None:
        slot = Slot(tmp_path, "rank0")
        run, rank = RunMetrics("demo", slot), RankMetrics("demo", 0, slot)
        ServerMetrics("demo", Slot(tmp_path, "server")).started.set(1)
        run.describe(
            run=dict.fromkeys(
                ("corpus", "source", "target", "model", "parameters", "precision", "zero_stage"),
                "x",
            )
            | {"seed": "1"},
            manifest_sha256="f" * 64,
            build=dict.fromkeys(("version", "python", "torch", "deepspeed", "ray"), "1"),
        )
        for cause in CAUSES:
            run.recovery_seconds[cause].observe(1.0)
        for phase in PHASES:
            rank.phases[phase].observe(0.1)
        slot.vacate()

    work()
    first = set(scrape(tmp_path)), sorted(file.name for file in tmp_path.iterdir())
    for _ in range(5):
        work()
    assert (set(scrape(tmp_path)), sorted(file.name for file in tmp_path.iterdir())) == first


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    slot = Slot(tmp_path, "rank0")
    RunMetrics("demo", slot).loss.set(1.0)
    RankMetrics("demo", 0, slot).busy.set(1.0)
    ServerMetrics("demo", slot).started.set(1.0)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exposition(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_names_follow_the_rules() -> None:
    metrics = [*declared(), *declared_evaluation()]
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert re.fullmatch(r"babelray_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
        assert not re.search(r"_(ms|mb|kb|percent|minutes|hours)\b", metric.name)
        assert metric.help.endswith("."), metric


def test_the_page_is_what_the_declarations_say() -> None:
    page_file = _REPO / "docs" / "metrics.md"
    assert page_file.read_text(encoding="utf-8") == page(), "make docs writes it anew"
