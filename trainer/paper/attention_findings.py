"""What a result of the attention bench says, in sentences made of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What is compared: named as in ``attention_bench.WAYS``.
_FORMULA, _HAND, _FUSED = "scaled dot, formula", "scaled dot, by hand", "scaled dot, fused"
_ADDITIVE, _PIECES = "additive, formula", "additive, in pieces"
_MASKED, _BLOCKS = "local, fused and masked", "local, in blocks"


def findings(result: Mapping[str, Any]) -> dict[str, str]:
    """Lists of sentences by the names of the page's parts."""
    found = {
        "found_time": _time(result),
        "found_memory": _memory(result),
        "found_scale": _scale(result),
        "found_range": _range(result),
        "found_model": _model(result),
    }
    return {name: "\n".join(f"- {line}" for line in lines) for name, lines in found.items()}


class _Ratios:
    """How many times as much one way takes as another, at one size."""

    def __init__(self, result: Mapping[str, Any], value: str) -> None:
        self.rows = {
            (row["way"], row["dtype"], row["length"], row["width"]): row[value]
            for row in result["speed"]
        }
        self.width = result["sizes"]["width"]

    def lengths(self, *ways: str, dtype: str = "fp32") -> list[int]:
        """At which all of them were measured, at the width that all lengths have."""
        return sorted(
            length
            for way, kind, length, width in self.rows
            if (way, kind, width) == (ways[0], dtype, self.width)
            and all((other, dtype, length, self.width) in self.rows for other in ways)
        )

    def of(self, way: str, other: str, length: int, dtype: str = "fp32") -> str:
        """As text."""
        one, two = (self.rows[name, dtype, length, self.width] for name in (way, other))
        return f"{one / two:.2g}" if one / two < 100 else f"{one / two:,.0f}"


def _time(result: Mapping[str, Any]) -> Iterator[str]:
    """Of forward and backward."""
    ratios = _Ratios(result, "training_s")
    length = ratios.lengths(_ADDITIVE, _PIECES, _FUSED)[-1]
    (batch,) = {row["batch"] for row in result["speed"] if row["length"] == length}
    yield (
        f"Forward and backward in fp32, of {batch} sentence{'s' * (batch > 1)} of length {length} "
        f"with d_k = {ratios.width}: additive attention by its formula takes "
        f"{ratios.of(_ADDITIVE, _FUSED, length)} times as long as the fused dot product, in pieces "
        f"{ratios.of(_PIECES, _FUSED, length)} times: d_k hyperbolic tangents for each query and "
        'key cannot be a matrix product. So much is the paper\'s "much faster" here.'
    )
    for dtype in ("fp32", "bf16"):
        both = ratios.lengths(_HAND, _FUSED, dtype=dtype)
        cells = ", ".join(f"{n:,}: {ratios.of(_FUSED, _HAND, n, dtype)}" for n in both)
        yield (
            f"The fused kernel against steps by hand, forward and backward in {dtype}, times as "
            f"long at length {cells}."
        )
    both = ratios.lengths(_MASKED, _BLOCKS)
    cells = ", ".join(f"{n:,}: {ratios.of(_MASKED, _BLOCKS, n)}" for n in both)
    yield (
        f"A neighbourhood of {result['radius']} as a masked square against blocks, forward and "
        f"backward in fp32, times as long at length {cells}."
    )


def _memory(result: Mapping[str, Any]) -> Iterator[str]:
    ratios = _Ratios(result, "training_bytes")
    longest = ratios.lengths(_FORMULA, _FUSED)[-1]
    yield (
        f"At length {longest:,} the formula holds {ratios.of(_FORMULA, _FUSED, longest)} times as "
        f"much as the fused kernel, the steps by hand {ratios.of(_HAND, _FUSED, longest)} times: "
        "they keep the weights, which grow with the square of the length."
    )
    both = ratios.lengths(_ADDITIVE, _PIECES)[-1]
    yield (
        f"The hidden layer of additive attention takes {ratios.of(_ADDITIVE, _PIECES, both)} times "
        f"as much when it is held whole, at length {both}."
    )
    yield (
        f"Blocks hold {ratios.of(_BLOCKS, _MASKED, longest)} times as much as the fused kernel at "
        f"length {longest:,}: each key is copied into the blocks that see it. They save time, not "
        "memory, beside a kernel that holds no weights."
    )


def _scale(result: Mapping[str, Any]) -> Iterator[str]:
    rows = {
        (row["d_k"], row["scaled"]): row for row in result["gaussian"] if row["dtype"] == "fp32"
    }
    widths = sorted({width for width, _ in rows})
    wide, even = rows[widths[-1], False], rows[widths[-1], True]
    ratios = [rows[width, False]["variance"] / width for width in widths]
    variances = [rows[width, True]["variance"] for width in widths]
    yield (
        f"The variance of unscaled logits is d_k ({min(ratios):.2f} to {max(ratios):.2f} times "
        f"it), of scaled ones 1 ({min(variances):.2f} to {max(variances):.2f}), as footnote 4 "
        "has it."
    )
    yield (
        f"At d_k = {widths[-1]:,} the entropy is {wide['entropy']:.2f} nats instead of "
        f"{even['entropy']:.2f}, {wide['saturated']:.0%} of the queries are saturated, and the "
        f"median gradient is {even['median_gradient'] / wide['median_gradient']:,.0f} times "
        "smaller than with the scale."
    )
    smaller = [
        width
        for width in widths
        if rows[width, False]["median_gradient"] < rows[width, True]["median_gradient"]
    ]
    if smaller:
        yield (
            f'The paper\'s "extremely small gradients" are those of large d_k: unscaled, the '
            f"median gradient falls below the scaled one from d_k = {smaller[0]:,} on. The mean "
            "falls less, for queries between two keys keep theirs. Narrower heads lose nothing "
            "without the scale, by this measure."
        )


def _range(result: Mapping[str, Any]) -> Iterator[str]:
    rows = {(row["d_k"], row["scaled"], row["dtype"]): row for row in result["gaussian"]}
    widest = max(width for width, _, _ in rows)
    plain, scaled = rows[widest, False, "bf16"], rows[widest, True, "bf16"]
    fp32, fp16 = (rows[widest, False, dtype] for dtype in ("fp32", "fp16"))
    yield (
        f"At d_k = {widest:,} weights in bf16 are wrong by {plain['error']:.1e} unscaled and "
        f"{scaled['error']:.1e} scaled: a logit's rounding error grows with the logit, and the "
        "softmax makes a factor of it."
    )
    yield (
        f"Without subtracting the greatest logit, {fp16['exp_overflow']:.0%} of the queries "
        f"overflow in fp16 and {fp32['exp_overflow']:.0%} in fp32 and bf16, which have the same "
        f"exponents; scaled, {rows[widest, True, 'fp16']['exp_overflow']:.0%} even in fp16."
    )
    yield (
        "No logit of unit variance overflows fp16 itself. Queries and keys "
        f"{fp32['bound']:.0f} times as spread would, and with the scale "
        f"{rows[widest, True, 'fp32']['bound']:.0f} times, if it is applied before the product is "
        "rounded: a product first rounded and then scaled has the bound of the unscaled one."
    )


def _model(result: Mapping[str, Any]) -> Iterator[str]:
    first = [row for row in result["initial"] if not row["scaled"]]
    most = max(first, key=lambda row: row["d_k"])
    yield (
        "The more heads share the width, the narrower each: without the scale "
        + ", ".join(f"{row['saturated']:.0%}" for row in first)
        + " of the first layer's queries are saturated with "
        + ", ".join(f"{row['heads']}" for row in first)
        + f" heads. One head of {most['d_k']} would start with a median gradient of "
        f"{most['median_gradient']:.1g}."
    )
    if result["trained"]:
        rows = {(r["kind"], r["state"], r["scaled"]): r for r in result["trained"]}
        before, after = rows["cross", "initial", True], rows["cross", "trained", True]
        bare = rows["cross", "trained", False]
        yield (
            "By training, across to the source, the variance of the scaled logits goes "
            f"from {before['variance']:.2f} to {after['variance']:.2f}, the entropy from "
            f"{before['entropy']:.2f} to {after['entropy']:.2f} nats. The scale is where it "
            f"begins, not where it ends; without it the same queries and keys would leave "
            f"{bare['saturated']:.0%} of the queries saturated."
        )
