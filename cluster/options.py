"""What the commands share: options, and how results are printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from data_shards.errors import UserError

if TYPE_CHECKING:
    from trainer.config import EvaluationConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])

_ARGUMENTS = "babelray.arguments"

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file with what differs from the defaults, such as configs/tiny.yaml.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one value over the file's, such as trainer.max_steps=100. May be repeated.",
)
search_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one value of the search over the run's own, such as evaluation.beam=8. May be "
    "repeated.",
)
mirror_option = click.option(
    "--mirror",
    metavar="DIR_OR_URL",
    help="Take the corpus' raw files from here instead of from their public homes.",
)
runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Folder that holds the runs.",
)
checkpoint_option = click.option(
    "--checkpoint",
    default="best",
    show_default=True,
    metavar="best|last|average[:N]|ema|STEP",
    help="Which of the run's checkpoints; average takes the mean of the last 5 (or N), ema the "
    "moving average that trainer.ema_decay keeps.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)


# Of commands that reckon or measure one of the paper's tables.
output_option = click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the numbers there, as JSON.",
)
input_option = click.option(
    "--input",
    "given",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take the numbers from such a file instead of making them.",
)
page_option = click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the tables into this page in docs/paper, and plots into images/paper beside "
    "the page's folder.",
)


def _check_nodes(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A number of machines, or bounds: kept as text."""
    if value is not None:
        parse_workers(ctx, param, value)
    return value


_PLACE_OPTIONS = (
    click.option(
        "--overlay",
        metavar="NAME|DIR",
        help="What to apply on Kubernetes: cpu-smoke, gpu (the default), gpu-multi-node, spot, or "
        "a folder of your own with a kustomization.",
    ),
    click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME",
        help="Add to the overlay: kueue, volcano, kai, monitoring, network-policy, token-auth, "
        "rdma, s3, elastic, or a folder. May be repeated.",
    ),
    click.option(
        "--nodes",
        callback=_check_nodes,
        metavar="N|MIN:MAX",
        help="Machines that train, by default the overlay's; bounds with --component elastic.",
    ),
    click.option(
        "--gpus", type=click.IntRange(1, 64), metavar="N", help="GPUs of each, one worker a GPU."
    ),
    click.option(
        "--image",
        metavar="REFERENCE",
        help="Container image, best by digest; by default the overlay's.",
    ),
    click.option("--namespace", metavar="NAME", help="By default that of kubectl's context."),
    click.option("--context", metavar="NAME", help="kubectl's context; by default the current."),
    click.option(
        "--storage",
        metavar="DIR",
        help="Folder that all machines of a Ray cluster share; runs/ and data/ go there. By "
        "default this directory.",
    ),
)


def place_option_names(values: Mapping[str, Any]) -> list[str]:
    """Those of ``place_options`` that were given, as they are typed."""
    return [f"--{name.replace('components', 'component')}" for name, v in values.items() if v]


def place_options(command: _Command) -> _Command:
    """Where on a cluster, and on how many machines."""
    for option in reversed(_PLACE_OPTIONS):
        command = option(command)
    return command


class KeepsArguments(click.Command):
    """A command that can be sent to the cluster where its run is: see ``given_arguments``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep them, and go on as any command."""
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


def given_arguments() -> tuple[str, ...]:
    """The arguments of the command that runs now, as they were typed."""
    found: tuple[str, ...] = click.get_current_context().meta[_ARGUMENTS]
    return found


def parse_workers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> int | tuple[int, int] | None:
    """A number of workers, or the least and the most: ``2``, ``1:4``."""
    if value is None:
        return None
    parts = value.split(":")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]{1,6}", part) for part in parts):
        raise click.BadParameter(f"{value!r}: give a number, such as 2, or bounds, such as 1:4")
    least, most = int(parts[0]), int(parts[-1])
    if least < 1:
        raise click.BadParameter(f"{value!r}: at least 1 worker is needed")
    if least > most:
        raise click.BadParameter(f"{value!r}: the least comes first: {most}:{least}")
    return (least, most) if len(parts) == 2 else most


def say(line: str) -> None:
    """Tell the person who watches: standard output is for results."""
    click.echo(line, err=True)


def print_json(value: Any) -> None:
    """A result for a script."""
    click.echo(json.dumps(value, indent=2, default=str))


def with_mirror(settings: tuple[str, ...], mirror: str | None) -> tuple[str, ...]:
    """The settings with that of ``--mirror``."""
    return settings if mirror is None else (*settings, f"data.mirror={mirror}")


def evaluation_settings(run_dir: Path, settings: tuple[str, ...]) -> EvaluationConfig:
    """The run's own search settings, with what the command line changes."""
    from trainer.config import load_config

    for setting in settings:
        if not setting.startswith("evaluation."):
            raise UserError(f"--set {setting}: only evaluation.… can be set for a run that exists")
    return load_config(run_dir / "config.json", settings).evaluation
