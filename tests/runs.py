"""A real run's folder in a second or two: a small corpus, a small model, a plain loop."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_shards.config import BOS_ID, EOS_ID, PAD_ID
from data_shards.manifest import Manifest
from data_shards.shards import prepare
from data_shards.vocabulary import Vocabulary
from model.build import build
from model.transformer import Transformer
from trainer.config import RunConfig, parse_config

# A word for a word, in reverse order: learnt in seconds, and impossible without attention.
_WORDS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf",
    "red": "rot", "blue": "blau", "green": "grün", "dog": "Hund", "cat": "Katze",
    "house": "Haus", "tree": "Baum", "sees": "sieht", "eats": "isst", "old": "alt",
}  # fmt: skip


def pairs(num: int, *, seed: int) -> list[tuple[str, str]]:
    """Sentences of two to nine words with their translations."""
    rng = random.Random(seed)
    found = []
    for _ in range(num):
        words = rng.choices(list(_WORDS), k=rng.randint(2, 9))
        found.append((" ".join(words), " ".join(_WORDS[word] for word in reversed(words))))
    return found


def write_lines(file: Path, lines: list[str]) -> Path:
    """A text file of these lines."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def make_config(folder: Path, *, num_valid: int = 20, num_test: int = 30) -> RunConfig:
    """A run's configuration with its corpus' raw files under ``folder``."""
    data: dict[str, Any] = {"corpus": "files", "root": str(folder / "data")}
    for split, num, seed in (("", 400, 1), ("valid_", num_valid, 2), ("test_", num_test, 3)):
        chosen = pairs(num, seed=seed)
        for side, name in enumerate(("source", "target")):
            file = folder / f"{split}{name}.{('en', 'de')[side]}"
            write_lines(file, [pair[side] for pair in chosen])
            data[f"{split}{name}"] = str(file)
    return parse_config(
        {
            "model": {
                "d_model": 32, "d_ff": 64, "num_heads": 4, "encoder_layers": 1,
                "decoder_layers": 2, "dropout": 0.0, "norm": "pre", "max_positions": 24,
            },
            "data": {
                **data, "vocabulary_size": 96, "max_length": 32, "lanes": 2,
                "tokens_per_step": 512,
            },
            "trainer": {"max_steps": 100},
            "evaluation": {"max_extra_length": 10},
        },
        where="tests",
    )  # fmt: skip


def make_run(folder: Path, *, name: str = "demo", steps: tuple[int, ...] = (40, 80, 120)) -> Path:
    """Prepare a corpus, train, and leave ``folder/runs/<name>`` with a checkpoint of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(folder)
    prepare(config.data)
    manifest = Manifest.load(config.data.folder())
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.to_json(), encoding="utf-8")
    torch.manual_seed(1)
    model = build(config.model, manifest.vocabulary_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    source_BS, target_in_BT, target_out_BT = _tensors(Vocabulary.load(manifest.vocabulary_path))
    for step in range(1, max(steps, default=0) + 1):
        rows = torch.randint(0, len(source_BS), (64,))
        loss, _ = model.training_loss(source_BS[rows], target_in_BT[rows], target_out_BT[rows], 0.1)
        (loss / (target_out_BT[rows] != PAD_ID).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            write_checkpoint(run_dir, step, model.state_dict(), data=manifest.sha256)
    assert isinstance(model, Transformer)
    return run_dir


def write_checkpoint(
    run_dir: Path, step: int, weights: dict[str, torch.Tensor], *, data: str
) -> Path:
    """What readers need of a committed checkpoint."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_file(weights, str(folder / "model.safetensors"))
    state = {"step": step, "world_size": 1, "settings": {"data": data}}
    (folder / "state.json").write_text(json.dumps(state))
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.iterdir())
    }
    manifest = json.dumps({"step": step, "files": files})
    (folder / "manifest.json").write_text(manifest)
    (folder / "COMMIT").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    return folder


def _tensors(vocabulary: Vocabulary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = pairs(400, seed=1)
    sources = [[*ids, EOS_ID] for ids in vocabulary.encode([pair[0] for pair in chosen])]
    targets = vocabulary.encode([pair[1] for pair in chosen])
    return (
        _padded(sources),
        _padded([[BOS_ID, *ids] for ids in targets]),
        _padded([[*ids, EOS_ID] for ids in targets]),
    )


def _padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
