"""Table 3 of the paper: its rows as published, in full size, and scaled down with any base.

Source: Vaswani et al. 2017 (arXiv 1706.03762), section 6.2, Table 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from data_shards.errors import UserError
from model.config import ModelConfig
from model.presets import PRESETS
from trainer.config import RunConfig, parse_config

BASE = "base"

# Fields of the model whose values in a scaled-down row keep their ratio to the base's.
_SCALED = ("num_heads", "d_k", "encoder_layers", "decoder_layers", "d_model", "d_ff")

Group = Literal["", "A", "B", "C", "D", "E"]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the model's preset, too, but for the rows of label smoothing (``preset``).
        group: the paper's letter.
        changed: what the row changes, for people.
        perplexity, bleu: the paper's, on newstest2013; per piece, beam search without averaging.
        parameters: the paper's, millions; None where the paper lists none: as base has.
        steps: updates in the paper.
        label_smoothing: of training.
    """

    name: str
    group: Group
    changed: str
    perplexity: float
    bleu: float
    parameters: int | None = None
    steps: int = 100_000
    label_smoothing: float = 0.1

    @property
    def preset(self) -> str:
        """Of ``model.presets``."""
        return self.name if self.name in PRESETS["transformer"] else BASE

    def model(self) -> ModelConfig:
        """The row's model in full size."""
        return ModelConfig(preset=self.preset)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("base", "", "", 4.92, 25.8, 65),
        Row("A-1-head", "A", "1 head", 5.29, 24.9),
        Row("A-4-heads", "A", "4 heads", 5.00, 25.5),
        Row("A-16-heads", "A", "16 heads", 4.91, 25.8),
        Row("A-32-heads", "A", "32 heads", 5.01, 25.4),
        Row("B-d_k-16", "B", "d_k 16", 5.16, 25.1, 58),
        Row("B-d_k-32", "B", "d_k 32", 5.01, 25.4, 60),
        Row("C-2-layers", "C", "2 layers", 6.11, 23.7, 36),
        Row("C-4-layers", "C", "4 layers", 5.19, 25.3, 50),
        Row("C-8-layers", "C", "8 layers", 4.88, 25.5, 80),
        Row("C-d_model-256", "C", "d_model 256", 5.75, 24.5, 28),
        Row("C-d_model-1024", "C", "d_model 1024", 4.66, 26.0, 168),
        Row("C-d_ff-1024", "C", "d_ff 1024", 5.12, 25.4, 53),
        Row("C-d_ff-4096", "C", "d_ff 4096", 4.75, 26.2, 90),
        Row("D-dropout-0", "D", "dropout 0", 5.77, 24.6),
        Row("D-dropout-0.2", "D", "dropout 0.2", 4.95, 25.5),
        Row("D-smoothing-0", "D", "label smoothing 0", 4.67, 25.3, label_smoothing=0.0),
        Row("D-smoothing-0.2", "D", "label smoothing 0.2", 5.47, 25.7, label_smoothing=0.2),
        Row("E-learned", "E", "learned positions", 4.92, 25.7),
        Row("big", "", "d_model 1024, d_ff 4096, 16 heads, dropout 0.3", 4.33, 26.4, 213, 300_000),
    )
}


def find_rows(names: Iterable[str]) -> list[Row]:
    """The rows of these names, in order, each once.

    Raises:
        UserError: a name that is none.
    """
    found: dict[str, Row] = {}
    for name in names:
        if name not in ROWS:
            close = get_close_matches(name, ROWS, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"--rows {name}: Table 3 has no such row; {hint}known: {', '.join(ROWS)}"
            )
        found[name] = ROWS[name]
    return list(found.values())


def full_size(row: Row, base: RunConfig) -> RunConfig:
    """The row as the paper trained it, on the corpus of ``base``."""
    return _with(base, model=row.model().model_dump(), label_smoothing=row.label_smoothing)


def scaled(row: Row, base: RunConfig) -> RunConfig:
    """The row beside a base of any size: what it changes has the same ratio to the base's.

    Widths, depths and numbers of heads are multiplied as in the paper (a row with an eighth of the
    heads has an eighth of this base's); dropout, label smoothing and positions are the paper's own.
    A peak rate that ``base`` names falls with the width as the paper's does, by d_model ** -0.5
    (section 5.3).

    Raises:
        UserError: with so small a base the row comes out below one, or not whole.
    """
    paper, changed = ModelConfig(preset=BASE), row.model()
    model: dict[str, Any] = base.model.model_dump()
    model.pop("preset")
    for name, value in changed.model_dump(exclude={"preset"}).items():
        before = getattr(paper, name)
        if value == before:
            continue
        if name in _SCALED:
            # The width of keys follows from the others unless a row gives it.
            before = paper.key_width if name == "d_k" else before
            own = base.model.key_width if name == "d_k" else getattr(base.model, name)
            model[name] = _ratio(row, name, own, value, before)
        else:
            model[name] = value
    smoothing = base.trainer.label_smoothing
    if row.label_smoothing != ROWS[BASE].label_smoothing:
        smoothing = row.label_smoothing
    trainer: dict[str, Any] = {"label_smoothing": smoothing}
    peak = base.trainer.peak_learning_rate
    if peak is not None:
        trainer["peak_learning_rate"] = peak * (base.model.d_model / model["d_model"]) ** 0.5
    return _with(base, model=model, **trainer)


def _ratio(row: Row, name: str, own: int, value: int, before: int) -> int:
    if own * value % before:
        raise UserError(
            f"row {row.name} has {name} {value} where the paper's base has {before}: of this "
            f"base's {own} that is {own * value / before:g}. Leave the row out (--rows), or give a "
            f"base whose model.{name} is divisible"
        )
    return own * value // before


def _with(base: RunConfig, *, model: dict[str, Any], **trainer: Any) -> RunConfig:
    values = base.model_dump()
    values["model"] = model
    values["trainer"].update(trainer)
    return parse_config(values, where="a row of Table 3")


def with_steps(base: RunConfig, seed: int, steps: int | None) -> RunConfig:
    """The same for one seed, and as many steps; every row ends by steps, never by the clock."""
    values = base.model_dump()
    values["trainer"].update(seed=seed, max_minutes=None, patience=None)
    if steps is not None:
        values["trainer"]["max_steps"] = steps
    if values["trainer"]["max_steps"] is None:
        raise UserError("rows are compared at the same number of steps: give --steps")
    return parse_config(values, where="--steps")


def trial_name(prefix: str, row: Row, seed: int) -> str:
    """A run's name."""
    return f"{prefix}-{row.name}-{seed}"


def order(rows: Sequence[tuple[Row, int]]) -> list[tuple[Row, int]]:
    """Every row's first seed, then the second ones: a table that is cut short is even.

    Args:
        rows: each with its number of seeds.
    """
    most = max((seeds for _, seeds in rows), default=0)
    return [(row, seed) for seed in range(1, most + 1) for row, seeds in rows if seed <= seeds]


# The rows of docs/paper/table3.md, with their numbers of seeds.
DEFAULT_ROWS: dict[str, int] = {
    "base": 3,
    "A-1-head": 3,
    "B-d_k-16": 1,
    "C-2-layers": 3,
    "C-d_model-256": 3,
    "C-d_ff-1024": 1,
    "D-dropout-0": 1,
    "D-smoothing-0": 1,
    "E-learned": 1,
}


def chosen_rows(
    asked: Sequence[tuple[str, int | None]], seeds: int | None
) -> list[tuple[Row, int]]:
    """Rows with their numbers of seeds.

    Args:
        asked: names, "all" among them, each perhaps with a number; of a name given twice the last
            counts; none are ``DEFAULT_ROWS``.
        seeds: of those without a number; by default 1, or as ``DEFAULT_ROWS`` has them.

    Raises:
        UserError: a name that is no row.
    """
    if not asked:
        return [(ROWS[name], seeds or number) for name, number in DEFAULT_ROWS.items()]
    found: dict[str, int] = {}
    for name, number in asked:
        for row in ROWS.values() if name == "all" else find_rows([name]):
            found[row.name] = number or seeds or 1
    return [(ROWS[name], number) for name, number in found.items()]
