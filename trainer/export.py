"""A run's model as a folder of its own, for CTranslate2 or for safetensors.

    export.json       what the model is: run, checkpoint, languages, corpus, licence, scores
    vocabulary.model  the SentencePiece model
    README.md         the same for people, with five lines that load the folder and translate
    ctranslate2:      model.bin, config.json, shared_vocabulary.json, and run.json (the settings)
    safetensors:      model.safetensors, config.json (the settings), manifest.json (the corpus)

An export needs neither the run nor the prepared corpus, and holds no path of this machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_shards.config import PLACES
from data_shards.errors import UserError
from data_shards.manifest import (
    BLOCK_DTYPE,
    LENGTH_DTYPE,
    MANIFEST_NAME,
    VOCABULARY_NAME,
    Manifest,
    read_manifest,
)
from data_shards.vocabulary import Vocabulary
from model.build import build
from trainer import export_ctranslate2
from trainer.config import RecoveryConfig, RunConfig
from trainer.export_readme import readme
from trainer.parts import WEIGHTS, bytes_of, header, in_pieces
from trainer.run import LoadedModel, evaluation_dir, load_model, read_config

Format = Literal["ctranslate2", "safetensors"]

CARD = "export.json"
README = "README.md"
CONFIG = "config.json"
RUN_CONFIG = "run.json"  # where config.json is CTranslate2's

_SCORE_FIELDS = ("test_set", "bleu", "signature", "chrf", "chrf_signature")


@dataclass(frozen=True)
class Export:
    """A folder that was written; ``num_bytes`` is the size of all its files."""

    folder: Path
    loaded: LoadedModel
    num_bytes: int


def export(
    run_dir: Path,
    output: Path,
    *,
    format: Format,
    checkpoint: str = "best",
    quantization: str = "float32",
    overwrite: bool = False,
) -> Export:
    """Write a checkpoint's model to ``output``, whole or not at all.

    Args:
        run_dir: the run's folder.
        output: the folder to make.
        format: what is to load it.
        checkpoint: see ``trainer.run.load_model``.
        quantization: of the weights in the file: float32, or for CTranslate2 also one of
            ``export_ctranslate2.QUANTIZATIONS``.
        overwrite: replace ``output`` if it is an export; nothing else is ever replaced.

    Raises:
        UserError: no such run or checkpoint, CTranslate2 is not installed, the folder exists, the
            format has no such model or quantization, or the disk refuses.
    """
    output = output.resolve()
    config = read_config(run_dir)  # a wrong run is told before anything else
    if format == "ctranslate2":
        export_ctranslate2.require()
        export_ctranslate2.check(config.model)
    elif quantization != "float32":
        raise UserError(
            f"--quantization {quantization}: safetensors are written as float32; "
            "--format ctranslate2 has " + ", ".join(export_ctranslate2.QUANTIZATIONS)
        )
    _check_output(output, overwrite)
    loaded = load_model(run_dir, checkpoint)
    with _replacing(output, overwrite) as folder:
        if format == "ctranslate2":
            export_ctranslate2.write(loaded, folder, quantization)
            config_name = RUN_CONFIG
        else:
            _write_weights(loaded, folder / WEIGHTS)
            _write_manifest(loaded.manifest, folder / MANIFEST_NAME)
            config_name = CONFIG
        (folder / config_name).write_text(_portable(loaded.config).to_json(), encoding="utf-8")
        shutil.copyfile(loaded.vocabulary.path, folder / VOCABULARY_NAME)
        card = _card(run_dir, loaded, format, quantization)
        text = json.dumps(card, indent=2, ensure_ascii=False)
        (folder / CARD).write_text(text + "\n", encoding="utf-8")
        (folder / README).write_text(readme(card, loaded.config), encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Export(output, loaded, num_bytes)


def load_exported(folder: Path | str, *, device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a safetensors export, ready for ``trainer.translate.Translator``.

    Its manifest tells the languages and the corpus, but there are no sentences behind it.

    Raises:
        UserError: the folder is no such export, or a file of it is damaged.
    """
    folder = Path(folder)
    card = _read_card(folder)
    if card is None or card["format"] != "safetensors":
        raise UserError(
            f"{folder} is no safetensors export: make one with "
            "babelray export RUN --format safetensors --output DIR"
        )
    config = read_config(folder)
    data, _ = read_manifest(folder)
    vocabulary = Vocabulary.load(folder / VOCABULARY_NAME)
    model = build(config.model, vocabulary.size)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{folder / WEIGHTS} cannot be loaded: {reason}: copy the export again"
        ) from None
    return LoadedModel(
        model=model.to(device).eval(),
        config=config,
        manifest=Manifest(
            folder,
            data,
            card["corpus_sha256"],
            lengths=np.empty((0, 2), LENGTH_DTYPE),
            blocks=np.empty(0, BLOCK_DTYPE),
        ),
        vocabulary=vocabulary,
        step=card["step"],
        label=card["checkpoint"],
        steps=tuple(card["averaged_steps"]),
    )


def _read_card(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None if the folder is none."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and card.get("made_by") == "babelray" else None


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if _read_card(output) is None:
        raise UserError(
            f"{output} exists and is not an export, so it is left alone: choose another --output"
        )
    if not overwrite:
        raise UserError(f"{output} exists: choose another --output, or replace it with --overwrite")


@contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes ``output`` at the end of the block, or vanishes if the block fails."""
    tag = uuid4().hex[:8]
    draft = output.with_name(f".{output.name}.{tag}.partial")
    old = output.with_name(f".{output.name}.{tag}.old")
    try:
        draft.mkdir(parents=True)
        yield draft
        _check_output(output, overwrite)  # it may have come in the meantime
        try:
            if output.exists():
                output.rename(old)
            draft.rename(output)
        except BaseException:
            if old.exists() and draft.exists():
                old.rename(output)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write the export to {output}: {error.strerror or error}: check the free space "
            "and the permissions there, or choose another --output"
        ) from error
    finally:
        if not draft.exists():  # it is in its place
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)


def _write_weights(loaded: LoadedModel, file: Path) -> None:
    """One tensor after the other, without a second copy of the model in memory."""
    weights = loaded.model.state_dict()
    with file.open("wb") as stream:
        stream.write(header({name: tuple(tensor.shape) for name, tensor in weights.items()}))
        for tensor in weights.values():
            for piece in in_pieces(bytes_of(tensor.contiguous())):
                stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())


def _write_manifest(manifest: Manifest, file: Path) -> None:
    """What the corpus was, without its sentences and without paths."""
    data = manifest.data
    settings = {
        name: Path(value).name if isinstance(value, str) else value
        for name, value in data.settings.items()
    }
    raw_files = tuple(
        raw.model_copy(update={"file": Path(raw.file).name}) for raw in data.raw_files
    )
    kept = data.model_copy(update={"settings": settings, "raw_files": raw_files, "splits": {}})
    file.write_text(kept.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _portable(config: RunConfig) -> RunConfig:
    """The settings without where things lie on this machine."""
    data = config.data
    places = {name: type(data).model_fields[name].default for name in PLACES}
    texts = ("source", "target", "valid_source", "valid_target", "test_source", "test_target")
    files = {name: Path(value).name for name in texts if (value := getattr(data, name)) is not None}
    changed = data.model_copy(update={**places, **files})
    return config.model_copy(update={"data": changed, "recovery": RecoveryConfig()})


def _card(run_dir: Path, loaded: LoadedModel, format: Format, quantization: str) -> dict[str, Any]:
    data = loaded.manifest.data
    return {
        "made_by": "babelray",
        "format": format,
        "quantization": quantization,
        "run": run_dir.resolve().name,
        "checkpoint": loaded.label,
        "step": loaded.step,
        "averaged_steps": list(loaded.steps),
        "num_parameters": sum(weight.numel() for weight in loaded.model.parameters()),
        "source_language": data.source_language,
        "target_language": data.target_language,
        "corpus": data.corpus,
        "corpus_sha256": loaded.manifest.sha256,
        "licence": data.licence,
        "num_pairs": data.num_pairs,
        "vocabulary_size": loaded.vocabulary.size,
        "scores": _scores(run_dir, loaded),
    }


def _scores(run_dir: Path, loaded: LoadedModel) -> list[dict[str, Any]]:
    """The evaluations of this very checkpoint that lie in the run."""
    found = []
    for file in sorted(evaluation_dir(run_dir).glob("*.json")):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(values, dict) or values.get("ensemble"):
            continue
        if (values.get("checkpoint"), values.get("step")) == (loaded.label, loaded.step):
            found.append({name: values[name] for name in _SCORE_FIELDS})
    return found
