"""``babelray export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cluster.options import checkpoint_option, runs_option, say
from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from trainer.agreement import Agreement
    from trainer.export import Export


@click.command()
@click.argument("run")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["ctranslate2", "safetensors"]),
    required=True,
    help="ctranslate2: for that fast engine; safetensors: for babelray and other PyTorch code.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="The folder to make.",
)
@checkpoint_option
@click.option(
    "--quantization",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    default="float32",
    show_default=True,
    help="Of the weights in the file; all but float32 for ctranslate2 only.",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR, if it is an export.")
@click.option(
    "--verify",
    type=click.IntRange(min=1),
    metavar="N",
    help="Then translate N sentences of the corpus' test set with the run and with the "
    "CTranslate2 export, and show every difference.",
)
@runs_option
def export(
    run: str,
    format_: Literal["ctranslate2", "safetensors"],
    output: Path,
    checkpoint: str,
    quantization: str,
    overwrite: bool,
    verify: int | None,
    runs: Path,
) -> None:
    """Write the model of the run RUN as a folder that needs neither the run nor the corpus.

    The folder holds weights, vocabulary, what the model is, and a README with five lines of Python
    that translate with it.

    \b
    Examples:
      babelray export demo --format ctranslate2 --output demo-ct2 --quantization int8
      babelray export demo --format ctranslate2 --output demo-ct2 --verify 100
      babelray export demo --format safetensors --output demo-model --checkpoint average
    """
    if verify is not None and format_ != "ctranslate2":
        raise click.UsageError("--verify compares with CTranslate2: give --format ctranslate2")
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    from trainer.export import export as export_run

    done = export_run(
        run_dir,
        output,
        format=format_,
        checkpoint=checkpoint,
        quantization=quantization,
        overwrite=overwrite,
    )
    megabytes = done.num_bytes / 1e6
    say(f"step {done.loaded.step}, {quantization}, {megabytes:,.1f} MB: see README.md there")
    click.echo(done.folder)
    if verify is not None:
        _verify(done, verify, quantization)


def _verify(done: Export, num_lines: int, quantization: str) -> None:
    """Compare and tell; float32 must agree.

    Raises:
        RunFailedError: float32 weights give other translations, beyond ties.
    """
    from trainer.agreement import compare

    manifest = done.loaded.manifest
    if "test" not in manifest.data.splits:
        raise UserError(f"--verify: the corpus in {manifest.folder} has no test sentences")
    lines = manifest.split_text("test")[0][:num_lines]
    agreement = compare(done.loaded, done.folder, lines, done.loaded.config.evaluation)
    _tell(agreement)
    if quantization == "float32" and agreement.faults:
        raise RunFailedError(
            f"{len(agreement.faults)} translations of the export are not the run's: do not use "
            f"{done.folder}, and report this with the versions of babelray and ctranslate2"
        )


def _tell(agreement: Agreement) -> None:
    say(f"{agreement.num_same} of {agreement.num_lines} sentences are translated alike")
    for difference in agreement.differences:
        kind = "tie" if difference.is_tie else "difference"
        say(f"{kind} in line {difference.line}: {difference.source}")
        say(f"  run    {difference.our_score:.6f}  {difference.ours}")
        say(f"  export {difference.their_score:.6f}  {difference.theirs}")
