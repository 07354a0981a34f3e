"""What each head does, measured over many sentences: where its weight lies, and how sharply.

Where a head looks is not yet what it is needed for: see ``trainer.silenced_heads``.

Shapes: L layers, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention import KINDS, SPACE, AttentionMaps, Kind

# A head is named for what it does if so much of its weight goes there.
NAMED_SHARE = 0.4

# Where a head looks from where it stands, in words; the decoder stands on the piece just written.
# Cross-attention looks from place t of the translation to place t and its neighbours of the source.
PLACES: dict[Kind, dict[int, str]] = {
    "cross": {
        -2: "two places before the same place of the source",
        -1: "one place before the same place of the source",
        0: "at the same place of the source",
        1: "one place behind the same place of the source",
        2: "two places behind the same place of the source",
    },
    "encoder": {
        -2: "two pieces back",
        -1: "at the piece before",
        0: "at the piece itself",
        1: "at the piece behind",
        2: "two pieces ahead",
    },
    "decoder": {
        0: "at the piece just written",
        -1: "at the piece before the one just written",
        -2: "two pieces before the one just written",
    },
}


@dataclass(frozen=True)
class Profile:
    """What every head of one kind of attention does on average; each tensor is [L, H], float32.

    The mean of the sentences' means. Rows are those of words: the end sign's is left out.

    Attributes:
        sentences: how many were looked at.
        at: by offset (key - query, of those in ``PLACES``), the mean weight so many keys ahead of
            the query, of the rows that have such a key.
        sharpest: weight of the strongest key of a row, the end of the source left out.
        spread: over how many keys the weight is spread, 2 to the power of the row's entropy in
            bits: 1 if all is on one key, K if it is even.
        edge: weight on the source's end sign; of the decoder on the begin sign.
        marks: weight on punctuation.
    """

    kind: Kind
    sentences: int
    at: dict[int, Tensor]
    sharpest: Tensor
    spread: Tensor
    edge: Tensor
    marks: Tensor

    def best_place(self) -> tuple[int, Tensor]:
        """The offset at which one head puts more of its weight than any head at another."""
        return max(self.at.items(), key=lambda item: float(item[1].max()))


def profiles(measured: Iterable[AttentionMaps]) -> dict[Kind, Profile]:
    """A profile of each kind of attention that the model has; none without sentences.

    Source of the kinds of heads looked for: Voita et al. 2019 (arXiv 1905.09418), Clark et al. 2019
    (arXiv 1906.04341).
    """
    sums: dict[tuple[Kind, str | int], list[Tensor]] = defaultdict(list)
    for maps in measured:
        if len(maps.source) < 2 or len(maps.outputs) < 2:
            continue  # no word
        for kind in maps.kinds:
            for name, shares_LH in _of_one(maps, kind).items():
                sums[kind, name].append(shares_LH)
    means = {key: torch.stack(shares).mean(0) for key, shares in sums.items()}
    return {
        kind: Profile(
            kind,
            len(sums[kind, "edge"]),
            {offset: means[kind, offset] for offset in PLACES[kind] if (kind, offset) in means},
            means[kind, "sharpest"],
            means[kind, "spread"],
            means[kind, "edge"],
            means[kind, "marks"],
        )
        for kind in KINDS
        if (kind, "edge") in means
    }


def _of_one(maps: AttentionMaps, kind: Kind) -> dict[str | int, Tensor]:
    weights_LHQK, _, columns = maps.labelled(kind)
    words_LHQK = weights_LHQK[:, :, :-1]
    shares: dict[str | int, Tensor] = {}
    for offset in PLACES[kind]:
        diagonal = words_LHQK.diagonal(offset, dim1=-2, dim2=-1)
        if diagonal.size(-1):
            shares[offset] = diagonal.mean(-1)
    inside = slice(None) if kind == "decoder" else slice(-1)
    shares["sharpest"] = words_LHQK[..., inside].amax(-1).mean(-1)
    entropy_LHQ = -torch.special.xlogy(words_LHQK, words_LHQK).sum(-1)
    shares["spread"] = entropy_LHQ.exp().mean(-1)
    shares["edge"] = words_LHQK[..., 0 if kind == "decoder" else -1].mean(-1)
    is_mark_K = torch.tensor([_is_mark(piece) for piece in columns])
    shares["marks"] = words_LHQK[..., is_mark_K].sum(-1).mean(-1)
    return shares


def _is_mark(piece: str) -> bool:
    letters = piece.replace(SPACE, "")
    is_sign = letters.startswith("<") and letters.endswith(">")
    return bool(letters) and not is_sign and not any(map(str.isalnum, letters))


def most(shares_LH: Tensor) -> tuple[int, int, float]:
    """The layer and the head that have most, counted from 0, and how much that is."""
    index = int(shares_LH.argmax())
    return (*divmod(index, shares_LH.size(1)), float(shares_LH.flatten()[index]))


def position_names(
    profile: Profile, least: float = NAMED_SHARE
) -> dict[tuple[int, int], tuple[str, float]]:
    """What the heads that look at a place, whatever is written there, are named for.

    Args:
        least: share of the weight, without which a head is left out.

    Returns:
        By layer and head, counted from 0, the place in words and the share of the weight there.
    """
    edge = "at the begin sign" if profile.kind == "decoder" else "at the end sign"
    candidates = [(edge, profile.edge), ("at punctuation", profile.marks)]
    candidates += [(PLACES[profile.kind][offset], share) for offset, share in profile.at.items()]
    found = {}
    num_layers, num_heads = profile.edge.shape
    for layer in range(num_layers):
        for head in range(num_heads):
            words, share_LH = max(candidates, key=lambda item: float(item[1][layer, head]))
            share = float(share_LH[layer, head])
            if share >= least:
                found[layer, head] = (words, share)
    return found
