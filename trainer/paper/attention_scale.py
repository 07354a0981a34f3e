"""Why dot products are divided by the root of their width: what softmax makes of them.

Shapes: R rows of logits, S keys, B batch, H heads, T queries, K width of a head.

Source: Vaswani et al. 2017, section 3.2.1 and its footnote 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data_shards.config import BOS_ID, EOS_ID
from data_shards.errors import UserError
from model.attention_kernels import split_heads
from model.build import build
from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder
from model.masks import causal_mask
from model.multi_head import MultiHeadAttention
from trainer.run import LoadedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GREATEST_FP16 = 65504.0
_ROWS, _KEYS = 2048, 64
# Sentences that a trained model is looked into with.
_SENTENCES = 32


def softmax_statistics(logits_RS: Tensor) -> dict[str, float]:
    """What softmax makes of logits; minus infinity is not counted among them.

    Returns:
        ``variance`` and ``largest`` (absolute) of the logits; of the softmax ``entropy`` in nats
        and ``top``, the greatest weight, means over the rows; ``saturated``, the part of rows where
        that is above 0.99; ``gradient`` and ``median_gradient``, the mean and the median of the
        Frobenius norm of the Jacobian ``dp/dz``, which is 0 where one key has all the weight.
    """
    logits_RS = logits_RS.double()
    seen = logits_RS[logits_RS > -math.inf]
    weights_RS = logits_RS.softmax(-1)
    squares, cubes = weights_RS.square().sum(-1), weights_RS.pow(3).sum(-1)
    # diag(p) - p p^T: its squares summed.
    jacobian = (squares - 2 * cubes + squares.square()).clamp(min=0).sqrt()
    return {
        "variance": float(seen.var()),
        "largest": float(seen.abs().max()),
        "entropy": float(torch.special.entr(weights_RS).sum(-1).mean()),
        "top": float(weights_RS.amax(-1).mean()),
        "saturated": float((weights_RS.amax(-1) > 0.99).double().mean()),
        "gradient": float(jacobian.mean()),
        "median_gradient": float(jacobian.median()),
    }


def gaussian_rows(widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Queries and keys of independent components with mean 0 and variance 1, as in footnote 4.

    Yields:
        ``softmax_statistics`` for each width, type and scale, with ``error``, half the sum of the
        differences of a row's weights to those of the same numbers in float64; ``bound``, the
        standard deviation of queries and keys at which the largest logit passes float16's greatest
        number; and ``exp_overflow``, the part of rows whose exponentials pass the type's greatest
        number if the greatest logit is not subtracted first.
    """
    for width in widths:
        generator = torch.Generator().manual_seed(width)
        query_RK = torch.randn(_ROWS, width, generator=generator, dtype=torch.float64)
        key_SK = torch.randn(_KEYS, width, generator=generator, dtype=torch.float64)
        for name, dtype in DTYPES.items():
            query, key = query_RK.to(dtype), key_SK.to(dtype)
            products_RS = query @ key.T
            exact_RS = query.double() @ key.double().T
            for scaled in (False, True):
                scale = width**-0.5 if scaled else 1.0
                # As the kernels do: products in the type, the softmax in float32.
                logits_RS = products_RS.float() * scale
                difference = logits_RS.double().softmax(-1) - (exact_RS * scale).softmax(-1)
                statistics = softmax_statistics(logits_RS)
                limit = math.log(torch.finfo(dtype).max)
                yield {
                    "d_k": width,
                    "dtype": name,
                    "scaled": scaled,
                    **statistics,
                    "error": float(difference.abs().sum(-1).mean() / 2),
                    "bound": math.sqrt(_GREATEST_FP16 / statistics["largest"]),
                    "exp_overflow": float((logits_RS.amax(-1) > limit).double().mean()),
                }


def initial_rows(num_heads: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The first encoder layer of a freshly initialised base model, by its number of heads."""
    for heads in num_heads:
        settings = {"preset": "base", "encoder_layers": 1, "decoder_layers": 1}
        config = ModelConfig.model_validate({**settings, "num_heads": heads})
        torch.manual_seed(0)
        model = build(config, 1000).eval()
        ids_BS = torch.randint(4, 1000, (8, _KEYS))
        found = dict(_head_vectors(model, partial(model, ids_BS, ids_BS)))
        query, key = found["encoder.0.attention"]
        yield from _scaled_and_not(query, key, {"heads": heads, "d_k": config.key_width})


def model_rows(loaded: LoadedModel) -> list[dict[str, Any]]:
    """A trained model beside one of its shape that is not: means over layers, heads and sentences.

    Raises:
        UserError: it is not of dot-product attention with several heads.
    """
    config = loaded.config.model
    if config.kind != "transformer" or config.attention not in {"scaled_dot", "dot"}:
        raise UserError(
            f"the scale is one of dot products: this run is a {config.kind} with "
            f"{config.attention} attention: give a Transformer's"
        )
    sources, targets = loaded.manifest.split_text("valid")
    encode = loaded.vocabulary.encode
    pairs = list(zip(encode(sources[:_SENTENCES]), encode(targets[:_SENTENCES]), strict=True))
    torch.manual_seed(0)
    fresh = build(config, loaded.vocabulary.size).eval()
    rows = []
    for state, model in (("initial", fresh), ("trained", loaded.model.cpu())):
        sums: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for source, target in pairs:
            source_BS = torch.tensor([[*source, EOS_ID]])
            target_BT = torch.tensor([[BOS_ID, *target]])
            for name, (query, key) in _head_vectors(model, partial(model, source_BS, target_BT)):
                side, _, module = name.split(".")
                kind = "cross" if module == "cross" else side
                for row in _scaled_and_not(query, key, {}, causal=kind == "decoder"):
                    sums.setdefault((kind, row["scaled"]), []).append(row)
        for (kind, scaled), found in sums.items():
            means = {
                key: sum(row[key] for row in found) / len(found)
                for key in found[0]
                if key != "scaled"
            }
            means["largest"] = max(row["largest"] for row in found)
            rows.append({"state": state, "kind": kind, "scaled": scaled, **means})
    return rows


def _scaled_and_not(
    query_BHTK: Tensor, key_BHSK: Tensor, labels: dict[str, Any], *, causal: bool = False
) -> Iterator[dict[str, Any]]:
    products_BHTS = query_BHTK @ key_BHSK.transpose(-1, -2)
    spread = {"query_variance": float(query_BHTK.var()), "key_variance": float(key_BHSK.var())}
    for scaled in (False, True):
        logits_BHTS = products_BHTS * (query_BHTK.size(-1) ** -0.5 if scaled else 1.0)
        if causal:
            logits_BHTS = logits_BHTS + causal_mask(query_BHTK.size(2), query_BHTK.device)
        statistics = softmax_statistics(logits_BHTS.flatten(0, 2))
        yield {**labels, "scaled": scaled, **statistics, **spread}


def _head_vectors(
    model: EncoderDecoder, run: Callable[[], object]
) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Queries [B, H, T, K] and keys [B, H, S, K] of every attention while ``run`` runs, by name."""
    outputs: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    attentions = {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    for name, attention in attentions.items():
        for part, linear in attention.named_children():
            if isinstance(linear, nn.Linear):
                handles.append(linear.register_forward_hook(keep(f"{name}.{part}")))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, attention in attentions.items():
        heads, keys, values = attention.num_heads, attention.key_width, attention.value_width
        if attention.over_memory:
            query = split_heads(outputs[f"{name}.query"], heads, (keys,))[0]
            key = split_heads(outputs[f"{name}.key_value"], heads, (keys, values))[0]
        else:
            joined = outputs[f"{name}.query_key_value"]
            query, key, _ = split_heads(joined, heads, (keys, keys, values))
        found.append((name, (query.float(), key.float())))
    return found
