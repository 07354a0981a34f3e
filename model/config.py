"""What a model is: a torch-free schema.

Source: Vaswani et al. 2017 (arXiv 1706.03762), sections 3 and 6.2, Table 3.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.presets import PRESETS, Kind

ScoreName = Literal["scaled_dot", "dot", "general", "additive"]

# Fields that belong to some kinds only.
_TRANSFORMER: frozenset[Kind] = frozenset({"transformer"})
_WITH_POSITIONS: frozenset[Kind] = frozenset({"transformer", "convolutional"})
_KINDS_OF: dict[str, frozenset[Kind]] = {
    "d_ff": _TRANSFORMER,
    "num_heads": _TRANSFORMER,
    "d_k": _TRANSFORMER,
    "d_v": _TRANSFORMER,
    "local_radius": _TRANSFORMER,
    "attention_dropout": _TRANSFORMER,
    "activation_dropout": _TRANSFORMER,
    "norm": _TRANSFORMER,
    "positions": _WITH_POSITIONS,
    "kernel_size": frozenset({"convolutional"}),
}


class ModelConfig(BaseModel):
    """Shape of an encoder-decoder model: the Transformer, or one that it is compared with.

    ``preset`` fills what is not given explicitly; the resolved object carries every value, so a
    later change of a preset never changes an old run. A field that the kind does not have keeps
    its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field(
        "transformer",
        description="transformer; rnn, lstm or gru with attention (model.recurrent); or "
        "convolutional (model.convolutional)",
    )
    preset: str | None = None
    d_model: int = Field(512, ge=8, le=16384, description="width of every layer")
    d_ff: int = Field(2048, ge=8, le=65536, description="width inside the feed-forward layers")
    num_heads: int = Field(8, ge=1, le=256)
    d_k: int | None = Field(
        None, ge=1, le=16384, description="width of a head's queries and keys; d_model / num_heads"
    )
    d_v: int | None = Field(
        None, ge=1, le=16384, description="width of a head's values; d_model / num_heads"
    )
    encoder_layers: int = Field(6, ge=1, le=100)
    decoder_layers: int = Field(6, ge=1, le=100)
    attention: ScoreName = Field(
        "scaled_dot",
        description="how a query and a key are compared: model.attention has the formulas",
    )
    local_radius: int | None = Field(
        None,
        ge=0,
        le=65536,
        description="self-attention sees no more than so many positions to either side",
    )
    kernel_size: int = Field(3, ge=1, le=255, description="positions that a convolution sees")
    dropout: float = Field(
        0.1, ge=0.0, lt=1.0, description="on embeddings and on each sub-layer's output (5.4)"
    )
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on attention weights")
    activation_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="inside the feed-forward")
    norm: Literal["post", "pre"] = Field("post", description="layer norm after (paper) or before")
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_positions: int = Field(
        1024, ge=2, le=65536, description="longest sequence; bounds learned positions"
    )
    tie_embeddings: bool = Field(
        True, description="source and target embeddings and the softmax share one matrix (3.4)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        kind, name = values.get("kind", "transformer"), values["preset"]
        if not isinstance(kind, str) or not isinstance(name, str):
            return values  # the field itself is wrong, and will be told
        presets = PRESETS.get(cast("Kind", kind))
        if presets is None:
            return values  # the kind itself is wrong, and will be told
        if name not in presets:
            close = get_close_matches(name, presets, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"model.preset: {kind} has no preset {name!r}; {hint}known: {', '.join(presets)}"
            )
        return {**presets[name], **values}

    @model_validator(mode="after")
    def _check_kind(self) -> ModelConfig:
        for name, kinds in _KINDS_OF.items():
            if self.kind not in kinds and getattr(self, name) != self.default(name):
                others = " or ".join(kind for kind in get_args(Kind) if kind in kinds)
                raise ValueError(
                    f"model.{name} is of kind {others}; {self.kind} has none: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        divides = self.d_model % self.num_heads == 0 or self.kind not in _TRANSFORMER
        if not divides and (self.d_k is None or self.d_v is None):
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: "
                "choose a number of heads that divides the width, or give d_k and d_v"
            )
        sinusoidal = self.kind in _WITH_POSITIONS and self.positions == "sinusoidal"
        if self.d_model % 2 and sinusoidal:
            raise ValueError("d_model must be even: sinusoidal positions come in sine-cosine pairs")
        if self.kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd: as many neighbours on either side")
        return self

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a field."""
        return cls.model_fields[name].default

    @property
    def key_width(self) -> int:
        """Width of one head's queries and keys."""
        return self.d_k if self.d_k is not None else self.d_model // self.num_heads

    @property
    def value_width(self) -> int:
        """Width of one head's values."""
        return self.d_v if self.d_v is not None else self.d_model // self.num_heads


def why_padded(config: ModelConfig) -> str | None:
    """Why such a model computes on padded batches on any device; None: it need not."""
    if config.kind != "transformer":
        return f"model.kind {config.kind} computes on padded batches"
    if config.attention not in ("scaled_dot", "dot"):
        return f"model.attention {config.attention} is no plain dot product"
    if config.attention_dropout > 0 or config.activation_dropout > 0:
        return "model.attention_dropout and model.activation_dropout are not drawn beforehand"
    if config.key_width != config.value_width:
        return "model.d_k and model.d_v differ"
    return None
