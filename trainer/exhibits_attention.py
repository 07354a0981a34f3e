"""What a report shows of attention: a few heads that do something one can name, and every head of a
few sentences to look through.

Shapes: L layers, H heads, T target pieces, S source pieces, Q queries, K keys.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from data_shards.config import EOS_ID
from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer import figures
from trainer.attention import SPACE, AttentionMaps, Kind, attention_maps
from trainer.run import LoadedModel, load_model, open_checkpoints
from trainer.translate import Translator

log = logging.getLogger(__name__)

# Lengths in pieces, near which sentences are looked for, and the most that is legible.
_LENGTHS, _LONGEST = (10, 7, 13, 17), 20
# Sentences whose references tell what each head does in general.
_MEASURED = 32
# A head is named for what it does if so much of its weight goes there.
_NAMED_SHARE = 0.4
# All weights in the page, a byte each, before they are written as text.
_MOST_BYTES = 600_000

_NAMES: dict[Kind, str] = {
    "cross": "cross-attention",
    "encoder": "encoder's self-attention",
    "decoder": "decoder's self-attention",
}
# Where a head looks from where it stands, in words; the decoder stands on the piece just written.
_ENCODER_PLACES = {
    -2: "two pieces back",
    -1: "at the piece before",
    0: "at the piece itself",
    1: "at the piece behind",
    2: "two pieces ahead",
}
_DECODER_PLACES = {
    0: "at the piece just written",
    -1: "at the piece before the one just written",
    -2: "two pieces before the one just written",
}


@dataclass(frozen=True)
class _Head:
    """A head, counted from 0, with what it does; None for the mean of the layer's."""

    kind: Kind
    layer: int
    head: int | None
    heading: str
    caption: str


def attention(run_dir: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    """Attention over sentences of the test set, as the best checkpoint translates them.

    Returns:
        ``step``, ``heads`` (each with ``heading``, ``caption`` and ``svg``), their sentence's
        ``source`` and ``target``, and ``explorer``, JSON with every weight of all sentences.
    """
    if manifest is None or not open_checkpoints(run_dir).committed():
        return None
    try:
        loaded = load_model(run_dir, "best")
        split = manifest.split_text("test" if "test" in manifest.data.splits else "valid")
    except UserError as error:
        log.warning("no attention maps: %s", error)
        return None
    sentences = _choose(loaded, split[0])
    if not sentences:
        return None
    translator = Translator([loaded], loaded.config.evaluation)
    # A model that repeats itself for ever is shown up to here.
    written = [found[0].ids[: 2 * _LONGEST] for found in translator.translate(sentences)]
    sources = [translator.encode(sentence) for sentence in sentences]
    maps = [attention_maps(loaded, *pair) for pair in zip(sources, written, strict=True)]
    targets = loaded.vocabulary.decode(written)
    heads = _noted(_measured(loaded, split))
    return {
        "step": loaded.step,
        "source": sentences[0],
        "target": targets[0],
        "heads": [
            {"heading": head.heading, "caption": head.caption, "svg": _picture(maps[0], head)}
            for head in heads
        ],
        "explorer": _explorer(maps, sentences, targets, heads),
    }


def _choose(loaded: LoadedModel, lines: Sequence[str]) -> list[str]:
    """Sentences of different, legible lengths; none twice."""
    pieces = loaded.vocabulary.encode(lines[:300])
    lengths = {line: len(ids) for line, ids in zip(lines, pieces, strict=False)}
    chosen: list[str] = []
    for wanted in _LENGTHS:
        left = [line for line, n in lengths.items() if 0 < n <= _LONGEST and line not in chosen]
        if left:
            chosen.append(min(left, key=lambda line: abs(lengths[line] - wanted)))
    return chosen


def _measured(
    loaded: LoadedModel, split: tuple[Sequence[str], Sequence[str]]
) -> list[AttentionMaps]:
    """Maps of test sentences, the model made to write their references."""
    longest = loaded.config.model.max_positions - 1
    source, target = (loaded.vocabulary.encode(lines[:_MEASURED]) for lines in split)
    return [
        attention_maps(loaded, [*source_ids[:longest], EOS_ID], target_ids[:longest])
        for source_ids, target_ids in zip(source, target, strict=True)
        if source_ids and target_ids
    ]


def _noted(measured: list[AttentionMaps]) -> list[_Head]:
    """Heads that do something one can name, from what they do on average."""
    if not measured:
        return []
    number = len(measured)

    def mean(shares_LH: list[Tensor]) -> Tensor:
        return torch.stack(shares_LH).mean(0)

    # Without the last row, which writes the end, and the last column, the end of the source.
    sharp_LH = mean([maps.cross[:, :, :-1, :-1].amax(-1).mean(-1) for maps in measured])
    resting_LH = mean([maps.cross[:, :, :-1, -1].mean(-1) for maps in measured])
    layer, head, share = _most(sharp_LH)
    read = max(0, len(sharp_LH) - 2)
    found = [
        _Head(
            "cross", layer, head, "The sharpest head",
            "Each row is mostly one strong cell: for each piece that it writes, the model looks at "
            f"one piece of the source. {_where('cross', layer, head)} puts {_percent(share)} of "
            "its weight on one piece, more than any other head (mean over "
            f"{number} test sentences).",
        ),
        _Head(
            "cross", read, None, "Where word alignments are read",
            f"The mean over the heads of layer {read + 1}: the column of a row's strongest cell is "
            "taken as the piece that is being translated.",
        ),
    ]  # fmt: skip
    places: tuple[tuple[Kind, dict[int, str]], ...] = (
        ("encoder", _ENCODER_PLACES),
        ("decoder", _DECODER_PLACES),
    )
    for kind, words in places:
        best = max(
            (
                (*_most(mean([_diagonal(maps.labelled(kind)[0], offset) for maps in measured])), at)
                for offset, at in words.items()
            ),
            key=lambda place: place[2],
        )
        layer, head, share, at = best
        if share >= _NAMED_SHARE:
            found.append(
                _Head(
                    kind, layer, head, f"A head that looks {at}",
                    "The strong cells lie along a diagonal, whatever the words are. "
                    f"{_where(kind, layer, head)} puts {_percent(share)} of its weight there.",
                )
            )  # fmt: skip
    layer, head, share = _most(resting_LH)
    if share >= _NAMED_SHARE:
        found.append(
            _Head(
                "cross", layer, head, "A head that rests",
                f"The strong column is the end of the source, which says nothing about a word. "
                f"{_where('cross', layer, head)} puts {_percent(share)} of its weight there: a way "
                "of adding nothing.",
            )
        )  # fmt: skip
    return found


def _most(shares_LH: Tensor) -> tuple[int, int, float]:
    index = int(shares_LH.argmax())
    return (*divmod(index, shares_LH.size(1)), float(shares_LH.flatten()[index]))


def _diagonal(weights_LHQK: Tensor, offset: int) -> Tensor:
    """The mean weight [L, H] so many keys ahead of the query, where there is such a key."""
    diagonal = weights_LHQK.diagonal(offset, dim1=-2, dim2=-1)
    return (
        diagonal.mean(-1) if diagonal.size(-1) else weights_LHQK.new_zeros(weights_LHQK.shape[:2])
    )


def _where(kind: Kind, layer: int, head: int | None) -> str:
    which = "All heads" if head is None else f"Head {head + 1}"
    return f"{which} of layer {layer + 1} of the {_NAMES[kind]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _picture(maps: AttentionMaps, head: _Head) -> Markup:
    weights_LHQK, rows, columns = maps.labelled(head.kind)
    weights_HQK = weights_LHQK[head.layer]
    weights_QK = weights_HQK.mean(0) if head.head is None else weights_HQK[head.head]
    return Markup(  # noqa: S704
        figures.attention_map(
            weights_QK.numpy(),
            _labels(columns),
            _labels(rows),
            title=f"{_where(head.kind, head.layer, head.head)}. {head.heading}.",
        )
    )


def _explorer(
    maps: list[AttentionMaps], sources: list[str], targets: list[str], heads: list[_Head]
) -> Markup:
    """The page's script reads this; as JSON that holds nothing that HTML would read as its own."""
    sentences: list[dict[str, Any]] = []
    total = 0
    for one, source, target in zip(maps, sources, targets, strict=True):
        total += sum(one.labelled(kind)[0].numel() for kind in _NAMES)
        if total > _MOST_BYTES and sentences:
            break
        sentences.append({"source": source, "target": target, **_packed(one)})
    start = heads[0] if heads else None
    value = {
        "names": _NAMES,
        "sentences": sentences,
        "start": {"layer": start.layer, "head": start.head} if start else {"layer": 0, "head": 0},
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))  # noqa: S704


def _packed(maps: AttentionMaps) -> dict[str, Any]:
    """By kind: labels, the numbers of layers and heads, and the weights, 255 for 1, in base64."""
    packed: dict[str, Any] = {}
    for kind in _NAMES:
        weights, rows, columns = maps.labelled(kind)
        data = (255 * weights).round().to(torch.uint8).numpy().tobytes()
        packed[kind] = {
            "rows": _labels(rows),
            "columns": _labels(columns),
            "layers": weights.size(0),
            "heads": weights.size(1),
            "weights": base64.b64encode(data).decode(),
        }
    return packed


def _labels(pieces: list[str]) -> list[str]:
    return [piece.replace(SPACE, "\u00b7") for piece in pieces]
