"""``babelray profile``: ask a run for a profile, wait for it, and put together what it says.

The run's ranks do the work (``trainer.profile``); here are the person's side and the reckoning.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import status
from cluster.hints import runs_flag
from cluster.history import Histories
from cluster.naming import is_claimed
from data_shards.errors import RunFailedError, UserError
from trainer.config import RunConfig
from trainer.profile import PROFILE_FILE, ProfileRequest, folder_of, summary_name

if TYPE_CHECKING:
    from cluster.fit import Workers

_STEPS = re.compile(r"(\+?)(\d{1,9})(?::(\+?)(\d{1,9}))?")
_POLL_S = 0.3
# From the end of the last step to the summary: seconds for a large trace, not minutes.
_WRITING_S = 120.0
# From the end of the request to what became of it, on a slow file system.
_REFUSAL_S = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Steps:
    """The steps ``first`` to ``last``, from 1; or, ``relative``, counted from where a run is."""

    first: int
    last: int
    relative: bool = False

    @classmethod
    def parse(cls, text: str) -> Steps:
        """``10:15``, ``12``, or ``+2:+6``.

        Raises:
            UserError: something else.
        """
        match = _STEPS.fullmatch(text)
        if match is None or (match[4] is not None and match[1] != match[3]):
            raise UserError(
                f"--steps {text}: give the first and the last step, such as 100:105, or for a run "
                "that trains now +2:+6"
            )
        first = int(match[2])
        steps = cls(first, first if match[4] is None else int(match[4]), bool(match[1]))
        if steps.first > steps.last:
            raise UserError(f"--steps {text}: the first step comes first: {steps.last}:{first}")
        return steps

    def after(self, step: int) -> Steps:
        """As absolute steps of a run that has done ``step``."""
        return Steps(step + self.first, step + self.last) if self.relative else self


def parse_ranks(text: str) -> tuple[int, ...]:
    """``0``, ``0,3`` or ``all`` (which is no rank in particular).

    Raises:
        UserError: something else.
    """
    if text == "all":
        return ()
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise UserError(f"--ranks {text}: give ranks such as 0 or 0,3, or all")
    return tuple(sorted({int(rank) for rank in text.split(",")}))


def make_request(
    steps: Steps, ranks: tuple[int, ...], *, memory: bool, stacks: bool
) -> ProfileRequest:
    """A request that no other is like.

    Raises:
        UserError: too many steps.
    """
    token = secrets.token_hex(8)
    return ProfileRequest(steps.first, steps.last, ranks, memory, stacks, token)


def check_ranks(ranks: Sequence[int], workers: int | None) -> None:
    """Refuse ranks that a run of so many workers does not have.

    Raises:
        UserError: as said.
    """
    unknown = [rank for rank in ranks if workers is not None and rank >= workers]
    if unknown:
        raise UserError(
            f"--ranks: there is no rank {unknown[0]}: the run has {workers} "
            f"worker{'s' if workers != 1 else ''}, ranks 0 to {(workers or 1) - 1}"
        )


def settle(run_dir: Path, steps: Steps) -> tuple[Steps, status.Summary]:
    """Steps that a running run still has ahead, and how it stands.

    Raises:
        UserError: nothing trains the run, it is being profiled already, the steps are past or lie
            beyond its end.
    """
    stands = status.summary(run_dir)
    if not is_claimed(run_dir):
        go_on = f"babelray train --name {run_dir.name} --resume"
        where = runs_flag(run_dir.parent)
        if stands.state == "finished":
            raise UserError(
                f"the run {run_dir.name} has finished ({stands.why}, step {stands.step}): profile "
                f"a new run with --config, or give it more steps ({go_on} --set "
                f"trainer.max_steps=N{where}) and profile those"
            )
        raise UserError(
            f"the run {run_dir.name} is not training: go on with it ({go_on}{where}), or profile a "
            "new run with --config"
        )
    if (run_dir / PROFILE_FILE).exists():
        raise UserError(
            f"the run {run_dir.name} is being profiled already: wait for it, or remove "
            f"{run_dir / PROFILE_FILE}"
        )
    done = stands.step or 0
    chosen = steps.after(done)
    if chosen.first <= done:
        raise UserError(
            f"--steps {chosen.first}:{chosen.last}: the run is at step {done} already: give later "
            "steps, or +2:+6"
        )
    if stands.max_steps is not None and chosen.last > stands.max_steps:
        raise UserError(
            f"--steps {chosen.first}:{chosen.last}: the run ends at step {stands.max_steps} and is "
            f"at {done} now"
        )
    return chosen, stands


@contextmanager
def asked(run_dir: Path, request: ProfileRequest) -> Iterator[None]:
    """The request is there within the block, unless it was answered; nothing of it afterwards."""
    request.write(run_dir)
    try:
        yield
    finally:
        request.withdraw(run_dir)


def wait(run_dir: Path, request: ProfileRequest, say: Say) -> Path:
    """Wait until all ranks have written their summaries; returns the folder.

    Raises:
        RunFailedError: the run ended before, or the ranks said nothing.
    """
    known = Histories()
    folder: Path | None = None
    told: int | None = None
    answered_at: float | None = None
    while True:
        # First whether it lives: what it has written until then is found.
        lives = is_claimed(run_dir)
        found = folder_of(run_dir, request.token)
        if found is not None and found != folder:
            folder = found
            about = _read(folder / "request.json")
            say(f"profiling steps {about['first']} to {about['last']}: {folder}")
        if folder is not None and not missing(folder):
            return folder
        if not (run_dir / PROFILE_FILE).exists():
            answered_at = answered_at or time.monotonic()
        patience_s = _REFUSAL_S if folder is None else _WRITING_S
        late = answered_at is not None and time.monotonic() - answered_at > patience_s
        if not lives or late:
            raise RunFailedError(_unanswered(run_dir, request, folder, lives=lives))
        if folder is None and (step := status.summary(run_dir, known).step) != told:
            say(f"step {step}: waiting for step {request.first}")
            told = step
        time.sleep(_POLL_S)


def missing(folder: Path) -> list[int]:
    """The ranks that were asked and have not written their summaries."""
    about = _read(folder / "request.json")
    ranks = about["ranks"] or range(about["world_size"])
    return [rank for rank in ranks if not (folder / summary_name(rank)).exists()]


def collect(folder: Path, *, count: bool = True) -> dict[str, Any]:
    """All that is known of a profile, as ``--json`` prints it.

    Args:
        count: also count operations, which takes some seconds.
    """
    run_dir = folder.parent.parent
    about = _read(folder / "request.json")
    ranks = [_read(file) for file in sorted(folder.glob("rank-*.summary.json"))]
    for rank in ranks:
        rank["trace"] = str(folder / rank["trace"])
    whole = [rank for rank in ranks if "error" not in rank]
    steps: list[int] = max((rank["steps"] for rank in whole), key=len, default=[])
    result = {
        "run": run_dir.name,
        "folder": str(folder),
        "steps": steps,
        "world_size": about["world_size"],
        "ranks": ranks,
        "work": None,
    }
    if count and steps:
        from trainer.run import read_config

        seconds = max(rank["total_ms"] for rank in whole) / 1e3
        result["work"] = asdict(_work(read_config(run_dir), run_dir, steps, seconds))
    return result


@dataclass(frozen=True)
class Work:
    """What the profiled steps did, all ranks together, and how fast.

    ``tokens_per_second`` counts source and target, as the run's log does. ``mfu`` is None where the
    devices' peak is not known.
    """

    seconds: float
    source_tokens: int
    target_tokens: int
    tokens_per_second: float
    flops: float
    mfu: float | None
    peak_flops: float | None
    peak_source: str | None
    counts: Any  # trainer.flop_count.StepCounts of the first step


def _work(config: RunConfig, run_dir: Path, steps: Sequence[int], seconds: float) -> Work:
    from data_shards.manifest import Manifest
    from data_shards.plan import Plan
    from trainer.flop_count import count_step, step_cost

    manifest = Manifest.load(config.data.folder())
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    source = sum(plan.source_tokens(step - 1) for step in steps)
    target = sum(plan.target_tokens(step - 1) for step in steps)
    flops = sum(step_cost(config.model, manifest, plan, step) for step in steps)
    peak, peak_source = _peak(run_dir)
    return Work(
        seconds=seconds,
        source_tokens=source,
        target_tokens=target,
        tokens_per_second=(source + target) / seconds,
        flops=flops,
        mfu=None if peak is None else flops / seconds / peak,
        peak_flops=peak,
        peak_source=peak_source,
        counts=count_step(config.model, manifest, plan, steps[0]),
    )


def _peak(run_dir: Path) -> tuple[float | None, str | None]:
    """What all workers together could do, as the run's last start told."""
    from trainer.run import read_events

    starts = [event for event in read_events(run_dir) if event["event"] in {"started", "resumed"}]
    last = starts[-1] if starts else {}
    return last.get("peak_flops"), last.get("peak_source")


def train_new(
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    request: ProfileRequest,
    *,
    runs: Path,
    workers: Workers | None,
    dashboard_port: int | None,
    say: Say,
) -> Path:
    """Train a new run until the request is answered; returns the answer's folder.

    Raises:
        UserError: as ``babelray train`` does.
        RunFailedError: the run failed, or was stopped before.
    """
    from cluster import naming
    from cluster.train import check_lanes, start

    config, name = naming.open_run(
        config_file,
        settings,
        name or f"profile-{naming.new_name(config_file)}",
        runs=runs,
        resume=False,
    )
    check_lanes(config, workers)
    if workers is not None:
        check_ranks(request.ranks, workers if isinstance(workers, int) else workers[0])
    from data_shards.shards import prepare

    prepare(config.data, progress=say)
    run_dir = (runs / name).absolute()
    # The ranks hear of a request while they make a step: none can be answered in the first.
    last = request.steps_from(2).last
    with asked(run_dir, request):
        start(
            for_profiling(config, last),
            name,
            runs=runs,
            workers=workers,
            dashboard_port=dashboard_port,
            say=say,
        )
    folder = folder_of(run_dir, request.token)
    if folder is None or missing(folder):
        raise RunFailedError(_unanswered(run_dir, request, folder, lives=False))
    return folder


def for_profiling(config: RunConfig, last: int) -> RunConfig:
    """The same run, ended when the step ``last`` is done; nothing else happens on the way.

    One step more than asked: what the end of a run does (validate, save) is none of their time.
    """
    changes = {
        "max_steps": last + 1,
        "validate_every": last + 2,
        "checkpoint_every": last + 2,
        "bleu_every": None,
        "best_by": "loss",
        "patience": None,
    }
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})


def _unanswered(run_dir: Path, request: ProfileRequest, folder: Path | None, *, lives: bool) -> str:
    logs = run_dir / "logs"
    if not lives and folder is None:
        return (
            f"the run {run_dir.name} ended before step {request.first}: ask for earlier steps, or "
            f"look why it ended: babelray status {run_dir.name}{runs_flag(run_dir.parent)}"
        )
    if folder is None:
        return f"the run {run_dir.name} did not take the request: see {logs}"
    ranks = ", ".join(map(str, missing(folder)))
    return f"no profile came from rank {ranks}; what there is lies in {folder}; see {logs}"


def _read(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values
