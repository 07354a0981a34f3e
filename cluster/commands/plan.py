"""``babelray plan``."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import config_option, json_option, print_json, set_option
from data_shards.errors import UserError


@click.command()
@config_option
@set_option
@click.option("--hardware", metavar="NxGPU", help="Devices to reckon for, such as 8xH100.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="How many; with --gpu.")
@click.option("--gpu", metavar="NAME", help="Which kind, such as A100-40.")
@click.option(
    "--sustained",
    type=float,
    metavar="TFLOPS",
    help="What one device reaches in training, instead of a share of its peak.",
)
@click.option(
    "--memory", type=float, metavar="GB", help="Memory of one device, instead of its data sheet's."
)
@click.option(
    "--utilisation",
    type=float,
    metavar="SHARE",
    help="Share of the peak that training reaches; by default, for the Transformer, 0.345 "
    "(docs/paper/recipe.md).",
)
@click.option("--price", type=float, metavar="RATE", help="Price of a device-hour.")
@click.option(
    "--currency", default="USD", show_default=True, metavar="NAME", help="What --price is in."
)
@click.option("--pairs", type=click.IntRange(min=1), metavar="N", help="Pairs of the corpus.")
@click.option("--source-length", type=float, metavar="N", help="Mean pieces of a source sentence.")
@click.option("--target-length", type=float, metavar="N", help="Mean pieces of a target sentence.")
@json_option
def plan(
    config_file: Path | None,
    settings: tuple[str, ...],
    hardware: str | None,
    gpus: int | None,
    gpu: str | None,
    sustained: float | None,
    memory: float | None,
    utilisation: float | None,
    price: float | None,
    currency: str,
    pairs: int | None,
    source_length: float | None,
    target_length: float | None,
    as_json: bool,
) -> None:
    """Reckon what a training takes, without data and without training.

    Batches, steps an epoch, parameters, memory by ZeRO stage, operations, hours, price and disk of
    a configuration on given devices. A corpus that is prepared is counted; of WMT14 and IWSLT14
    published figures are taken; of any other give --pairs, --source-length and --target-length.
    How fast a device trains is known of the Transformer only: for the hours of another kind of
    model give --utilisation or --sustained.

    \b
    Examples:
      babelray plan --config configs/wmt14-en-de-base.yaml --hardware 8xP100
      babelray plan --config configs/wmt14-en-de-big.yaml --hardware 8xH100 --price 2.49
      babelray plan --config configs/tiny.yaml --gpus 1 --gpu L4 --json
    """
    from trainer.config import load_config
    from trainer.paper.hardware import make_hardware, split_hardware
    from trainer.paper.lengths import corpus_size
    from trainer.paper.plan import reckon
    from trainer.paper.plan_text import lines, numbers

    if hardware is not None and (gpus is not None or gpu is not None):
        raise UserError("give --hardware NxGPU, or --gpus N and --gpu NAME, not both")
    if hardware is None and gpu is None:
        raise UserError("say what to reckon for: --hardware 8xH100, or --gpus 8 --gpu H100")
    if sustained is not None and utilisation is not None:
        raise UserError("--sustained is what training reaches already: leave --utilisation out")
    if hardware is not None:
        num, name = split_hardware(hardware)
    else:
        num, name = gpus or 1, gpu or ""
    devices = make_hardware(num, name, memory_gb=memory)
    config = load_config(config_file, settings)
    dry = reckon(
        config,
        devices,
        corpus_size(
            config.data, num_pairs=pairs, mean_source=source_length, mean_target=target_length
        ),
        utilisation=utilisation,
        sustained_flops=None if sustained is None else sustained * 1e12,
        price=price,
        currency=currency,
    )
    if as_json:
        print_json(numbers(dry))
    else:
        click.echo("\n".join(lines(dry)))
