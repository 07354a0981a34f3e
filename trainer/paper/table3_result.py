"""The file of Table 3's result: written from a summary, and checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_shards.errors import UserError
from trainer.config import parse_config
from trainer.paper import results
from trainer.paper.table3 import ROWS

FORMAT = 2

Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Estimate(_Part):
    mean: float
    sentences: Interval
    seeds: Interval | None
    both: Interval | None


class _Score(_Estimate):
    against_base: _Estimate | None


class _Noise(_Part):
    deviation: float | None
    freedom: int


class _Noises(_Part):
    perplexity: _Noise
    bleu_valid: _Noise
    bleu_test: _Noise


class _Row(_Part):
    row: str
    parameters: int
    model: dict[str, Any]
    seeds: Annotated[list[int], Field(min_length=1)]
    seconds: list[float]
    target_tokens: int
    perplexity: _Score
    bleu_valid: _Score
    bleu_test: _Score
    perplexity_of_seeds: list[float]
    bleu_valid_of_seeds: list[float]
    bleu_test_of_seeds: list[float]

    @model_validator(mode="after")
    def _fits(self) -> _Row:
        if self.row not in ROWS:
            raise ValueError(f"Table 3 has no row {self.row!r}")
        for name in ("seconds", "perplexity_of_seeds", "bleu_valid_of_seeds", "bleu_test_of_seeds"):
            if len(getattr(self, name)) != len(self.seeds):
                raise ValueError(f"{name} and seeds are not equally many")
        return self


class _Result(_Part):
    format: Literal[2]
    config: dict[str, Any]
    steps: int
    signature: str
    sentences: dict[str, int]
    machine: dict[str, Any]
    versions: dict[str, str]
    seed_noise: _Noises
    rows: Annotated[list[_Row], Field(min_length=1)]


def write(summary: Mapping[str, Any], file: Path) -> None:
    """The summary as JSON, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    results.write_result(file, {"format": FORMAT, **summary})


def read(file: Path) -> dict[str, Any]:
    """What ``write`` wrote: the summary.

    Raises:
        UserError: the file is missing, or lacks something that the tables and the page need.
    """
    found = results.read_result(file, "table3", form=FORMAT, objects={}, rows={"rows": ()})
    try:
        _Result.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"--input {file}: {place}: {first['msg']}: give a file that babelray table3 --output "
            "wrote"
        ) from None
    parse_config(found["config"], where=str(file))
    del found["format"]
    return found
