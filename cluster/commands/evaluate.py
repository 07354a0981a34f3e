"""``babelray evaluate``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.options import (
    KeepsArguments,
    evaluation_settings,
    given_arguments,
    json_option,
    print_json,
    runs_option,
    say,
    search_option,
)
from data_shards.errors import RunFailedError

if TYPE_CHECKING:
    from cluster.launch.records import Record
    from trainer.decoding_job import Decoder, System
    from trainer.evaluate import Evaluated

_INTERRUPTED = 130


def _parts(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Repeated or comma-separated, each once."""
    parts = [part.strip() for value in values for part in value.split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))


def _actors(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int | None]:
    """The least and the most; by default one to as many as there is room for."""
    if value is None:
        return 1, None
    parts = value.split(":")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]{1,5}", part) for part in parts):
        raise click.BadParameter(f"{value!r}: give a number, such as 4, or bounds, such as 1:8")
    least, most = int(parts[0]), int(parts[-1])
    if len(parts) == 2 and least < 1:
        raise click.BadParameter(f"{value!r}: of bounds, the least is 1")
    if least > most:
        raise click.BadParameter(f"{value!r}: the least comes first: {most}:{least}")
    return least, most


@click.command(cls=KeepsArguments)
@click.argument("run")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    callback=_parts,
    metavar="best|last|average[:N]|ema|STEP",
    help="Which of the run's checkpoints, by default best; average takes the mean of the last 5 "
    "(or N), ema the moving average that trainer.ema_decay keeps. Several, comma-separated or "
    "repeated, are shown beside each other.",
)
@click.option(
    "--test-set",
    "test_sets",
    multiple=True,
    callback=_parts,
    metavar="NAME",
    help="test or valid of the run's corpus, or a name of sacreBLEU's, such as wmt14; by default "
    "test. Several, comma-separated or repeated.",
)
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="FILE", help="Sentences to translate."
)
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="FILE", help="Their translations."
)
@click.option(
    "--ensemble",
    multiple=True,
    callback=_parts,
    metavar="RUN2[@CHECKPOINT]",
    help="Translate together with this model of the same vocabulary (@CHECKPOINT alone: of RUN). "
    "May be repeated.",
)
@click.option(
    "--compare",
    multiple=True,
    callback=_parts,
    metavar="RUN2[@CHECKPOINT]",
    help="Also evaluate this one (@CHECKPOINT alone: of RUN) and test whether the difference is "
    "chance. May be repeated.",
)
@click.option(
    "--actors",
    callback=_actors,
    metavar="N|MIN:MAX",
    help="Processes that decode, through Ray: one a GPU, or one a CPU; by default as many as there "
    "is room for. 0 decodes in this process, without Ray: for a quick look at a small model. The "
    "scores do not depend on it.",
)
@click.option(
    "--mirror",
    metavar="DIR_OR_URL",
    help="Take the archives of sacreBLEU's test sets from here.",
)
@click.option(
    "--breakdown",
    is_flag=True,
    help="Also show scores by sentence length and by word frequency, and the worst sentences.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also show N sentences with their translation and the reference.",
)
@click.option(
    "--push-gateway", metavar="URL", help="Push the scores to this Prometheus push gateway."
)
@search_option
@runs_option
@json_option
def evaluate(
    run: str,
    checkpoints: tuple[str, ...],
    test_sets: tuple[str, ...],
    source: Path | None,
    reference: Path | None,
    ensemble: tuple[str, ...],
    compare: tuple[str, ...],
    actors: tuple[int, int | None],
    mirror: str | None,
    breakdown: bool,
    samples: int,
    push_gateway: str | None,
    settings: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Translate test sets with the run RUN and score the translations.

    RUN is a run's name or folder. BLEU, chrF and TER are sacreBLEU's, with their signatures, so
    that they can be compared with others; "paper BLEU" is the tokenised one of older papers, which
    they cannot be compared with. Results and translations lie in the run's folder evaluation/.

    Decodes across Ray: on this machine, or on the cluster that RAY_ADDRESS names. A run that was
    launched on a cluster is evaluated there, as a job of its own. After an interruption the same
    command goes on where it was.

    \b
    Examples:
      babelray evaluate demo
      babelray evaluate demo --checkpoint best,average:5,ema --set evaluation.beam=8
      babelray evaluate base --test-set valid,wmt14/full --compare big@average:20
      babelray evaluate demo --source news.en --reference news.de --actors 0 --json
    """
    if (source is None) != (reference is None):
        raise click.UsageError("give both --source and --reference, or neither")
    if source is not None and test_sets:
        raise click.UsageError("give --test-set or --source and --reference, not both")
    from cluster.launch.remote import launched_elsewhere
    from cluster.naming import find_run

    record = launched_elsewhere(run, runs)
    if record is not None:
        _evaluate_there(record, runs, as_json=as_json)
        return
    run_dir = find_run(run, runs).absolute()
    compared = [_compared(spec, run_dir, settings, runs) for spec in compare]
    evaluation = evaluation_settings(run_dir, settings)
    try:
        from trainer.decoding_job import System
        from trainer.evaluate import evaluate_systems, find_test_sets
        from trainer.run import choose_checkpoints, open_checkpoints

        chosen = checkpoints or ("best",)
        for checkpoint in chosen:  # what is not there is told before anything else is looked for
            choose_checkpoints(open_checkpoints(run_dir), checkpoint)
        found = evaluate_systems(
            [
                System(run_dir, checkpoint, evaluation, ensemble, runs.absolute())
                for checkpoint in chosen
            ],
            find_test_sets(
                run_dir, test_sets or ("test",), source=source, reference=reference, mirror=mirror
            ),
            decode=_decoder(actors),
            compared=compared,
            say=say,
        )
    except KeyboardInterrupt:
        say("interrupted; what was translated is kept, and the same command goes on from there")
        raise click.exceptions.Exit(_INTERRUPTED) from None
    _show(found, as_json=as_json, breakdown=breakdown, samples=samples)
    if push_gateway is not None:
        from trainer import evaluation_metrics
        from trainer.evaluate import read_results

        evaluation_metrics.push(push_gateway, run_dir.name, read_results(run_dir))


def _evaluate_there(record: Record, runs: Path, *, as_json: bool) -> None:
    """Print what the job prints; with ``as_json`` its one object on standard output, alone."""
    from cluster.launch.remote import evaluate_there

    in_object = False

    def tell(line: str) -> None:
        nonlocal in_object
        in_object = in_object or line == "{"
        click.echo(line, err=as_json and not in_object)
        in_object = in_object and line != "}"

    job = evaluate_there(record, given_arguments(), runs, tell=tell, say=say)
    if job is None:
        raise click.exceptions.Exit(_INTERRUPTED)
    if job.phase != "succeeded":
        why = f" ({job.message})" if job.message else ""
        raise RunFailedError(f"the evaluation of {record.run} ended as {job.phase}{why}")


def _compared(spec: str, run_dir: Path, settings: tuple[str, ...], runs: Path) -> System:
    from cluster.naming import find_run
    from trainer.decoding_job import System

    name, _, checkpoint = spec.rpartition("@") if "@" in spec else (spec, "", "best")
    folder = find_run(name, runs).absolute() if name else run_dir
    return System(folder, checkpoint, evaluation_settings(folder, settings), (), runs.absolute())


def _decoder(actors: tuple[int, int | None]) -> Decoder:
    least, most = actors
    if most == 0:
        from trainer.decoding_job import decode_here

        return decode_here
    from cluster.evaluate import Actors, decode_on_ray

    return partial(decode_on_ray, actors=Actors(least, most))


def _show(found: list[Evaluated], *, as_json: bool, breakdown: bool, samples: int) -> None:
    results = [item.result for item in found]
    if as_json:
        values = [result.to_json() for result in results]
        print_json(values[0] if len(values) == 1 else {"results": values})
        return
    from cluster import evaluation_tables as tables
    from cluster.samples import pick

    if len(results) == 1:
        (result,) = results
        steps = ", ".join(str(step) for step in result.averaged_steps)
        click.echo(tables.scores_of_one(result))
        click.echo(
            f"{result.num_sentences} sentences of {result.test_set}, checkpoint "
            f"{result.checkpoint} (step {steps}), beam {result.beam}, {result.seconds:.1f} s"
        )
    else:
        click.echo(tables.scores_of_many(results))
    for item in found:
        result = item.result
        if result.comparison is not None:
            click.echo(f"\n{result.test_set}, checkpoint {result.checkpoint}")
            click.echo(tables.comparison_table(result.comparison))
        if breakdown:
            click.echo()
            click.echo(tables.breakdown_tables(result))
        for sample in pick(item, samples):
            click.echo()
            for kind, text in sample._asdict().items():
                click.echo(f"{kind:>10}  {text}")
    comparisons = [result.comparison for result in results if result.comparison is not None]
    if comparisons:
        click.echo(f"\n{tables.comparison_signatures(comparisons)}")
    say("\n".join(f"translations: {r.file.with_name(r.hypotheses)}" for r in results))
