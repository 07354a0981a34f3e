"""``babelray evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cluster.options import (
    checkpoint_option,
    evaluation_settings,
    json_option,
    print_json,
    runs_option,
    set_option,
)


@click.command()
@click.argument("run")
@checkpoint_option
@click.option(
    "--test-set",
    type=click.Choice(["test", "valid"]),
    help="Which of the corpus' own sets; by default test.",
)
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="FILE", help="Sentences to translate."
)
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="FILE", help="Their translations."
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also show N sentences with their translation and the reference.",
)
@set_option
@runs_option
@json_option
def evaluate(
    run: str,
    checkpoint: str,
    test_set: Literal["test", "valid"] | None,
    source: Path | None,
    reference: Path | None,
    samples: int,
    settings: tuple[str, ...],
    runs: Path,
    as_json: bool,
) -> None:
    """Translate a test set with the run RUN and compute BLEU and chrF (sacreBLEU).

    RUN is a run's name or folder. The scores come with their signature, so that they can be
    compared with others; the hypotheses lie beside the result.

    \b
    Examples:
      babelray evaluate demo
      babelray evaluate demo --checkpoint average --set evaluation.beam=8
      babelray evaluate demo --source news.en --reference news.de --json
    """
    if (source is None) != (reference is None):
        raise click.UsageError("give both --source and --reference, or neither")
    if source is not None and test_set is not None:
        raise click.UsageError("give --test-set or --source and --reference, not both")
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    evaluation = evaluation_settings(run_dir, settings)
    from trainer.evaluate import evaluate as evaluate_run

    result = evaluate_run(
        run_dir,
        checkpoint=checkpoint,
        test_set=test_set or "test",
        source=source,
        reference=reference,
        **evaluation.model_dump(),
    )
    if as_json:
        print_json(result.to_json())
        return
    steps = ", ".join(str(step) for step in result.averaged_steps)
    click.echo(f"BLEU {result.bleu:.2f}  {result.signature}")
    click.echo(f"chrF {result.chrf:.2f}  {result.chrf_signature}")
    click.echo(
        f"{result.num_sentences} sentences of {result.test_set}, checkpoint {result.checkpoint} "
        f"(step {steps}), beam {result.beam}, {result.seconds:.1f} s"
    )
    hypotheses = result.file.with_name(result.hypotheses)
    click.echo(f"hypotheses: {hypotheses}")
    if samples:
        from cluster.samples import pick

        for sample in pick(run_dir, result, samples):
            click.echo()
            for kind, text in sample._asdict().items():
                click.echo(f"{kind:>10}  {text}")
