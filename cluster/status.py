"""How runs stand, told from the files that they leave: quick, and true of dead runs as well.

``summary`` tells what a table of many runs needs, ``details`` the rest. Neither imports torch, Ray
or the trainer's code, and neither minds a configuration or an event of another version.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.history import Event, Histories, History
from cluster.naming import is_claimed, logs_dir
from cluster.targets import targets_path
from cluster.time_left import Left, TimeLeft
from trainer.config import TrainerConfig

# The end of a rank's log that is looked at for its process.
_RECENT_BYTES = 1 << 20

_RANK_STARTED = re.compile(r"rank (\d+) of \d+, process (\d+)")


@dataclass(frozen=True)
class Summary:
    """One run in a line; what is not known is None. Times are Unix seconds, losses nats a token.

    ``state`` is starting, training, restarting, waiting for machines or ending while a command
    trains the run, and finished, stopped, failed or interrupted when none does; ``why`` says more.
    """

    name: str
    state: str
    why: str | None = None
    is_live: bool = False
    step: int | None = None
    max_steps: int | None = None
    epoch: int | None = None
    loss: float | None = None
    valid_nll: float | None = None
    bleu: float | None = None
    bleu_of: str | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    left: str | None = None
    workers: int | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    restarts: int = 0
    last_event_time: float | None = None


@dataclass
class Attempt:
    """The work of one group of ranks, between a start and whatever ended it."""

    started: float
    from_step: int
    to_step: int
    workers: int | None
    ended: float | None = None
    end: str | None = None


@dataclass(frozen=True)
class Details:
    """All that a run's files tell."""

    summary: Summary
    run_dir: Path
    attempts: list[Attempt]
    failures: list[Event]
    checkpoints: list[int]
    checkpoints_in: str
    best_step: int | None
    last_events: list[Event]
    targets: list[str]
    ray: dict[str, Any]
    rank_pids: dict[int, int] = field(default_factory=dict)


def summaries(runs: Path, known: Histories | None = None) -> list[Summary]:
    """All runs of a folder: those that are being trained first, then the latest.

    Args:
        known: what was read before; given again at each look, only what is new is read.
    """
    found = [summary(folder, known) for folder in run_folders(runs)]
    return sorted(found, key=lambda run: (not run.is_live, -(run.last_event_time or 0.0), run.name))


def run_folders(runs: Path) -> list[Path]:
    """The folders under ``runs`` that hold a run, one that is only starting included."""
    if not runs.is_dir():
        return []
    return [
        folder
        for folder in sorted(runs.iterdir())
        if not folder.name.startswith(".")
        and folder.is_dir()
        and ((folder / "config.json").is_file() or is_claimed(folder))
    ]


def summary(run_dir: Path, known: Histories | None = None, *, now: float | None = None) -> Summary:
    """How a run stands."""
    events = (known or Histories()).events(run_dir)
    return _summary(run_dir, events, read_failures(run_dir), now or time.time())


def details(run_dir: Path, known: Histories | None = None, *, num_events: int = 8) -> Details:
    """All about a run; its last ``num_events`` events are those of other kinds than "step"."""
    events = (known or Histories()).events(run_dir)
    failures = read_failures(run_dir)
    stands = _summary(run_dir, events, failures, time.time())
    checkpoints, where = _checkpoints(run_dir, events)
    told = sorted([*(e for e in events if e["event"] != "step"), *failures], key=_time)
    return Details(
        summary=stands,
        run_dir=run_dir,
        attempts=_attempts(events, failures, stands),
        failures=[event for event in failures if event["event"] == "worker_failed"],
        checkpoints=checkpoints,
        checkpoints_in=where,
        best_step=_integer(_read_json(run_dir / "best.json").get("step")),
        last_events=told[-num_events:],
        targets=scrape_targets(run_dir),
        ray=read_session(run_dir),
        rank_pids=_rank_pids(run_dir) if stands.is_live else {},
    )


def read_failures(run_dir: Path) -> list[Event]:
    """What went wrong and what was done about it, oldest first."""
    return History(logs_dir(run_dir) / "failures.jsonl").read()


def read_session(run_dir: Path) -> dict[str, Any]:
    """Where the run's Ray was last, as ``cluster.train`` notes it; empty while it is starting."""
    return _read_json(run_dir / "ray.json")


def scrape_targets(run_dir: Path) -> list[str]:
    """Where Prometheus finds the run's metrics now; none when it is not being trained."""
    if not is_claimed(run_dir):
        return []  # a command that was killed leaves its file
    try:
        groups = json.loads(targets_path(run_dir).read_text(encoding="utf-8"))
        return [str(target) for group in groups for target in group["targets"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def say_failure(event: Event) -> str:
    """A line of ``failures.jsonl`` in words."""
    kind = event.get("event")
    if kind == "commanded":
        return "a command starts the run, or goes on with it"
    if kind == "stopped":
        return "stopped while no workers were running"
    if kind == "worker_failed":
        left = event.get("restarts_left")
        message = f"{event.get('message')} [{event.get('cause')}]"
        if event.get("final"):
            return f"{message}; the run ended"
        return message + (f"; restarting, {left} more borne" if left is not None else "")
    if kind == "waiting":
        return (
            f"waiting for machines: room for {event.get('room')} of at least "
            f"{event.get('needed')} workers"
        )
    if kind == "resized":
        planned = "planned" if event.get("planned") else "after a failure"
        number = event.get("to")
        workers = f"{number} worker{'' if number == 1 else 's'}"
        return f"going on with {workers} instead of {event.get('from')} ({planned})"
    rest = {key: value for key, value in event.items() if key not in {"event", "time"}}
    return f"{kind}: {json.dumps(rest)}"


def _summary(run_dir: Path, events: list[Event], failures: list[Event], now: float) -> Summary:
    trainer = _section(_read_json(run_dir / "config.json"), "trainer")
    is_live = is_claimed(run_dir)
    state, why = _state(run_dir, events, failures, is_live=is_live)
    begun = _last(events, "started", "resumed") or {}
    step = _last(events, "step") or {}
    # A group that has resumed stands where its checkpoint does until it logs a step.
    position = _last(events, "step", "started", "resumed", "skipped", "finished") or {}
    checkpoint = _last(events, "checkpoint") or {}
    bleu, bleu_of = _bleu(run_dir, events)
    left = _left(events, trainer, now) if state == "training" else None
    times = [_time(event) for event in (*events[-1:], *failures[-1:])]
    return Summary(
        name=run_dir.name,
        state=state,
        why=why,
        is_live=is_live,
        step=_integer(position.get("step")),
        max_steps=_integer(trainer.get("max_steps")),
        epoch=_integer(step.get("epoch")),
        loss=_float(step.get("mean_loss", step.get("loss"))),
        valid_nll=_float((_last(events, "validated") or {}).get("valid_nll")),
        bleu=bleu,
        bleu_of=bleu_of,
        tokens_per_second=_float(step.get("tokens_per_second")),
        seconds_left=left.seconds if left is not None else None,
        left=str(left) if left is not None else None,
        workers=_integer(max((step, begun), key=_time).get("world_size")),
        checkpoint_step=_integer(checkpoint.get("step")),
        checkpoint_time=_float(checkpoint.get("time")),
        restarts=sum(
            event["event"] == "worker_failed" and not event.get("final") for event in failures
        ),
        last_event_time=max(times, default=None),
    )


def _state(
    run_dir: Path, events: list[Event], failures: list[Event], *, is_live: bool
) -> tuple[str, str | None]:
    # The lock is written when a command takes the run, and what came before is another command's.
    since = _modified(run_dir / ".lock") if is_live else 0.0
    events = [event for event in events if _time(event) >= since]
    failures = [event for event in failures if _time(event) >= since]
    found = (
        # A step without a start tells as much: the machines' clocks may differ.
        _last(events, "started", "resumed", "finished") or _last(events, "step", "validated"),
        _last(failures, "commanded", "worker_failed", "waiting", "resized", "stopped"),
    )
    turns = [event for event in found if event is not None]
    # Either log is in order, but a note of a failure may be of the same moment as a start.
    turn = max(turns, key=_time, default=None)
    kind = None if turn is None else turn["event"]
    if is_live:
        states = {
            None: "starting",
            "commanded": "starting",
            "finished": "ending",
            "stopped": "ending",
            "worker_failed": "restarting",
            "resized": "restarting",
            "waiting": "waiting for machines",
        }
        why = say_failure(turn) if turn in failures and kind != "commanded" else None
        return states.get(kind, "training"), why
    if turn is None:
        return "interrupted", "before its first step"
    if kind == "finished":
        reason = str(turn.get("reason"))
        return ("stopped", None) if reason == "stopped" else ("finished", reason)
    if kind == "worker_failed" and turn.get("final"):
        return "failed", str(turn.get("message"))
    if kind == "stopped":
        return "stopped", None
    return "interrupted", "while its workers were starting" if kind == "commanded" else None


def _left(events: list[Event], trainer: dict[str, Any], now: float) -> Left | None:
    """As the command that trains estimates it, less the time since the last logged step."""
    step = _last(events, "step")
    try:
        clock = TimeLeft(TrainerConfig.model_validate(trainer))
    except ValueError:
        return None  # of another version
    for event in events:
        clock.hear(event)
    left = clock.left()
    if left is None or step is None:
        return None
    return replace(left, seconds=max(0.0, left.seconds - (now - _time(step))))


def _attempts(events: list[Event], failures: list[Event], stands: Summary) -> list[Attempt]:
    found: list[Attempt] = []
    for event in sorted([*events, *failures], key=_time):
        kind, step = event["event"], _integer(event.get("step"))
        if kind in {"started", "resumed"}:
            _end(found, event, "interrupted")
            workers = _integer(event.get("world_size"))
            found.append(Attempt(_time(event), step or 0, step or 0, workers))
        elif kind == "worker_failed":
            _end(found, event, f"{event.get('cause')}: {event.get('message')}")
        elif kind == "handed_over":
            _end(found, event, "handed over to other workers")
        elif kind == "finished":
            _end(found, event, str(event.get("reason")))
        elif step is not None and found and kind in {"step", "skipped"}:
            found[-1].to_step = max(found[-1].to_step, step)
    if found and found[-1].end is None and not stands.is_live:
        found[-1].end = "interrupted"
    return found


def _end(attempts: list[Attempt], event: Event, how: str) -> None:
    if attempts and attempts[-1].end is None:
        attempts[-1].end, attempts[-1].ended = how, _time(event)


def _checkpoints(run_dir: Path, events: list[Event]) -> tuple[list[int], str]:
    """The committed steps, oldest first, and where they lie.

    A storage that is no folder is not asked: what the run has logged must do, and may name some
    that were removed since.
    """
    storage = _section(_read_json(run_dir / "config.json"), "recovery").get("storage")
    home = f"{storage}/{run_dir.name}/checkpoints" if storage else f"{run_dir}/checkpoints"
    if storage and "://" in storage:
        logged = {_integer(event.get("step")) for event in events if event["event"] == "checkpoint"}
        return sorted(step for step in logged if step is not None), home
    committed = (file.parent.name.partition("-")[2] for file in Path(home).glob("step-*/COMMIT"))
    return sorted(int(step) for step in committed if step.isdecimal()), home


def _bleu(run_dir: Path, events: list[Event]) -> tuple[float | None, str | None]:
    """The newest score of a test set, or else of validation while training; and of what it is."""
    results = [_read_json(file) for file in (run_dir / "evaluation").glob("*.json")]
    results = [result for result in results if _float(result.get("bleu")) is not None]
    if results:
        newest = max(results, key=_time)
        return newest["bleu"], f"{newest.get('test_set')}, {newest.get('checkpoint')}"
    scored = _last(events, "evaluated")
    if scored is None or _float(scored.get("bleu")) is None:
        return None, None
    return scored["bleu"], f"{scored.get('test_set')}, step {scored.get('step')}"


def _rank_pids(run_dir: Path) -> dict[int, int]:
    """The processes that train, as each rank's log last named it."""
    pids = {}
    for file in sorted(logs_dir(run_dir).glob("rank-*.log")):
        for line in _last_bytes(file, _RECENT_BYTES).decode(errors="replace").splitlines():
            if match := _RANK_STARTED.search(line):
                pids[int(match[1])] = int(match[2])
    return pids


def _last_bytes(file: Path, number: int) -> bytes:
    """The end of a file from the first whole line on, at most ``number`` bytes; none if missing."""
    try:
        with file.open("rb") as stream:
            start = max(0, stream.seek(0, 2) - number)
            stream.seek(start)
            content = stream.read()
    except FileNotFoundError:
        return b""
    return content.partition(b"\n")[2] if start else content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _last(events: Iterable[Event], *kinds: str) -> Event | None:
    return next((e for e in reversed(list(events)) if e["event"] in kinds), None)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _time(event: Event) -> float:
    return _float(event.get("time")) or 0.0


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) else None
