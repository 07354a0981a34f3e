"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.shards import prepare

# A run says the same on every machine, however slow; HYPOTHESIS_PROFILE=explore looks further.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("babelray", _PATIENT, derandomize=True)
settings.register_profile("explore", _PATIENT, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "babelray"))

# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def multi30k() -> Path:
    """Folder of Multi30k's raw files; a test that asks for it is skipped where there is none."""
    root = os.environ.get("BABELRAY_TEST_CORPORA")
    corpora = Path(root) if root else _REPOSITORY.parent / "shared" / "data"
    folder = corpora / "multi30k"
    if not (folder / "train.en.gz").is_file():
        pytest.skip(
            f"Multi30k is not at {folder}: set BABELRAY_TEST_CORPORA to a folder that has multi30k/"
        )
    return folder


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two parallel files of 3,000 lines; the target renders the source's words in reverse order."""
    folder = tmp_path_factory.mktemp("toy-text")
    paths = folder / "toy.en", folder / "toy.de"
    for path, lines in zip(paths, zip(*toy_pairs(3000), strict=True), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def prepared(
    toy_text: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[DataConfig, Manifest]:
    """A small corpus, prepared once a session: 2,800 pairs in 175 blocks and 3 shards.

    Tests must leave its folder as it is; one that damages it works on a copy.
    """
    source, target = toy_text
    config = DataConfig(
        corpus="files",
        source=str(source),
        target=str(target),
        root=tmp_path_factory.mktemp("toy-data"),
        heldout_pairs=100,
        vocabulary_size=160,
        max_length=64,
        shard_pairs=1000,
        lanes=4,
        tokens_per_step=2048,
        window_pairs=512,
    )
    return config, Manifest.load(prepare(config))


def toy_pairs(num_pairs: int, *, seed: int = 1) -> list[tuple[str, str]]:
    """Pairs of a made-up language: 40 words, 3 to 12 a sentence, translated last word first."""
    generator = random.Random(seed)
    syllables = ("ka", "lo", "mi", "ru", "te", "so", "na", "pi")
    words = [first + second for first in syllables for second in syllables[:5]]
    pairs = []
    for _ in range(num_pairs):
        chosen = generator.choices(words, k=generator.randint(3, 12))
        translated = [f"{word[::-1]}ß" for word in reversed(chosen)]
        pairs.append((" ".join(chosen), " ".join(translated)))
    return pairs
