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

from data_shards.config import EOS_ID
from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer import figures
from trainer.attention import SPACE, AttentionMaps, Kind, attention_maps, each_pairs_maps
from trainer.heads import NAMED_SHARE, PLACES, most, profiles
from trainer.run import LoadedModel, load_model, open_checkpoints
from trainer.translate import Translator

log = logging.getLogger(__name__)

# Lengths in pieces, near which sentences are looked for, and the most that is legible.
_LENGTHS, _LONGEST = (10, 7, 13, 17), 20
# Sentences whose references tell what each head does in general.
_MEASURED = 32
# All weights in the page, a byte each, before they are written as text.
_MOST_BYTES = 600_000

_NAMES: dict[Kind, str] = {
    "cross": "cross-attention",
    "encoder": "encoder's self-attention",
    "decoder": "decoder's self-attention",
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
    pairs = [
        ([*source_ids[:longest], EOS_ID], target_ids[:longest])
        for source_ids, target_ids in zip(source, target, strict=True)
    ]
    return [maps for _, maps in each_pairs_maps(loaded, pairs)]


def _noted(measured: list[AttentionMaps]) -> list[_Head]:
    """Heads that do something one can name, from what they do on average."""
    found = profiles(measured)
    if not found:
        return []
    cross = found["cross"]
    number = cross.sentences
    layer, head, share = most(cross.sharpest)
    num_layers, num_heads = cross.sharpest.shape
    alone = (num_layers, num_heads) == (1, 1)
    comparison = "" if alone else ", more than any other head"
    noted = [
        _Head(
            "cross", layer, head, "The alignment" if alone else "The sharpest head",
            "Each row is mostly one strong cell: for each piece that it writes, the model looks at "
            f"one piece of the source. {_where('cross', layer, head)} puts {_percent(share)} of "
            f"its weight on one piece{comparison} (mean over {number} test sentences).",
        )
    ]  # fmt: skip
    if not alone:
        read = max(0, num_layers - 2)
        of = (
            f"The mean over the heads of layer {read + 1}" if num_heads > 1 else f"Layer {read + 1}"
        )
        noted.append(
            _Head(
                "cross", read, None if num_heads > 1 else 0, "Where word alignments are read",
                f"{of}: the column of a row's strongest cell is taken as the piece that is being "
                "translated.",
            )
        )  # fmt: skip
    for kind, profile in found.items():
        if kind == "cross":
            continue
        offset, shares_LH = profile.best_place()
        layer, head, share = most(shares_LH)
        if share >= NAMED_SHARE:
            noted.append(
                _Head(
                    kind, layer, head, f"A head that looks {PLACES[kind][offset]}",
                    "The strong cells lie along a diagonal, whatever the words are. "
                    f"{_where(kind, layer, head)} puts {_percent(share)} of its weight there.",
                )
            )  # fmt: skip
    layer, head, share = most(cross.edge)
    if share >= NAMED_SHARE:
        noted.append(
            _Head(
                "cross", layer, head, "A head that rests",
                f"The strong column is the end of the source, which says nothing about a word. "
                f"{_where('cross', layer, head)} puts {_percent(share)} of its weight there: a way "
                "of adding nothing.",
            )
        )  # fmt: skip
    return noted


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
        total += sum(weights.numel() for weights in one.weights.values())
        if total > _MOST_BYTES and sentences:
            break
        sentences.append({"source": source, "target": target, **_packed(one)})
    start = heads[0] if heads else None
    value = {
        "names": {kind: _NAMES[kind] for kind in maps[0].kinds},
        "sentences": sentences,
        "start": {"layer": start.layer, "head": start.head} if start else {"layer": 0, "head": 0},
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))  # noqa: S704


def _packed(maps: AttentionMaps) -> dict[str, Any]:
    """By kind: labels, the numbers of layers and heads, and the weights, 255 for 1, in base64."""
    packed: dict[str, Any] = {}
    for kind in maps.kinds:
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
