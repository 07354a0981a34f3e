"""The command ``babelray``: thin and quick to answer; work is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from data_shards.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from trainer.config import EvaluationConfig

_INTERRUPTED = 130


class _Failure(click.ClickException):
    """An error of the user's, as one message on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        setattr(self, "exit_code", exit_code)  # noqa: B010  (click declares it for the class)

    def show(self, file: Any = None) -> None:
        click.echo(f"babelray: error: {self.format_message()}", file=file, err=file is None)


class _Commands(click.Group):
    """A group whose commands end in a message and an exit status, never in a traceback, where the
    user can mend what went wrong.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _Failure(str(error), error.exit_status) from None
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            raise _Failure(f"{error.filename}: {error.strerror}", 2) from None
        except KeyboardInterrupt:
            click.echo("babelray: interrupted", err=True)
            raise click.exceptions.Exit(_INTERRUPTED) from None


def _say(line: str) -> None:
    click.echo(line, err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def _workers(
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


_config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file with what differs from the defaults, such as configs/tiny.yaml.",
)
_set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one value over the file's, such as trainer.max_steps=100. May be repeated.",
)
_mirror_option = click.option(
    "--mirror",
    metavar="DIR_OR_URL",
    help="Take the corpus' raw files from here instead of from their public homes.",
)
_runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Folder that holds the runs.",
)
_checkpoint_option = click.option(
    "--checkpoint",
    default="best",
    show_default=True,
    metavar="best|last|average[:N]|STEP",
    help="Which of the run's checkpoints; average takes the mean of the last 5 (or N).",
)
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="babelray", message="%(prog)s %(version)s")
def cli() -> None:
    """Train Transformers for translation, on one laptop or on many GPU machines.

    \b
    A first run, start to end:
      babelray train --config configs/tiny.yaml --name demo --workers 2
      babelray evaluate demo
      echo "the old man sleeps" | babelray translate demo

    Every command explains itself: babelray COMMAND --help. Exit status: 0 done, 1 the run failed,
    2 wrong input, 130 interrupted.
    """


@cli.group()
def data() -> None:
    """Prepare a corpus for training, and check one that is prepared."""


@data.command("prepare")
@_config_option
@_set_option
@_mirror_option
@_json_option
def data_prepare(
    config_file: Path | None, settings: tuple[str, ...], mirror: str | None, as_json: bool
) -> None:
    """Fetch, clean, encode and shard the corpus of a configuration.

    Prints the folder of the prepared corpus. A corpus that is prepared already is left as it is;
    an interrupted preparation leaves nothing behind that could be taken for a finished one.

    \b
    Example:
      babelray data prepare --config configs/tiny.yaml
      babelray data prepare --set data.corpus=multi30k --mirror ~/corpora
    """
    from data_shards.shards import prepare
    from trainer.config import load_config

    config = load_config(config_file, _with_mirror(settings, mirror))
    folder = prepare(config.data, progress=_say)
    if as_json:
        _print_json({"folder": str(folder)})
    else:
        click.echo(str(folder))


@data.command("verify")
@click.argument("data_dir", type=click.Path(path_type=Path))
def data_verify(data_dir: Path) -> None:
    """Compare every file of the prepared corpus DATA_DIR with its manifest.

    Names each file that is missing, cut short or altered, and exits with status 2 if there is one.

    \b
    Example:
      babelray data verify data/embedded-en-de-1a2b3c4d
    """
    from data_shards.audit import verify

    problems = verify(data_dir)
    if problems:
        raise UserError("\n  ".join([f"{data_dir} is damaged:", *problems]))
    click.echo(f"{data_dir}: every file is as its manifest says")


@data.command("stats")
@click.argument("data_dir", type=click.Path(path_type=Path))
@_json_option
def data_stats(data_dir: Path, as_json: bool) -> None:
    """Show the size, the lengths and the filters' counts of the prepared corpus DATA_DIR.

    \b
    Example:
      babelray data stats data/embedded-en-de-1a2b3c4d
    """
    from data_shards.audit import format_statistics, statistics

    numbers = statistics(data_dir)
    if as_json:
        _print_json(dataclasses.asdict(numbers))
    else:
        click.echo(format_statistics(numbers))


@data.command("audit")
@click.argument("run")
@_runs_option
@_json_option
def data_audit(run: str, runs: Path, as_json: bool) -> None:
    """Compute what the run RUN was trained on again from its plan, and compare.

    RUN is a run's name or folder. The rolling hash of the consumed pairs is compared wherever the
    run recorded it, in its log and in its checkpoints; steps whose pairs were not trained on are
    listed. Exits with status 1, and says where they first differ, unless each epoch was exact.

    \b
    Example:
      babelray data audit demo
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    from cluster.tables import audit_table
    from trainer.audit import audit

    result = audit(run_dir, progress=_say)
    if as_json:
        _print_json(result.to_json())
    else:
        click.echo(audit_table(result))
    if not result.exact:
        findings = result.findings()
        more = [f"and {len(findings) - 10} more: --json lists all"] if len(findings) > 10 else []
        raise RunFailedError("\n  ".join([f"{run_dir} is not as planned:", *findings[:10], *more]))


@cli.command()
@_config_option
@_set_option
@click.option("--name", metavar="RUN", help="Name of the run; by default the file's and the time.")
@click.option(
    "--workers",
    callback=_workers,
    metavar="N|MIN:MAX",
    help="Processes that train together; by default one a GPU, or one. With MIN:MAX, as many as "
    "there is room for: the run shrinks when a machine goes and grows when one comes.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run --name from its last checkpoint, with its own configuration unless "
    "--config is given.",
)
@click.option(
    "--overwrite", is_flag=True, help="Begin anew: remove what an earlier run of this name left."
)
@_runs_option
@_mirror_option
@click.option(
    "--dashboard-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Port of the Ray dashboard on this machine; by default the first free one from 8265 on.",
)
@_json_option
def train(
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    workers: int | tuple[int, int] | None,
    resume: bool,
    overwrite: bool,
    runs: Path,
    mirror: str | None,
    dashboard_port: int | None,
    as_json: bool,
) -> None:
    """Train a model; prepare its corpus first if that was not done yet.

    Runs on this machine, or on the Ray cluster that RAY_ADDRESS names. Checkpoints, the log of
    steps and the configuration go to the run's folder. Ctrl-C saves a checkpoint and stops; a
    second Ctrl-C stops at once.

    \b
    Examples:
      babelray train --config configs/tiny.yaml --name demo --workers 2
      babelray train --config configs/base.yaml --name base --workers 1:4
      babelray train --config configs/tiny.yaml --set trainer.peak_learning_rate=2e-3
      babelray train --name demo --resume --set trainer.max_steps=2000
    """
    if resume and overwrite:
        raise click.UsageError("give --resume or --overwrite, not both")
    from cluster import naming
    from cluster.train import check_lanes, start

    config, name = naming.open_run(
        config_file,
        _with_mirror(settings, mirror),
        name,
        runs=runs,
        resume=resume,
        overwrite=overwrite,
    )
    check_lanes(config, workers)
    from data_shards.shards import prepare

    prepare(config.data, progress=_say)  # at once, if it is prepared already
    outcome = start(
        config,
        name,
        runs=runs,
        workers=workers,
        overwrite=overwrite,
        dashboard_port=dashboard_port,
        say=_say,
    )
    if as_json:
        _print_json({"run": name, **dataclasses.asdict(outcome)})
    if outcome.signal is not None:
        _say(f"stopped at step {outcome.step}; go on: babelray train --name {name} --resume")
        raise click.exceptions.Exit(128 + outcome.signal)
    if not as_json:
        click.echo(f"{outcome.run_dir}: finished ({outcome.reason})")
        _say(f"next: babelray evaluate {name}")


@cli.command()
@click.argument("run")
@_checkpoint_option
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
@_set_option
@_runs_option
@_json_option
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
    evaluation = _evaluation(run_dir, settings)
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
        _print_json(result.to_json())
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


@cli.command()
@click.argument("run")
@click.option(
    "--input",
    "input_file",
    type=click.File("rb"),
    default="-",
    metavar="FILE",
    help="Sentences, one a line; by default (or with '-') standard input.",
)
@_checkpoint_option
@_set_option
@_runs_option
def translate(
    run: str, input_file: Any, checkpoint: str, settings: tuple[str, ...], runs: Path
) -> None:
    """Translate sentences with the run RUN, one a line, in their order.

    \b
    Examples:
      echo "the old man sleeps" | babelray translate demo
      babelray translate demo --input news.en --checkpoint average > news.de
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    evaluation = _evaluation(run_dir, settings)
    import torch

    from trainer.run import load_model
    from trainer.translate import read_lines
    from trainer.translate import translate as translate_lines

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run_dir, checkpoint, device=device)
    lines = read_lines(input_file, name=input_file.name)
    for line in translate_lines(loaded, lines, evaluation):
        click.echo(line)


@cli.command()
@click.argument("run")
@_runs_option
def report(run: str, runs: Path) -> None:
    """Write the page of the run RUN: curves, BLEU, cost, attention, samples. Prints its path.

    \b
    Example:
      babelray report demo
    """
    from cluster.naming import find_run

    run_dir = find_run(run, runs)
    from trainer.report import write_report

    click.echo(str(write_report(run_dir)))


def _with_mirror(settings: tuple[str, ...], mirror: str | None) -> tuple[str, ...]:
    return settings if mirror is None else (*settings, f"data.mirror={mirror}")


def _evaluation(run_dir: Path, settings: tuple[str, ...]) -> EvaluationConfig:
    """The run's own search settings, with what the command line changes."""
    from trainer.config import load_config

    for setting in settings:
        if not setting.startswith("evaluation."):
            raise UserError(f"--set {setting}: only evaluation.… can be set for a run that exists")
    return load_config(run_dir / "config.json", settings).evaluation


def main() -> None:
    """The console script."""
    sys.exit(cli(prog_name="babelray"))


if __name__ == "__main__":
    main()
