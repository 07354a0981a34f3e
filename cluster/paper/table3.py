"""The trials of Table 3: which there are, which are done, and the rest trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import naming
from cluster.paper.trials import run_trials
from cluster.session import Session
from data_shards.errors import RunFailedError, UserError
from model.size import num_parameters
from trainer.config import RunConfig
from trainer.paper.table3 import Row, order, scaled, trial_name, with_steps
from trainer.paper.table3_sizes import FITTING_VOCABULARY

if TYPE_CHECKING:
    from trainer.paper.table3_trial import Trial

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A training: a row with a seed, in a run's folder."""

    row: Row
    seed: int
    config: RunConfig
    run_dir: Path


def plan(
    base: RunConfig, rows: Sequence[tuple[Row, int]], *, runs: Path, prefix: str
) -> list[Planned]:
    """All trainings, in the order in which they are begun; nothing is written.

    Args:
        base: the configuration of the row "base".
        rows: each with its number of seeds.
        runs: the folder of runs.
        prefix: what the runs' names begin with.

    Raises:
        UserError: a row that this base has no scaled-down form of.
    """
    naming.check_name(prefix)
    planned = []
    for row, seed in order(rows):
        config = naming.absolute(with_steps(scaled(row, base), seed, base.trainer.max_steps))
        run_dir = (runs / trial_name(prefix, row, seed)).absolute()
        planned.append(Planned(row, seed, config, run_dir))
    return planned


def finished(planned: Sequence[Planned]) -> dict[tuple[str, int], Trial]:
    """Those that are done, by row and seed.

    Raises:
        UserError: a run of the same name was made with another configuration.
    """
    from trainer.paper.table3_trial import read_trial

    found = {}
    for item in planned:
        if not (item.run_dir / "config.json").is_file():
            continue
        _check_same(item)
        trial = read_trial(item.run_dir)
        if trial is not None:
            found[item.row.name, item.seed] = trial
    return found


def _check_same(item: Planned) -> None:
    """A run's schedule depends on its number of steps: it cannot be made longer afterwards."""
    from trainer.run import read_config

    name, stored = item.run_dir.name, read_config(item.run_dir)
    steps = stored.trainer.max_steps
    if steps != item.config.trainer.max_steps:
        raise UserError(
            f"the run {name} is one of {steps} steps, not of {item.config.trainer.max_steps}: give "
            f"--steps {steps}, or another --prefix for new runs"
        )
    try:
        naming.check_resume(stored, item.config, name=name)
    except UserError as error:
        raise UserError(f"{error}; of table3: another --prefix") from None


def train(
    planned: Sequence[Planned],
    done: Mapping[tuple[str, int], Trial],
    *,
    parallel: int | None,
    dashboard_port: int | None,
    say: Say,
) -> dict[tuple[str, int], Trial]:
    """Train what is not done, and tell of each as it ends.

    Returns:
        All that are done now, those of before among them.

    Raises:
        UserError: no cluster answers, or there is no room.
        RunFailedError: some trials failed; the others are done.
    """
    from data_shards.shards import prepare
    from trainer.paper.table3_trial import read_trial

    found = dict(done)
    missing = {item.run_dir: item for item in planned if (item.row.name, item.seed) not in found}
    if missing:
        prepare(planned[0].config.data, progress=say)
    for item in missing.values():
        naming.write_config(item.config, item.run_dir)

    def begun(session: Session, at_a_time: int) -> None:
        if session.dashboard_url:
            say(f"Ray dashboard: {session.dashboard_url}")
        say(f"training {len(missing)} of {len(planned)} trials, {at_a_time} at a time")

    def still(running: list[Path]) -> None:
        say("; ".join(f"{run_dir.name} {_step(run_dir)}" for run_dir in running))

    failed = []
    for ended in run_trials(
        [(item.config, item.run_dir) for item in missing.values()],
        _work,
        parallel=parallel,
        dashboard_port=dashboard_port,
        begun=begun,
        still=still,
    ):
        item = missing[ended.run_dir]
        trial = read_trial(ended.run_dir) if ended.error is None else None
        if trial is None:
            failed.append(f"{item.run_dir.name}: {ended.error or 'it left no result'}")
            say(failed[-1])
            continue
        found[item.row.name, item.seed] = trial
        say(f"{_told(item, trial)} ({len(found)} of {len(planned)} done)")
    if failed:
        raise RunFailedError(
            f"{len(failed)} of {len(planned)} trials failed (the same command goes on with them; "
            "their logs: logs/rank-000.log in the run's folder):\n  " + "\n  ".join(failed)
        )
    return found


def _work(config: RunConfig, run_dir: Path) -> None:
    from trainer.paper.table3_trial import run_trial

    run_trial(config, run_dir)


def _step(run_dir: Path) -> str:
    from trainer.run import read_events

    steps = [event["step"] for event in read_events(run_dir) if event["event"] == "step"]
    return f"step {steps[-1]:,}" if steps else "starting"


def _told(item: Planned, trial: Trial) -> str:
    from trainer.paper.table3_statistics import perplexity
    from trainer.paper.table3_summary import bleu

    scores = ", ".join(f"BLEU {bleu(trial, name):.2f} on {name}" for name in trial.counts)
    return (
        f"{item.run_dir.name}: perplexity {perplexity(trial.nll, trial.pieces):.2f}, {scores}, "
        f"{trial.seconds / 60:.1f} min"
    )


def described(planned: Sequence[Planned], done: Mapping[tuple[str, int], Trial]) -> list[list[str]]:
    """The plan as a table: what each training is, and how far it is."""
    cells = [["run", "row", "seed", "parameters", "paper's, full size", "steps", "done"]]
    for item in planned:
        model, steps = item.config.model, item.config.trainer.max_steps
        size = num_parameters(model, item.config.data.vocabulary_size)
        full = num_parameters(item.row.model(), FITTING_VOCABULARY)
        cells.append(
            [
                item.run_dir.name,
                item.row.name,
                str(item.seed),
                f"{size:,}",
                f"{full:,}",
                f"{steps:,}",
                "yes" if (item.row.name, item.seed) in done else "no",
            ]
        )
    return cells
