"""``babelray attention``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from cluster.options import checkpoint_option, evaluation_settings, runs_option, search_option
from data_shards.errors import UserError

if TYPE_CHECKING:
    from trainer.attention import Kind

    _ParamType = click.ParamType[int | str]
else:
    _ParamType = click.ParamType  # generic for type checkers only, in older versions of click


class _NumberOr(_ParamType):
    """A number from 1, or one of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(("N", *words))

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """The number or the word."""
        if value in self.words:
            return cast("str", value)
        if not (str(value).isascii() and str(value).isdigit()):
            self.fail(f"{value!r} is neither a number nor {' or '.join(self.words)}", param, ctx)
        return int(value)


@click.command()
@click.argument("run")
@click.argument("sentence")
@click.option("--target", metavar="TEXT", help="A translation to look into, instead of the run's.")
@click.option(
    "--kind",
    type=click.Choice(["cross", "encoder", "decoder"]),
    default="cross",
    show_default=True,
    help="The decoder's attention to the source, or a Transformer's self-attention of either.",
)
@click.option(
    "--layer",
    type=_NumberOr("all"),
    help="By default the last but one, whose cross-attention shows best what is translated.",
)
@click.option("--head", type=_NumberOr("all", "mean"), default="mean", show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png|.svg|.pdf",
    help="By default in the run's folder, under attention/.",
)
@checkpoint_option
@search_option
@runs_option
def attention(
    run: str,
    sentence: str,
    target: str | None,
    kind: Kind,
    layer: int | str | None,
    head: int | str,
    output: Path | None,
    checkpoint: str,
    settings: tuple[str, ...],
    runs: Path,
) -> None:
    """Draw what the run RUN attends to when it translates SENTENCE; print the image's path.

    A row is where a piece looks, a column what it looks at; each row sums to 1.

    \b
    Examples:
      babelray attention demo "the old man sleeps"
      babelray attention demo "the old man sleeps" --layer all --head all --output heads.pdf
      babelray attention demo "the old man sleeps" --kind encoder --layer 1 --head 3
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    evaluation = evaluation_settings(run_dir, settings)
    import torch

    from trainer.attention import attention_maps
    from trainer.heatmaps import FORMATS, select, write_image
    from trainer.run import load_model
    from trainer.translate import Translator

    if output is not None and output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {output}: an image ends in {', '.join(FORMATS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run_dir, checkpoint, device=device)
    translator = Translator([loaded], evaluation)
    source = translator.encode(sentence)
    if not source:
        raise UserError("the sentence is empty: give some words")
    if target is None:
        written = translator.translate([sentence])[0][0].ids
    else:
        written = translator.encode(target)[:-1]
    maps = attention_maps(loaded, source, written)
    if layer is None:
        layer = max(1, len(maps.weights.get(kind, ())) - 1)
    panels = select(maps, kind, layer if isinstance(layer, int) else None, head)
    weights, rows, columns = maps.labelled(kind)
    if output is None:
        output = run_dir / "attention" / f"{kind}-layer-{layer}-head-{head}.png"
    names = {"cross": "Cross-attention", "encoder": "Encoder self-attention"}
    write_image(
        output,
        panels,
        rows,
        columns,
        title=f"{names.get(kind, 'Decoder self-attention')} of {run_dir.resolve().name}, "
        f"step {loaded.step:,}",
        row_name="pieces of the source" if kind == "encoder" else "pieces as they are predicted",
        column_name="pieces so far" if kind == "decoder" else "pieces of the source",
        panels_a_row=weights.shape[1] if (layer, head) == ("all", "all") else None,
    )
    click.echo(str(output))
