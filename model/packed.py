"""The Transformer over sequences laid end to end, so that no padding is computed on.

The tokens of a batch are one row. Attention is told where each sequence begins and sees no further;
everything else treats each token by itself anyway. A GPU computes the attention with PyTorch's
variable-length kernel (``torch.nn.attention.varlen``), a CPU with a reference that is equal to the
padded path and not meant to be fast.

Dropout's masks are drawn beforehand, one generator a lane, and passed in: they are the same whether
lanes are computed together or one after the other, and a compiled layer sees them as data.

On a CPU the same pass gives bitwise the same gradients. On a GPU it does as far as PyTorch's
kernels are deterministic: the variable-length kernel's backward pass may sum the queries' gradient
in any order (not tried on a GPU here; tests/gpu asks).

Shapes: N tokens that ask, M tokens that are asked, B sequences, H heads, K width of a head, D
d_model, C places where a side's states are dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig

if TYPE_CHECKING:  # they call what is here
    from model.layers import DecoderLayer, EncoderLayer
    from model.multi_head import MultiHeadAttention
    from model.transformer import Transformer

# The kernel's lengths are bounds, so rounded ones do, and few different ones are ever seen.
_LENGTH_STEP = 64


class Side(NamedTuple):
    """One side's sequences, end to end.

    Attributes:
        positions_N: int64; the place of each token in its sequence.
        starts_B: int32 [B + 1]; where each sequence begins, and where the last ends. Every token
            is of a sequence; a sequence may be empty.
        longest: bound on a sequence's length.
        masks_CND: of dropout, True where a number is kept; None drops nothing.
    """

    positions_N: Tensor  # noqa: N815 - shape suffix
    starts_B: Tensor  # noqa: N815
    longest: int
    masks_CND: Tensor | None = None  # noqa: N815


class Packing(NamedTuple):
    """Both sides of a batch: as many sequences each, in the same order."""

    source: Side
    target: Side


class Segments(NamedTuple):
    """What an attention over packed sequences needs to know: stands where a mask would."""

    queries: Side
    keys: Side


class PackedLayer(NamedTuple):
    """What a layer over packed sequences needs to know: stands where a mask would.

    ``masks_CND`` are this layer's own, one for each residual; ``memory`` is the decoder's.
    """

    side: Side
    memory: Side | None
    masks_CND: Tensor | None  # noqa: N815


def varlen_attention(
    query_NHK: Tensor,
    key_MHK: Tensor,
    value_MHK: Tensor,
    segments: Segments,
    *,
    causal: bool,
    radius: int | None,
    scale: float,
) -> Tensor:
    """Each sequence's queries over its own keys, [N, H, K].

    Args:
        causal: hide later positions; of self-attention, as ``radius``.
        radius: hide positions further away than this.
        scale: of the dot products.
    """
    if query_NHK.device.type == "cpu":
        return cpu_attention(
            query_NHK, key_MHK, value_MHK, segments, causal=causal, radius=radius, scale=scale
        )
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if radius is None else radius
    output = varlen_attn(
        query_NHK,
        key_MHK,
        value_MHK,
        segments.queries.starts_B,
        segments.keys.starts_B,
        _rounded(segments.queries.longest),
        _rounded(segments.keys.longest),
        scale=scale,
        window_size=(left, 0 if causal else left),
    )
    assert isinstance(output, Tensor)  # and no more, unless asked for
    return output


def reference_attention(
    query_NHK: Tensor,
    key_MHK: Tensor,
    value_MHK: Tensor,
    segments: Segments,
    *,
    causal: bool,
    radius: int | None,
    scale: float,
) -> Tensor:
    """``varlen_attention`` as it is defined, sequence by sequence; float32 at least inside."""
    precise = torch.promote_types(query_NHK.dtype, torch.float32)
    parts = []
    ends = segments.queries.starts_B.tolist(), segments.keys.starts_B.tolist()
    bounds = [list(itertools.pairwise(side)) for side in ends]
    for (first, last), (first_key, last_key) in zip(*bounds, strict=True):
        query_HtK = query_NHK[first:last].transpose(0, 1)
        key_HsK = key_MHK[first_key:last_key].transpose(0, 1)
        value_HsK = value_MHK[first_key:last_key].transpose(0, 1)
        scores_Hts = (query_HtK @ key_HsK.transpose(1, 2)).to(precise) * scale
        query_t1 = torch.arange(last - first)[:, None]
        key_s = torch.arange(last_key - first_key)
        if causal:
            scores_Hts = scores_Hts.masked_fill(key_s > query_t1, -torch.inf)
        if radius is not None:
            scores_Hts = scores_Hts.masked_fill((key_s - query_t1).abs() > radius, -torch.inf)
        # (A softmax over no key at all gives no weights, and so zeros: as the kernel does.)
        weights_Hts = scores_Hts.softmax(-1).to(value_HsK.dtype)
        parts.append((weights_Hts @ value_HsK).transpose(0, 1))
    return torch.cat(parts)


# On a CPU. Whoever compiles layers keeps it out of the compiler's sight, which would unroll it.
cpu_attention: Callable[..., Tensor] = reference_attention


def packed_attention(
    attention: MultiHeadAttention,
    inputs_ND: Tensor,
    memory_MD: Tensor | None,
    segments: Segments,
    *,
    causal: bool,
) -> Tensor:
    """``MultiHeadAttention.forward`` over packed sequences, [N, D]."""
    heads, width = attention.num_heads, attention.key_width
    if memory_MD is None:
        projected_NPHK = attention.query_key_value(inputs_ND).view(-1, 3, heads, width)
        query_NHK, key_MHK, value_MHK = projected_NPHK.unbind(1)
    else:
        query_NHK = attention.query(inputs_ND).view(-1, heads, width)
        projected_MPHK = attention.key_value(memory_MD).view(-1, 2, heads, width)
        key_MHK, value_MHK = projected_MPHK.unbind(1)
    scale = attention.score.plain_scale(width)
    assert scale is not None, "why_not lets only plain dot products pass"
    output_NHK = varlen_attention(
        query_NHK,
        key_MHK,
        value_MHK,
        segments,
        causal=causal,
        radius=attention.radius,
        scale=scale,
    )
    return attention.output(output_NHK.flatten(1))  # type: ignore[no-any-return]


def packed_positions(
    embedded_ND: Tensor, table_LD: Tensor, side: Side, dropout: float, *, scale: float
) -> Tensor:
    """``Positions.forward``: embeddings times ``scale``, and each token's own position."""
    summed_ND = torch.add(table_LD[side.positions_N], embedded_ND, alpha=scale)
    if side.masks_CND is None:
        return summed_ND
    return (summed_ND * side.masks_CND[0]) * (1 / (1 - dropout))


def packed_encoder_layer(layer: EncoderLayer, states_ND: Tensor, packed: PackedLayer) -> Tensor:
    """``EncoderLayer.forward``."""
    own = Segments(packed.side, packed.side)
    states_ND = _residual(
        layer, 0, packed, states_ND, layer.attention_norm, lambda x: layer.attention(x, None, own)
    )
    return _residual(layer, 1, packed, states_ND, layer.feed_forward_norm, layer.feed_forward)


def packed_decoder_layer(
    layer: DecoderLayer, states_ND: Tensor, memory_MD: Tensor, packed: PackedLayer
) -> Tensor:
    """``DecoderLayer.forward``."""
    assert packed.memory is not None
    own, other = Segments(packed.side, packed.side), Segments(packed.side, packed.memory)
    states_ND = _residual(
        layer,
        0,
        packed,
        states_ND,
        layer.attention_norm,
        lambda x: layer.attention(x, None, own, causal=True),
    )
    states_ND = _residual(
        layer,
        1,
        packed,
        states_ND,
        layer.cross_norm,
        lambda x: layer.cross(x, memory_MD, other),
    )
    return _residual(layer, 2, packed, states_ND, layer.feed_forward_norm, layer.feed_forward)


def _residual(
    layer: EncoderLayer | DecoderLayer,
    place: int,
    packed: PackedLayer,
    inputs_ND: Tensor,
    norm: nn.Module,
    sublayer: Callable[[Tensor], Tensor],
) -> Tensor:
    """``norm(x + sublayer(x))`` (the paper's), or ``x + sublayer(norm(x))``."""
    outputs_ND = sublayer(norm(inputs_ND) if layer.pre_norm else inputs_ND)
    if packed.masks_CND is None:
        summed_ND = inputs_ND + outputs_ND
    else:
        kept_ND = outputs_ND * packed.masks_CND[place]
        summed_ND = torch.add(inputs_ND, kept_ND, alpha=1 / (1 - layer.dropout))
    return summed_ND if layer.pre_norm else norm(summed_ND)


def call_layer(layer: nn.Module, *arguments: Any) -> Tensor:
    """A layer as it is. (A compiled version of this function is one for all layers.)"""
    return layer(*arguments)  # type: ignore[no-any-return]


def packed_states(
    model: Transformer, source_M: Tensor, target_in_N: Tensor, packing: Packing
) -> Tensor:
    """``Transformer.states`` over packed sequences, [N, D].

    Modules are called in the order of the padded path, which ZeRO 3 relies on.
    """
    source, target = packing
    memory_MD = model.source_positions(model.matrix("source", source_M, "embed"), 0, source)
    for index, layer in enumerate(model.encoder):
        packed = PackedLayer(_bare(source), None, _own_masks(source, index, 2))
        memory_MD = model.call_layer(layer, memory_MD, packed)
    memory_MD = model.encoder_norm(memory_MD)
    states_ND = model.target_positions(model.matrix("target", target_in_N, "embed"), 0, target)
    for index, layer in enumerate(model.decoder):
        packed = PackedLayer(_bare(target), _bare(source), _own_masks(target, index, 3))
        states_ND = model.call_layer(layer, states_ND, memory_MD, packed)
    return model.decoder_norm(states_ND)  # type: ignore[no-any-return]


def _bare(side: Side) -> Side:
    """Without the masks, and with a length of which there are few."""
    return Side(side.positions_N, side.starts_B, _rounded(side.longest))


def _own_masks(side: Side, layer: int, num: int) -> Tensor | None:
    """Those of a layer with so many residuals; the first of all is of the positions."""
    if side.masks_CND is None:
        return None
    first = 1 + layer * num
    return side.masks_CND[first : first + num]


def _rounded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def with_dropout(
    packing: Packing,
    config: ModelConfig,
    lanes: Sequence[tuple[int, int]],
    seeds: Sequence[int],
) -> Packing:
    """The same with dropout's masks for one pass.

    Args:
        lanes: of each lane its source and its target tokens, in the order in which they lie.
        seeds: of each lane. A lane's masks follow from its seed and its own tokens alone.
    """
    if config.dropout == 0:
        return packing
    generators = [torch.Generator(packing.source.starts_B.device) for _ in seeds]
    for generator, seed in zip(generators, seeds, strict=True):
        generator.manual_seed(seed)
    sides = []
    depths = 1 + 2 * config.encoder_layers, 1 + 3 * config.decoder_layers
    for number, (side, depth) in enumerate(zip(packing, depths, strict=True)):
        num_tokens = side.positions_N.size(0)
        lengths = [lane[number] for lane in lanes]
        masks_CND = torch.empty(
            (depth, num_tokens, config.d_model), dtype=torch.bool, device=side.starts_B.device
        )
        first = 0
        for length, generator in zip(lengths, generators, strict=True):
            # (Drawn in a row, which a slice is not: its numbers must not depend on its place.)
            whole = length == num_tokens
            drawn_CND = masks_CND if whole else masks_CND.new_empty((depth, length, config.d_model))
            drawn_CND.bernoulli_(1 - config.dropout, generator=generator)
            if not whole:
                masks_CND[:, first : first + length] = drawn_CND
            first += length
        # What fills a row up belongs to no lane; nobody reads it.
        masks_CND[:, first:] = True
        sides.append(side._replace(masks_CND=masks_CND))
    return Packing(*sides)
