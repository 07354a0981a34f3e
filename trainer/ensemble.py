"""Several models that translate together: other checkpoints of a run, or other runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data_shards.errors import UserError
from trainer.run import LoadedModel, load_model


def load_ensemble(
    run_dir: Path,
    checkpoint: str,
    others: Sequence[str],
    *,
    runs: Path,
    device: str | torch.device = "cpu",
) -> list[LoadedModel]:
    """The run's model and the others', in order.

    Args:
        run_dir: the first model's run.
        checkpoint: its checkpoint, as ``load_model`` takes it.
        others: each ``RUN`` (a name under ``runs``, or a path; the same kind of checkpoint as the
            first), ``RUN@CHECKPOINT``, or ``@CHECKPOINT`` of the first run.
        runs: the folder of runs.
        device: where the weights go.

    Raises:
        UserError: no such run or checkpoint, or another vocabulary than the first one's.
    """
    models = [load_model(run_dir, checkpoint, device=device)]
    for other in others:
        name, _, wanted = other.rpartition("@") if "@" in other else (other, "", checkpoint)
        folder = _folder(name, runs) if name else run_dir
        models.append(load_model(folder, wanted, device=device))
    check_same_vocabulary(models)
    return models


def check_same_vocabulary(models: Sequence[LoadedModel]) -> None:
    """Refuse models that number pieces differently.

    Raises:
        UserError: a vocabulary differs from the first; both are named.
    """
    first = models[0].vocabulary.path
    for other in models[1:]:
        path = other.vocabulary.path
        if path != first and path.read_bytes() != first.read_bytes():
            raise UserError(
                f"models with different vocabularies cannot translate together: {first} and "
                f"{path} differ; give runs that were trained on the same prepared corpus"
            )


def _folder(name: str, runs: Path) -> Path:
    under_runs = runs / name
    return under_runs if (under_runs / "config.json").is_file() else Path(name)
