"""A run's folder: where its files lie, what it logged, and its model as any checkpoint left it.

Layout:

    config.json                      the resolved configuration
    events.jsonl                     one JSON object a line: logged steps and events
    best.json                        {"step", "valid_nll" or "bleu"}: the best so far
    checkpoints/step-00001000/       model.safetensors, state.json, manifest.json, COMMIT, ...
    evaluation/<test set>-<checkpoint>.json
    report.html

With ``recovery.storage``, best.json and checkpoints/ lie there, under the run's name.
Everything here only reads and needs no process group, so a laptop can look into a cluster's run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from data_shards.vocabulary import Vocabulary
from model.build import build
from model.encoder_decoder import EncoderDecoder
from trainer.average import average_weights
from trainer.checkpoint import STATE, Checkpoints
from trainer.config import RunConfig, parse_config
from trainer.events import history, parsed
from trainer.parts import EMA, WEIGHTS
from trainer.storage import StorageError

# How many checkpoints "average" takes (the paper's number for the base models).
AVERAGED_CHECKPOINTS = 5


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with all that decoding needs.

    ``label`` is the checkpoint as it was asked for, fit for a file name (``average:3`` is
    ``average-3``); ``steps`` are the checkpoints that the weights are the mean of.
    """

    model: EncoderDecoder
    config: RunConfig
    manifest: Manifest
    vocabulary: Vocabulary
    step: int
    label: str
    steps: tuple[int, ...]


def events_path(run_dir: Path) -> Path:
    """The run's log of steps and events."""
    return run_dir / "events.jsonl"


def evaluation_dir(run_dir: Path) -> Path:
    """Where evaluations' results and hypotheses lie."""
    return run_dir / "evaluation"


def report_path(run_dir: Path) -> Path:
    """The run's page."""
    return run_dir / "report.html"


def read_config(run_dir: Path) -> RunConfig:
    """The configuration that the run was started with.

    Raises:
        UserError: there is no such run (the message names those there are), or its
            ``config.json`` is unreadable.
    """
    file = run_dir / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_such_run(run_dir)) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the run's configuration cannot be read: {file}: {error}: restore the file from a copy"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"the run's configuration is not a JSON object: {file}")
    return parse_config(values, where=str(file))


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """What the run logged, oldest first, as one ``history``; a line cut short is left out."""
    try:
        text = events_path(run_dir).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return history(event for line in text.split("\n") if (event := parsed(line)))


def open_checkpoints(run_dir: Path) -> Checkpoints:
    """The run's checkpoints, wherever its configuration puts them.

    Raises:
        UserError: no such run, or its storage needs a package that is missing.
    """
    return Checkpoints.of(run_dir, read_config(run_dir).recovery)


def load_model(
    run_dir: Path, checkpoint: str = "best", *, device: str | torch.device = "cpu"
) -> LoadedModel:
    """The run's model as a checkpoint left it, ready to decode.

    Args:
        run_dir: the run's folder.
        checkpoint: ``best`` (by validation), ``last``, ``average`` (the mean of the last 5, or of
            as many as there are), ``average:N`` (the last N), ``ema`` (the moving average kept
            while training, as the last checkpoint holds it), or a step.
        device: where the weights go.

    Raises:
        UserError: no such run or checkpoint, a damaged or foreign file, no prepared corpus.
    """
    config = read_config(run_dir)
    checkpoints = Checkpoints.of(run_dir, config.recovery)
    chosen = choose_checkpoints(checkpoints, checkpoint)
    manifest = Manifest.load(config.data.folder())
    vocabulary = Vocabulary.load(manifest.vocabulary_path)
    for step in chosen:
        _verify(checkpoints, step, only=None if checkpoint == EMA else (WEIGHTS, STATE))
    _check_corpus(checkpoints, chosen[-1], manifest)
    files = [checkpoints.weights(step) for step in chosen]
    weights = average_weights(files)
    if checkpoint == EMA:
        weights = _moving_average(checkpoints, chosen[-1], weights)
    model = build(config.model, manifest.vocabulary_size)
    _fill(model, weights, files[-1])
    model.to(device)
    model.eval()
    return LoadedModel(
        model=model,
        config=config,
        manifest=manifest,
        vocabulary=vocabulary,
        step=chosen[-1],
        label=checkpoint.replace(":", "-"),
        steps=tuple(chosen),
    )


def choose_checkpoints(checkpoints: Checkpoints, checkpoint: str) -> list[int]:
    """The committed steps that ``checkpoint`` stands for, oldest first: several to average.

    Raises:
        UserError: the word is unknown, or the run has no such checkpoint (yet).
    """
    kind, colon, number = checkpoint.partition(":")
    is_number = number.isascii() and number.isdigit()
    is_known = (
        (kind in {"best", "last", "average", EMA} and not colon)
        or (kind == "average" and is_number and int(number) > 0)
        or (kind.isascii() and kind.isdigit() and not colon)
    )
    if not is_known:
        raise UserError(
            f"unknown checkpoint {checkpoint!r}: use best, last, average, average:N, ema or a step"
        )
    committed = checkpoints.committed()
    if not committed:
        raise UserError(
            f"there is no checkpoint yet in {checkpoints.home}: train the run further (a "
            "checkpoint is written every trainer.checkpoint_every steps and at the end)"
        )
    if kind == "average":
        wanted = int(number) if colon else AVERAGED_CHECKPOINTS
        if colon and wanted > len(committed):
            raise UserError(
                f"{checkpoint}: there are only {len(committed)} checkpoints in "
                f"{checkpoints.home} ({_list(committed)}): average fewer, or train with a larger "
                "trainer.keep_checkpoints"
            )
        return committed[-wanted:]
    if kind in {"last", EMA}:
        return committed[-1:]
    if kind == "best":
        step = _best_step(checkpoints)
        if step is None:
            return committed[-1:]
        if step not in committed:
            raise UserError(
                f"the best checkpoint (step {step}) is gone from {checkpoints.home}: "
                f"give --checkpoint last, or a step of: {_list(committed)}"
            )
        return [step]
    step = int(kind)
    if step not in committed:
        raise UserError(
            f"there is no checkpoint of step {step} in {checkpoints.home}: "
            f"give --checkpoint with a step of: {_list(committed)}"
        )
    return [step]


def _no_such_run(run_dir: Path) -> str:
    try:
        others = sorted(
            path.name for path in run_dir.parent.iterdir() if (path / "config.json").is_file()
        )
    except OSError:
        others = []
    listed = (
        f"runs in {run_dir.parent}: {', '.join(others)}"
        if others
        else (f"there are no runs in {run_dir.parent}: start one with babelray train")
    )
    return f"no such run: {run_dir} holds no config.json; {listed}"


def _list(steps: list[int]) -> str:
    return ", ".join(str(step) for step in steps)


def _best_step(checkpoints: Checkpoints) -> int | None:
    try:
        return checkpoints.best()
    except StorageError as error:
        raise UserError(f"{error}; or give --checkpoint last or a step") from None


def _verify(checkpoints: Checkpoints, step: int, *, only: tuple[str, ...] | None) -> None:
    """Compare what is loaded with what was committed."""
    found = checkpoints.problems(step, only=only)
    if found:
        others = [other for other in checkpoints.committed() if other != step]
        mend = (
            f"give --checkpoint with another step: {_list(others)}"
            if others
            else "the run has no other checkpoint: train it further"
        )
        raise UserError(f"{'; '.join(found)}; {mend}")


def _moving_average(
    checkpoints: Checkpoints, step: int, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The average of the weights that a checkpoint holds, in the shapes of ``weights``."""
    with checkpoints.open(step) as reader:
        if not reader.has_average:
            raise UserError(
                f"{checkpoints.where(step)} holds no moving average: train with "
                "--set trainer.ema_decay=0.999, or give --checkpoint average"
            )
        return {
            name: reader.read(EMA, name, 0, tensor.numel()).view(tensor.shape)
            for name, tensor in weights.items()
        }


def _check_corpus(checkpoints: Checkpoints, step: int, manifest: Manifest) -> None:
    """With another vocabulary the same weights would translate into nonsense."""
    with checkpoints.open(step) as reader:
        trained_on = reader.state["settings"]["data"]
    if trained_on != manifest.sha256:
        raise UserError(
            f"{checkpoints.where(step)} was trained on another corpus than the one in "
            f"{manifest.folder}: its manifest had sha256 {trained_on}, this one has "
            f"{manifest.sha256}. Put the corpus of the run back there"
        )


def _fill(model: EncoderDecoder, weights: dict[str, Tensor], file: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{file} does not fit the run's configuration: "
                f"{name} has shape {found.get(name, 'none')} in the file, "
                f"{expected.get(name, 'none')} in the model; restore the run's config.json"
            )
    model.load_state_dict(weights)
