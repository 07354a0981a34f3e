"""``babelray status`` and ``babelray logs``: what the files of runs tell, alive and dead."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster import history, logs, ray_state
from cluster.cli import cli
from cluster.commands.status import table
from cluster.failures import note
from cluster.naming import claim
from cluster.status import details, say_failure, summaries, summary

NOW = 1_800_000_000.0


def make_run(runs: Path, name: str = "demo", **trainer: Any) -> Path:
    run_dir = runs / name
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"trainer": {"max_steps": 1000, **trainer}}))
    return run_dir


def log(run_dir: Path, *events: dict[str, Any], file: str = "events.jsonl") -> None:
    with (run_dir / file).open("a") as stream:
        stream.writelines(json.dumps(event) + "\n" for event in events)


def event(kind: str, at: float, **values: Any) -> dict[str, Any]:
    return {"event": kind, **values, "time": NOW + at}


def steps(first: int, last: int, *, at: float, pace_s: float = 0.5) -> list[dict[str, Any]]:
    return [
        event(
            "step", at + (step - first) * pace_s, step=step, epoch=step // 100, world_size=2,
            mean_loss=5.0 - step / 1000, tokens_per_second=1234.5, elapsed_s=step * pace_s,
        )
        for step in range(first, last + 1, 10)
    ]  # fmt: skip


def failed(at: float, *, final: bool = False, **values: Any) -> dict[str, Any]:
    values = {"cause": "killed", "ranks": [1], "message": "rank 1 died", **values}
    return event("worker_failed", at, final=final, restarts_left=2, **values)


def babelray(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


START = event("started", 0, step=0, world_size=2)
FAILURES = "logs/failures.jsonl"


def held(run_dir: Path) -> Any:
    """The run as a command that took it at ``NOW`` holds it."""
    context = claim(run_dir)

    class Held:
        def __enter__(self) -> None:
            context.__enter__()
            os.utime(run_dir / ".lock", (NOW - 1, NOW - 1))

        def __exit__(self, *exception: Any) -> None:
            context.__exit__(*exception)

    return Held()


@pytest.mark.parametrize(
    ("events", "failures", "state", "why"),
    [
        ([], [], "interrupted", "before its first step"),
        ([START, *steps(10, 50, at=5)], [], "interrupted", None),
        ([START, event("finished", 9, step=9, reason="max_steps")], [], "finished", "max_steps"),
        ([START, event("finished", 9, step=9, reason="stopped")], [], "stopped", None),
        # It was resumed after its end, and killed.
        (
            [START, event("finished", 9, step=9, reason="stopped"), event("resumed", 20, step=9)],
            [],
            "interrupted",
            None,
        ),
        ([START], [failed(9, final=True)], "failed", "rank 1 died"),
        ([START], [failed(9)], "interrupted", None),
        ([START, event("resumed", 20, step=0)], [failed(9, final=True)], "interrupted", None),
    ],
)
def test_the_state_of_a_dead_run(
    tmp_path: Path,
    events: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    state: str,
    why: str | None,
) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, *events)
    log(run_dir, *failures, file=FAILURES)
    found = summary(run_dir)
    assert (found.state, found.why, found.is_live) == (state, why, False)


@pytest.mark.parametrize(
    ("events", "failures", "state"),
    [
        ([], [], "starting"),
        ([event("finished", -50, step=9, reason="stopped")], [failed(-60)], "starting"),
        ([START], [], "training"),
        ([START], [failed(5)], "restarting"),
        ([START, event("resumed", 8, step=0)], [failed(5)], "training"),
        ([START], [failed(5), event("waiting", 6, room=1, needed=2)], "waiting for machines"),
        ([START], [event("resized", 6, **{"from": 2, "to": 1}, planned=False)], "restarting"),
        ([START, event("finished", 9, step=9, reason="max_steps")], [], "ending"),
    ],
)
def test_the_state_of_a_live_run(
    tmp_path: Path, events: list[dict[str, Any]], failures: list[dict[str, Any]], state: str
) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, *events)
    log(run_dir, *failures, file=FAILURES)
    with held(run_dir):
        found = summary(run_dir, now=NOW + 10)
    assert (found.state, found.is_live) == (state, True)


def test_a_summary_says_where_the_run_stands(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, patience=None, validate_every=1000)
    log(
        run_dir, START, *steps(10, 200, at=5),
        event("validated", 101, step=200, valid_nll=2.5),
        event("checkpoint", 102, step=200),
        event("evaluated", 103, step=200, test_set="valid", bleu=11.5),
    )  # fmt: skip
    log(run_dir, failed(-5), failed(-4), file=FAILURES)
    with held(run_dir):
        found = summary(run_dir, now=NOW + 110)
    assert (found.step, found.max_steps, found.epoch, found.workers) == (200, 1000, 2, 2)
    assert found.loss == pytest.approx(4.8)
    assert (found.valid_nll, found.bleu, found.bleu_of) == (2.5, 11.5, "valid, step 200")
    assert (found.checkpoint_step, found.checkpoint_time) == (200, NOW + 102)
    assert found.restarts == 2
    assert found.last_event_time == NOW + 103
    # 800 steps of half a second are left, less the 10 s since step 200 was logged at 100 s.
    assert found.seconds_left == pytest.approx(390, abs=5)


def test_the_newest_test_set_result_is_the_bleu(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, START, event("evaluated", 5, step=9, test_set="valid", bleu=11.5))
    (run_dir / "evaluation").mkdir()
    for name, bleu, at in (("old", 20.0, 1.0), ("new", 21.0, 2.0)):
        result = {"test_set": name, "checkpoint": "best", "bleu": bleu, "time": at}
        (run_dir / "evaluation" / f"{name}-best.json").write_text(json.dumps(result))
    (run_dir / "evaluation" / "torn.json").write_text('{"bleu": 9')
    found = summary(run_dir)
    assert (found.bleu, found.bleu_of) == (21.0, "new, best")


def test_a_resumed_run_stands_where_its_checkpoint_does(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, START, *steps(10, 50, at=1), event("resumed", 60, step=40, world_size=1))
    found = summary(run_dir)
    assert (found.step, found.workers) == (40, 1)


def test_files_of_another_version_or_cut_short_are_no_reason_to_fail(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "config.json").write_text('["no", "object"]')
    (run_dir / "ray.json").write_text("{")
    log(run_dir, {"event": 5}, event("step", 1, step="x", mean_loss=None), event("unheard of", 2))
    with (run_dir / "events.jsonl").open("ab") as stream:
        stream.write(b'5\n\xff\n{"event": "step", "st')
    found = details(run_dir)
    assert (found.summary.state, found.summary.step) == ("interrupted", None)
    assert found.ray == {}
    assert babelray("status", "demo", "--runs", tmp_path).exit_code == 0


# A long log: 40,000 steps of 700 bytes since the start, the checkpoint far back.
LONG_STEP = 400_000


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("runs"), max_steps=2 * LONG_STEP)
    early = event("checkpoint", 1000, step=1000)
    log(run_dir, START, *steps(10, 1000, at=1, pace_s=1), early)
    for first in range(1010, LONG_STEP, 99_000):
        last = min(first + 98_999, LONG_STEP)
        some = steps(first, last, at=first, pace_s=1)
        log(run_dir, *({**step, "phases": "x" * 500} for step in some))
    return run_dir


def test_a_long_run_that_is_well_trains(long_log: Path) -> None:
    now = NOW + LONG_STEP
    with held(long_log):
        began = time.process_time()
        found = summary(long_log, now=now)
        took_s = time.process_time() - began
    assert (found.state, found.step) == ("training", LONG_STEP)
    assert found.tokens_per_second == 1234.5
    assert found.seconds_left == pytest.approx(LONG_STEP, rel=0.01)
    assert found.checkpoint_time == NOW + 1000
    assert took_s < 0.3  # parsing it all takes twice as long
    assert summary(long_log).state == "interrupted"
    assert details(long_log).attempts[0].to_step == LONG_STEP


def test_a_long_run_that_failed_says_why(long_log: Path) -> None:
    file = long_log / FAILURES
    try:
        log(long_log, failed(LONG_STEP + 1, final=True), file=FAILURES)
        found = details(long_log)
    finally:
        file.unlink()
    assert (found.summary.state, found.summary.why) == ("failed", "rank 1 died")
    assert found.attempts[0].end == "killed: rank 1 died"


def test_a_history_takes_up_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_NUM_RECENT", 3)
    run_dir = make_run(tmp_path)
    file = run_dir / "events.jsonl"
    known = history.History(file)
    assert known.read() == []
    log(run_dir, START, *steps(10, 60, at=1), event("validated", 50, step=60))
    with file.open("a") as stream:
        stream.write('{"event": "step", "st')
    told = [(e["event"], e["step"]) for e in known.read()]
    assert told == [("started", 0), ("step", 50), ("step", 60), ("validated", 60)]
    with file.open("a") as stream:
        stream.write('ep": 70}\nbroken\n')
    log(run_dir, *steps(80, 100, at=70))
    told = [(e["event"], e["step"]) for e in known.read()]
    assert told == [
        ("started", 0), ("step", 60), ("validated", 60),
        ("step", 70),  # the last before a line that is no step
        ("step", 80), ("step", 90), ("step", 100),
    ]  # fmt: skip
    file.unlink()
    assert known.read() == []
    log(run_dir, START)
    assert known.read() == [START]  # begun anew


def test_watching_reads_only_what_is_new(long_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took_s: list[float] = []
    began = time.process_time()

    def sleep(seconds: float) -> None:
        nonlocal began
        took_s.append(time.process_time() - began)
        if len(took_s) == 3:
            raise KeyboardInterrupt
        began = time.process_time()

    monkeypatch.setattr(time, "sleep", sleep)
    result = babelray("status", "demo", "--runs", long_log.parent, "--watch")
    assert result.stdout.count("steps 0 to 400000") == 3
    assert max(took_s[1:]) < 0.1


def test_steps_without_a_start_are_training(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    # The clock of the machine that trains was behind when it started.
    log(run_dir, event("started", -3, step=0), *steps(10, 50, at=2))
    with held(run_dir):
        assert summary(run_dir, now=NOW + 30).state == "training"


def test_a_command_that_only_starts(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, START, *steps(10, 50, at=-50))
    log(run_dir, failed(-20), event("commanded", 1), file=FAILURES)
    with held(run_dir):
        assert summary(run_dir).state == "starting"
        assert summary(run_dir).why is None
        page = babelray("status", "demo", "--runs", tmp_path).stdout
    assert "a command starts the run, or goes on with it" in page
    found = summary(run_dir)
    assert (found.state, found.why) == ("interrupted", "while its workers were starting")
    log(run_dir, event("stopped", 2, step=50), file=FAILURES)
    found = summary(run_dir)
    assert (found.state, found.why, found.step) == ("stopped", None, 50)


def test_a_run_without_checkpoints_begins_again(tmp_path: Path) -> None:
    make_run(tmp_path)
    page = babelray("status", "demo", "--runs", tmp_path).stdout
    assert "none yet" in page
    assert "last checkpoint" not in page
    again = f"start it again, from its beginning: babelray resume demo --runs {tmp_path}"
    assert again in page


def test_a_narrow_terminal_gets_what_matters_most(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "demo-with-a-rather-long-name")
    log(run_dir, START, *steps(10, 500, at=1), event("finished", 9, step=500, reason="max_steps"))
    found = summaries(tmp_path)
    whole = table(found, now=NOW)
    assert table(found, now=NOW, width=200) == whole
    for width in (100, 80, 60, 40, 10):
        lines = table(found, now=NOW, width=width).splitlines()
        assert len(lines) == 2
        assert max(map(len, lines)) <= width
    head, row = table(found, now=NOW, width=80).splitlines()
    assert head.split() == ["run", "state", "step", "loss", "left"]
    assert row.endswith("500 of 1,000  4.5000     -")


def test_details_tell_the_attempts_and_how_each_ended(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    log(
        run_dir, START, *steps(10, 50, at=1), event("checkpoint", 22, step=40),
        event("resumed", 60, step=40, world_size=2), *steps(50, 60, at=61),
        event("handed_over", 70, step=60), event("resumed", 80, step=60, world_size=1),
        event("resumed", 90, step=60, world_size=2), event("finished", 99, step=80, reason="max"),
    )  # fmt: skip
    log(run_dir, failed(30), file=FAILURES)
    (run_dir / "checkpoints" / "step-00000040").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000040" / "COMMIT").touch()
    (run_dir / "checkpoints" / "step-00000060").mkdir()
    (run_dir / "best.json").write_text('{"step": 40}')
    found = details(run_dir)
    assert [(a.from_step, a.to_step, a.workers, a.end) for a in found.attempts] == [
        (0, 50, 2, "killed: rank 1 died"),
        (40, 60, 2, "handed over to other workers"),
        (60, 60, 1, "interrupted"),
        (60, 60, 2, "max"),
    ]
    assert found.attempts[0].ended == NOW + 30
    assert (found.checkpoints, found.best_step) == ([40], 40)
    assert [kind["event"] for kind in found.last_events[-2:]] == ["resumed", "finished"]
    assert all(kind["event"] != "step" for kind in found.last_events)


def test_checkpoints_in_a_remote_storage_are_those_that_were_logged(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "config.json").write_text('{"recovery": {"storage": "s3://bucket/runs"}}')
    log(run_dir, START, event("checkpoint", 5, step=40), event("checkpoint", 6, step=20))
    found = details(run_dir)
    assert found.checkpoints == [20, 40]
    assert found.checkpoints_in == "s3://bucket/runs/demo/checkpoints"


def test_the_table_names_every_run_and_live_ones_first(tmp_path: Path) -> None:
    for name, at in (("old", 0.0), ("new", 100.0)):
        log(make_run(tmp_path, name), event("started", at, step=0))
    (tmp_path / ".prometheus").mkdir()
    (tmp_path / "no-run").mkdir()
    starting = tmp_path / "starting"
    starting.mkdir()
    with claim(starting):  # its configuration is not written yet
        found = summaries(tmp_path)
        result = babelray("status", "--runs", tmp_path)
        assert babelray("status", "starting", "--runs", tmp_path).exit_code == 0
    assert [run.name for run in found] == ["starting", "new", "old"]
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert [line.split()[0] for line in lines[1:]] == ["starting", "new", "old"]


def test_no_runs_and_a_wrong_name(tmp_path: Path) -> None:
    result = babelray("status", "--runs", tmp_path)
    assert result.exit_code == 0
    assert "no runs in" in result.stdout
    assert babelray("status", "--runs", tmp_path, "--json").stdout == "[]\n"
    make_run(tmp_path)
    result = babelray("status", "--runs", tmp_path / "typo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no such folder" in result.stderr
    result = babelray("status", "dem", "--runs", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean demo?" in result.stderr


def test_the_page_of_a_live_run_has_rays_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, START, *steps(10, 50, at=1))
    (run_dir / "ray.json").write_text('{"dashboard_url": "http://ray:1", "is_local": true}')
    (run_dir / "logs" / "rank-001.log").write_text("rank 1 of 2, process 77, 1 threads\n")
    targets = tmp_path / ".prometheus" / "demo.json"
    targets.parent.mkdir()
    targets.write_text('[{"targets": ["127.0.0.1:9400"], "labels": {}}]')
    worker = ray_state.Worker(1, 1, "node", "10.0.0.7", 66, (3,), "ALIVE", None)
    attempt = ray_state.Attempt("RUNNING", None, NOW, None, (worker,))
    monkeypatch.setattr(ray_state, "attempts", lambda url, folder: (attempt,))
    with held(run_dir):
        page = babelray("status", "demo", "--runs", tmp_path).stdout
        value = json.loads(babelray("status", "demo", "--runs", tmp_path, "--json").stdout)
    row = next(line for line in page.splitlines() if "10.0.0.7" in line)
    assert row.split() == ["1", "node", "10.0.0.7", "77", "66", "3", "alive"]
    assert "http://ray:1" in page
    assert "http://127.0.0.1:9400/metrics" in page
    assert f"babelray logs demo --follow --runs {tmp_path}" in page
    assert value["ray_attempts"][0]["workers"][0]["node_ip"] == "10.0.0.7"
    assert value["summary"]["state"] == "training"
    # A command that was killed leaves the file of its targets behind.
    assert "9400" not in babelray("status", "demo", "--runs", tmp_path).stdout


def test_a_ray_that_does_not_answer_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, folder: Path) -> None:
        raise ray_state.RayStateError(f"nothing answers at {url}")

    monkeypatch.setattr(ray_state, "attempts", refuse)
    run_dir = make_run(tmp_path)
    log(run_dir, START)
    (run_dir / "ray.json").write_text('{"dashboard_url": "http://ray:1", "is_local": true}')
    with held(run_dir):
        result = babelray("status", "demo", "--runs", tmp_path)
    assert result.exit_code == 0
    assert "Ray does not tell: nothing answers at http://ray:1" in result.stdout
    # The private Ray of a dead run is gone: it is not asked.
    dead = babelray("status", "demo", "--runs", tmp_path).stdout
    assert "does not tell" not in dead
    assert f"babelray resume demo --runs {tmp_path}" in dead


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (failed(0), "rank 1 died [killed]; restarting, 2 more borne"),
        (failed(0, final=True), "rank 1 died [killed]; the run ended"),
        (event("waiting", 0, room=1, needed=2), "room for 1 of at least 2"),
        (event("resized", 0, to=1, **{"from": 2}), "1 worker instead of 2 (after a failure)"),
        (event("unheard of", 0, number=3), 'unheard of: {"number": 3}'),
    ],
)
def test_failures_in_words(values: dict[str, Any], words: str) -> None:
    assert words in say_failure(values)


def stamped(second: int, text: str) -> str:
    return f"2026-11-23 00:00:{second:02d},000 INFO x: {text}\n"


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    run_dir = make_run(tmp_path)
    folder = run_dir / "logs"
    (folder / "rank-000.log").write_text(
        stamped(1, "a") + stamped(4, "d") + "Traceback\n  of d\n" + stamped(6, "f")
    )
    (folder / "rank-001.log").write_text(stamped(2, "b") + stamped(5, "e") + "torn")
    (folder / "driver.log").write_text("Ray says\n")
    note(run_dir, "waiting", room=1, needed=2)
    return run_dir


def test_logs_merge_the_ranks_by_time(logged: Path) -> None:
    lines = babelray("logs", "demo", "--runs", logged.parent).stdout.splitlines()
    assert [(line[:8], line.split(" | ")[1].split(": ")[-1]) for line in lines] == [
        ("rank 0 |", "a"), ("rank 1 |", "b"), ("rank 0 |", "d"), ("rank 0 |", "Traceback"),
        ("rank 0 |", "  of d"), ("rank 1 |", "e"), ("rank 0 |", "f"), ("rank 1 |", "torn"),
    ]  # fmt: skip
    few = babelray("logs", "demo", "--runs", logged.parent, "--lines", 2).stdout.splitlines()
    assert few == [*lines[5:7], lines[7]]


def test_one_log_at_a_time(logged: Path) -> None:
    runs = logged.parent
    assert babelray("logs", "demo", "--runs", runs, "--rank", 1).stdout.endswith(": e\ntorn\n")
    assert babelray("logs", "demo", "--runs", runs, "--driver").stdout == "Ray says\n"
    assert (
        "room for 1 of at least 2" in babelray("logs", "demo", "--runs", runs, "--failures").stdout
    )
    result = babelray("logs", "demo", "--runs", runs, "--rank", 5)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no log of rank 5; there are: rank 0, rank 1" in result.stderr
    assert babelray("logs", "demo", "--runs", runs, "--rank", 1, "--driver").exit_code == 2


def test_no_failures_is_no_mistake(tmp_path: Path) -> None:
    make_run(tmp_path)
    result = babelray("logs", "demo", "--runs", tmp_path, "--failures")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no failures so far" in result.stderr
    assert babelray("logs", "demo", "--runs", tmp_path).exit_code == 2
    note(tmp_path / "demo", "commanded")
    result = babelray("logs", "demo", "--runs", tmp_path, "--failures")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no failures so far" in result.stderr
    note(tmp_path / "demo", "stopped", step=20)
    result = babelray("logs", "demo", "--runs", tmp_path, "--failures")
    assert result.stdout.endswith("  stopped while no workers were running\n")
    assert result.stderr == ""


def test_following_goes_on_over_restarts_and_ends_with_the_run(
    logged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_POLL_S", 0.01)
    seen: list[str] = []
    found = logs.rank_logs(logged)
    assert len(logs.last_lines(found, 100)) == 7

    def read() -> None:
        following = logs.follow(logged, found, more=lambda: logs.rank_logs(logged))
        seen.extend(f"{line.label}: {line.text}" for line in following)

    def until(line: str) -> None:
        deadline = time.monotonic() + 5
        while line not in seen and time.monotonic() < deadline:
            time.sleep(0.005)
        assert line in seen

    folder = logged / "logs"
    reader = threading.Thread(target=read)
    with claim(logged):
        reader.start()
        with (folder / "rank-001.log").open("a") as stream:
            stream.write(" is whole\nhalf")
        until("rank 1: torn is whole")
        assert "rank 1: half" not in seen
        (folder / "rank-002.log").write_text("late\n")  # a rank that came up since
        until("rank 2: late")
        (folder / "rank-000.log").write_text("anew\n")  # cut down, as by --overwrite
        until("rank 0: anew")
        (folder / "new").write_text("replaced\n")
        (folder / "new").rename(folder / "rank-000.log")
        until("rank 0: replaced")
    reader.join(5)
    assert not reader.is_alive()
    assert seen[-1] == "rank 1: half"  # its writer is dead: this is all there is
    assert len(seen) == 5


def test_following_a_dead_run_says_so(logged: Path) -> None:
    result = babelray("logs", "demo", "--runs", logged.parent, "--follow")
    assert result.exit_code == 0
    assert "is not being trained" in result.stderr
    assert "torn" in result.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_looks_again_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    run_dir = make_run(tmp_path)
    log(run_dir, START)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        log(run_dir, *steps(10, 20, at=1))

    monkeypatch.setattr(time, "sleep", sleep)
    result = babelray("status", "--runs", tmp_path, "--watch", *(["--json"] if as_json else []))
    assert result.exit_code == 0
    if as_json:
        assert [json.loads(line)[0]["step"] for line in result.stdout.splitlines()] == [0, 20]
    else:
        assert ["20 of 1,000" in line for line in result.stdout.splitlines()] == [
            False, False, False, True,
        ]  # fmt: skip
        assert "\x1b" not in result.stdout  # no terminal
