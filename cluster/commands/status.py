"""``babelray status``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.hints import runs_flag
from cluster.options import json_option, print_json, runs_option
from data_shards.errors import UserError

if TYPE_CHECKING:
    from cluster import ray_state
    from cluster.history import Histories
    from cluster.launch.records import Record
    from cluster.launch.target import Job
    from cluster.status import Details, Summary

_REFRESH_S = 2.0
# Each look is a job, or a process in a pod.
_REFRESH_THERE_S = 30.0

# Columns of the table that a narrow terminal can do without.
_LEAST_FIRST = (
    "workers", "epoch", "restarts", "BLEU", "checkpoint", "tokens/s", "loss", "left", "step",
)  # fmt: skip

_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@click.argument("run", required=False)
@runs_option
@click.option(
    "--watch",
    is_flag=True,
    help="Look again every two seconds (30 for a launched run), until Ctrl-C.",
)
@json_option
def status(run: str | None, runs: Path, watch: bool, as_json: bool) -> None:
    """Show how all runs stand, or all about the run RUN: attempts, workers, failures, what to do.

    Reads the files of runs, and asks the Ray of one that is being trained for its workers. Of a run
    that was launched on a cluster, it tells how the job stands, and asks there for the rest.

    \b
    Examples:
      babelray status
      babelray status demo --watch
    """

    from cluster.history import Histories
    from cluster.launch.remote import launched_elsewhere
    from cluster.naming import find_begun_run

    known = Histories()
    record = launched_elsewhere(run, runs) if run is not None else None

    def look() -> tuple[Any, str]:
        if record is not None:
            return _launched_run(record, runs, as_json=as_json)
        return _all_runs(runs, known) if run is None else _one_run(find_begun_run(run, runs), known)

    if not watch:
        value, text = look()
        print_json(value) if as_json else click.echo(text)
        return
    clear = _CLEAR if sys.stdout.isatty() else ""
    try:
        while True:
            value, text = look()
            click.echo(json.dumps(value, default=str) if as_json else clear + text)
            time.sleep(_REFRESH_S if record is None else _REFRESH_THERE_S)
    except KeyboardInterrupt:
        return


def _all_runs(runs: Path, known: Histories) -> tuple[Any, str]:
    from cluster.status import summaries

    if not runs.is_dir():
        raise UserError(
            f"--runs {runs}: there is no such folder: give the one that holds the runs, or start a "
            "run with babelray train"
        )
    found = summaries(runs, known)
    value = [dataclasses.asdict(run) for run in found]
    elsewhere = _elsewhere(runs, {run.name for run in found})
    if not found and not elsewhere:
        return value, f"no runs in {runs}: start one with babelray train"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [table(found, now=time.time(), width=width)] if found else []
    return value, "\n".join(lines + elsewhere)


def _elsewhere(runs: Path, seen: Collection[str]) -> list[str]:
    """A line for each run that was launched on a cluster; none is asked, which could take long."""
    from cluster.launch.records import launched, open_target

    return [
        f"{record.run}: launched on {open_target(record.place).describe()}; "
        f"babelray status {record.run}{runs_flag(runs)}"
        for record in launched(runs)
        if record.run not in seen
    ]


def _launched_run(record: Record, runs: Path, *, as_json: bool) -> tuple[Any, str]:
    from cluster.launch.records import open_target
    from cluster.launch.remote import relay

    target = open_target(record.place, runs)
    job = target.find(record.run)
    lines: list[str] = []
    problem = None
    if job is not None or record.place.kind == "ray":
        try:
            arguments = (record.run, "--json") if as_json else (record.run,)
            relay(record, "status", arguments, runs, lines.append)
        except UserError as error:
            problem = str(error)
        except click.exceptions.Exit as error:
            problem = f"babelray status ended there with exit status {error.exit_code}"
    value = {"job": job and dataclasses.asdict(job), "run": _parsed(lines), "problem": problem}
    head = f"{record.run}: {'no job' if job is None else _in_words_of(job)} on {target.describe()}"
    if job is None:
        head += " (it was removed there, or the cluster began anew; what the run saved stays)"
        lines.append(f"go on: babelray resume {record.run}{runs_flag(runs)}")
    facts = [("job", job.id), *job.facts] if job is not None else []
    width = max((len(name) for name, _ in facts), default=0)
    found = [head, *(f"  {name.ljust(width)}  {fact}" for name, fact in facts)]
    if problem is not None:
        found += ["", problem]
    return value, "\n".join([*found, "", *lines] if lines else found)


def _in_words_of(job: Job) -> str:
    attempt = f", attempt {job.attempt} of {job.attempts}" if job.attempts > 1 else ""
    return f"{job.phase}{attempt}" + (f" ({job.message})" if job.message else "")


def _parsed(lines: Sequence[str]) -> Any:
    text = "\n".join(lines)
    try:
        return json.loads(text[text.index("{") :])
    except ValueError:
        return None


def _one_run(run_dir: Path, known: Histories) -> tuple[Any, str]:
    from cluster.ray_state import RayStateError, attempts
    from cluster.status import details

    found = details(run_dir, known)
    url, in_ray, problem = found.ray.get("dashboard_url"), None, None
    # The private Ray of a run is gone with it; one of several machines remembers.
    if url and (found.summary.is_live or found.ray.get("is_local") is False):
        try:
            in_ray = attempts(url, run_dir)
        except RayStateError as error:
            problem = str(error)
    value = dataclasses.asdict(found)
    value["ray_attempts"] = in_ray and [dataclasses.asdict(attempt) for attempt in in_ray]
    value["ray_problem"] = problem
    return value, page(found, in_ray, problem, now=time.time())


def table(runs: Sequence[Summary], *, now: float, width: int | None = None) -> str:
    """All runs, one a line.

    Args:
        width: of the terminal; what matters least is left out where there is no room for it.
    """
    columns = {
        "run": [run.name for run in runs],
        "state": [_state(run) for run in runs],
        "step": [_of(run.step, run.max_steps) for run in runs],
        "epoch": [_number(run.epoch, "d") for run in runs],
        "loss": [_number(run.loss, ".4f") for run in runs],
        "BLEU": [_number(run.bleu, ".2f") for run in runs],
        "tokens/s": [
            _number(run.tokens_per_second if run.state == "training" else None, ",.0f")
            for run in runs
        ],
        "left": [run.left or "-" for run in runs],
        "workers": [_number(run.workers, "d") for run in runs],
        "checkpoint": [
            "-" if run.checkpoint_time is None else _ago(run.checkpoint_time, now) for run in runs
        ],
        "restarts": [str(run.restarts) for run in runs],
    }
    least_first = list(_LEAST_FIRST)
    while True:
        rows = [tuple(columns), *zip(*columns.values(), strict=True)]
        lines = _columns(rows)
        if width is None or not least_first or max(map(len, lines)) <= width:
            break
        del columns[least_first.pop(0)]
    return "\n".join(line if width is None else _cut(line, width) for line in lines)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(1, width) - 1] + "…"


def page(
    found: Details,
    in_ray: Sequence[ray_state.Attempt] | None,
    problem: str | None,
    *,
    now: float,
) -> str:
    """All about one run."""
    run = found.summary
    lines = [f"{run.name}: {_state(run)}" + _why(run), *_facts(found, now)]
    lines += _section("attempts", [_attempt(number, a) for number, a in enumerate(found.attempts)])
    lines += _section("workers", _workers(found, in_ray, problem))
    lines += _section(
        "failures", [f"{_time(e['time'])}  {_in_words(e)}" for e in found.failures[-5:]]
    )
    lines += _section(
        "last events", [f"{_time(e.get('time'))}  {_event(e)}" for e in found.last_events]
    )
    return "\n".join([*lines, "", *_what_next(found)])


def _facts(found: Details, now: float) -> list[str]:
    run = found.summary
    facts = [
        ("step", _of(run.step, run.max_steps) + f", epoch {_number(run.epoch, 'd')}"),
        ("loss", f"{_number(run.loss, '.4f')}, validation {_number(run.valid_nll, '.4f')}"),
        ("BLEU", run.bleu is not None and f"{run.bleu:.2f} ({run.bleu_of})"),
        (
            "speed",
            run.state == "training"
            and run.tokens_per_second is not None
            and f"{run.tokens_per_second:,.0f} tokens/s on {_number(run.workers, 'd')} workers",
        ),
        ("left", run.left),
        (
            "last event",
            run.last_event_time is not None and f"{_ago(run.last_event_time, now)} ago",
        ),
        ("checkpoints", _checkpoints(found, now)),
        ("folder", str(found.run_dir)),
        ("Ray dashboard", run.is_live and found.ray.get("dashboard_url")),
        ("metrics", ", ".join(f"http://{target}/metrics" for target in found.targets)),
    ]
    width = max(len(name) for name, _ in facts)
    return [f"  {name.ljust(width)}  {value}" for name, value in facts if value]


def _checkpoints(found: Details, now: float) -> str:
    if not found.checkpoints:
        return "none yet"
    best = f", best {found.best_step}" if found.best_step is not None else ""
    at = found.summary.checkpoint_time
    age = f"; the last {_ago(at, now)} ago" if at is not None else ""
    steps = ", ".join(map(str, found.checkpoints[-6:]))
    return f"{steps}{best}{age} ({found.checkpoints_in})"


def _attempt(number: int, attempt: Any) -> str:
    number_of = "?" if attempt.workers is None else attempt.workers
    workers = f"{number_of} worker{'' if attempt.workers == 1 else 's'}"
    ended = "running" if attempt.end is None else attempt.end
    lasted = f" after {_clock(attempt.ended - attempt.started)}" if attempt.ended else ""
    return (
        f"{number + 1}  {_time(attempt.started)}  {workers}"
        f"  steps {attempt.from_step} to {attempt.to_step}  {ended}{lasted}"
    )


def _workers(
    found: Details, in_ray: Sequence[ray_state.Attempt] | None, problem: str | None
) -> list[str]:
    if problem is not None:
        return [f"Ray does not tell: {problem}"]
    if in_ray is None:
        return []
    if not in_ray:
        return ["Ray knows no attempt of this run yet"]
    current = in_ray[-1]
    rows = [("rank", "machine", "address", "process", "supervisor", "GPUs", "state")]
    rows += [
        (
            str(worker.rank),
            worker.node_id[:8],
            worker.node_ip,
            str(found.rank_pids.get(worker.rank, "-")),
            str(worker.pid),
            ",".join(map(str, worker.gpus)) or "-",
            (worker.status or "-").lower(),
        )
        for worker in current.workers
    ]
    return [
        f"attempt {len(in_ray)} in Ray: {current.status.lower()}"
        + (f" ({current.detail})" if current.detail else ""),
        *_columns(rows),
    ]


def _what_next(found: Details) -> list[str]:
    run, where = found.summary, runs_flag(found.run_dir.parent)
    if run.state == "finished":
        return [f"next: babelray evaluate {run.name}{where}"]
    if not run.is_live:
        # A message of a failure says what to mend; it stands above.
        go_on = (
            "go on from the last checkpoint"
            if found.checkpoints
            else "start it again, from its beginning"
        )
        return [
            f"logs: babelray logs {run.name}{where}",
            f"{go_on}: babelray resume {run.name}{where}",
        ]
    return [f"logs: babelray logs {run.name} --follow{where}"]


def _event(event: dict[str, Any]) -> str:
    if event["event"] in {"commanded", "worker_failed", "waiting", "resized", "stopped"}:
        return _in_words(event)
    skip = {
        "event", "time", "attempt", "failures_seen", "pairs", "lanes", "data_hash", "machine",
        "versions",
    }  # fmt: skip
    values = (
        f"{key} {_plain(value)}"
        for key, value in event.items()
        if key not in skip and value is not None and not isinstance(value, dict | list)
    )
    return f"{event['event']}: {', '.join(values)}"


def _in_words(event: dict[str, Any]) -> str:
    from cluster.status import say_failure

    return say_failure(event)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _state(run: Summary) -> str:
    return f"finished ({run.why})" if run.state == "finished" and run.why else run.state


def _why(run: Summary) -> str:
    return f" ({run.why})" if run.why and run.state != "finished" else ""


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned: list[Callable[[str, int], str]] = [
        str.ljust if index < 2 else str.rjust for index in range(len(widths))
    ]
    return [
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _of(step: int | None, max_steps: int | None) -> str:
    if step is None:
        return "-"
    return f"{step:,}" + (f" of {max_steps:,}" if max_steps is not None else "")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    from cluster.progress import duration

    return duration(seconds)


def _ago(then: float, now: float) -> str:
    """As people say it: 42 s, 7 min, 3 h, 5 d."""
    seconds = max(0.0, now - then)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
