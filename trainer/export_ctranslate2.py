"""A model in CTranslate2's format: which of our weights goes where.

The two models are the same function: layers before or after the norm, joined projections in the
same order (queries, keys, values), embeddings multiplied by ``sqrt(d_model)``. Positions are always
written out as a table, for CTranslate2's own sinusoids are not interleaved as the paper's are.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_shards.config import BOS_ID, EOS_ID, UNK_ID
from data_shards.errors import UserError
from data_shards.vocabulary import Vocabulary
from model.config import ModelConfig
from model.layers import DecoderLayer, EncoderLayer, FeedForward, Positions, sinusoids
from model.multi_head import MultiHeadAttention
from model.transformer import Transformer
from trainer.config import RunConfig
from trainer.run import LoadedModel

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8")

# CTranslate2's default bounds on inputs and outputs; a model whose table of positions is shorter
# ends in an error there.
_LONGEST_INPUT, _LONGEST_OUTPUT = 1024, 256


def require() -> Any:
    """The package ``ctranslate2``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("ctranslate2")
    except ModuleNotFoundError:
        raise UserError(
            "CTranslate2 is not installed: pip install '.[ctranslate2]' in babelray's checkout, "
            "or give --format safetensors"
        ) from None


def check(config: ModelConfig) -> None:
    """Whether CTranslate2 has such a model.

    Raises:
        UserError: it has not, and which setting is why.
    """
    reasons = {
        "model.kind": config.kind != "transformer" and config.kind,
        "model.attention": config.attention != "scaled_dot" and config.attention,
        "model.local_radius": config.local_radius is not None and config.local_radius,
        "model.d_k": config.key_width * config.num_heads != config.d_model and config.key_width,
        "model.d_v": config.value_width * config.num_heads != config.d_model and config.value_width,
    }
    for name, value in reasons.items():
        if value is not False:
            raise UserError(
                f"CTranslate2 has no model with {name}={value}: give --format safetensors"
            )


def write(loaded: LoadedModel, folder: Path, quantization: str) -> None:
    """Write ``model.bin``, ``config.json`` and ``shared_vocabulary.json``.

    Float32 tensors are handed over as they are, one is copied at a time while writing; int8 needs a
    copy of the weights meanwhile, since CTranslate2 scales them where they lie.
    """
    ctranslate2 = require()
    spec = _spec(ctranslate2, loaded, copied=quantization == "int8")
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))


def search_options(config: RunConfig) -> dict[str, Any]:
    """What ``translate_batch`` needs to search as ``config`` says, as far as it can.

    CTranslate2 divides by a power of the length, our rule "average"; for the other rules its
    default exponent is given.
    """
    evaluation, model = config.evaluation, config.model
    plain = evaluation.length_penalty == 0
    exact = plain or evaluation.length_rule == "average"
    options: dict[str, Any] = {
        "beam_size": 1 if evaluation.search == "greedy" else evaluation.beam,
        "length_penalty": evaluation.length_penalty if exact else 1.0,
    }
    if evaluation.unknown == "forbid":
        options["disable_unk"] = True
    if model.positions == "learned":
        if model.max_positions < _LONGEST_INPUT:
            options["max_input_length"] = model.max_positions
        if model.max_positions < _LONGEST_OUTPUT:
            options["max_decoding_length"] = model.max_positions
    return options


def tokens(vocabulary: Vocabulary) -> list[str]:
    """Every piece, in the order of the ids."""
    return vocabulary.pieces(range(vocabulary.size))


def _spec(ctranslate2: Any, loaded: LoadedModel, *, copied: bool) -> Any:
    config, model = loaded.config.model, loaded.model
    assert isinstance(model, Transformer)
    spec = ctranslate2.specs.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.num_heads,
        pre_norm=config.norm == "pre",
    )
    fill = _Fill(copied)
    longest_output = config.max_positions + loaded.config.evaluation.max_extra_length
    num_positions = max(longest_output, _LONGEST_INPUT, _LONGEST_OUTPUT)
    encoder, decoder = spec.encoder, spec.decoder
    encoder.embeddings[0].weight = fill.matrix(model, "source")
    decoder.embeddings.weight = fill.matrix(model, "target")
    decoder.projection.weight = fill.matrix(model, "softmax")
    for side, positions, norm in (
        (encoder, model.source_positions, model.encoder_norm),
        (decoder, model.target_positions, model.decoder_norm),
    ):
        side.position_encodings.encodings = fill.positions(positions, num_positions)
        if config.norm == "pre":
            fill.norm(side.layer_norm, norm)
    for layer, ours in zip(encoder.layer, model.encoder, strict=True):
        fill.layer(layer, ours)
    for layer, ours in zip(decoder.layer, model.decoder, strict=True):
        fill.layer(layer, ours)

    pieces = tokens(loaded.vocabulary)
    spec.register_source_vocabulary(pieces)
    spec.register_target_vocabulary(pieces)
    spec.config.unk_token = pieces[UNK_ID]
    spec.config.bos_token = spec.config.decoder_start_token = pieces[BOS_ID]
    spec.config.eos_token = pieces[EOS_ID]
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = nn.LayerNorm(1).eps
    return spec


class _Fill:
    """Puts weights into a specification; each tensor once, so that what is shared stays shared."""

    def __init__(self, copied: bool) -> None:
        self._copied = copied
        self._given: dict[int, Tensor] = {}

    def tensor(self, weight: Tensor) -> Tensor:
        """The weight, or its one copy."""
        if id(weight) not in self._given:
            given = weight.detach().to("cpu")
            self._given[id(weight)] = given.clone() if self._copied else given
        return self._given[id(weight)]

    def matrix(self, model: Transformer, role: str) -> Tensor:
        """What embeds the source, the target, or projects onto the vocabulary."""
        matrices = model.matrices
        matrix = matrices[role if role in matrices else "shared"]
        return self.tensor(matrix.weight)  # type: ignore[arg-type]

    def positions(self, positions: Positions, num_positions: int) -> Tensor:
        """The table [L, D]: the learned one, or as many sinusoids."""
        if positions.weight is not None:
            return self.tensor(positions.weight)
        cpu = torch.device("cpu")
        return self.tensor(sinusoids(num_positions, positions.d_model, cpu, torch.float32))

    def norm(self, spec: Any, norm: nn.Module) -> None:
        """A layer norm."""
        assert isinstance(norm, nn.LayerNorm)
        spec.gamma, spec.beta = self.tensor(norm.weight), self.tensor(norm.bias)

    def linear(self, spec: Any, linear: nn.Linear) -> None:
        """A linear map; both sides have rows for outputs."""
        spec.weight, spec.bias = self.tensor(linear.weight), self.tensor(linear.bias)

    def attention(self, spec: Any, attention: MultiHeadAttention) -> None:
        """Self-attention has two maps, attention over the source three."""
        if attention.over_memory:
            maps = [attention.query, attention.key_value, attention.output]
        else:
            maps = [attention.query_key_value, attention.output]
        for linear_spec, linear in zip(spec.linear, maps, strict=True):
            self.linear(linear_spec, linear)

    def feed_forward(self, spec: Any, feed_forward: FeedForward) -> None:
        """Two maps with a rectifier between."""
        self.linear(spec.linear_0, feed_forward.inner)
        self.linear(spec.linear_1, feed_forward.outer)

    def layer(self, spec: Any, layer: nn.Module) -> None:
        """A layer of the encoder or the decoder."""
        assert isinstance(layer, EncoderLayer | DecoderLayer)
        self.attention(spec.self_attention, layer.attention)
        self.norm(spec.self_attention.layer_norm, layer.attention_norm)
        if isinstance(layer, DecoderLayer):
            self.attention(spec.attention, layer.cross)
            self.norm(spec.attention.layer_norm, layer.cross_norm)
        self.feed_forward(spec.ffn, layer.feed_forward)
        self.norm(spec.ffn.layer_norm, layer.feed_forward_norm)
