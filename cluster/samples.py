"""An evaluation's sentences side by side: source, hypothesis, reference."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_shards.manifest import Manifest
from trainer.evaluate import Result, read_test_set
from trainer.run import read_config


class Sample(NamedTuple):
    """One sentence of a test set."""

    source: str
    hypothesis: str
    reference: str


def pick(run_dir: Path, result: Result, num_samples: int) -> list[Sample]:
    """``num_samples`` of an evaluation's sentences, evenly spread over the test set."""
    if result.source is not None and result.reference is not None:
        given = read_test_set(Path(result.source), Path(result.reference))
        sources, references = given.sources, given.references
    else:
        manifest = Manifest.load(read_config(run_dir).data.folder())
        sources, references = manifest.split_text("valid" if result.test_set == "valid" else "test")
    hypotheses = result.file.with_name(result.hypotheses).read_text(encoding="utf-8").split("\n")
    num_samples = min(num_samples, len(sources))
    chosen = [index * len(sources) // num_samples for index in range(num_samples)]
    return [Sample(sources[index], hypotheses[index], references[index]) for index in chosen]
