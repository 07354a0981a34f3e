"""What a model is: a torch-free schema and the paper's named presets.

Source: Vaswani et al. 2017 (arXiv 1706.03762), sections 3 and 6.2, Table 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS: dict[str, dict[str, Any]] = {
    # A model for a laptop and for tests: it learns Multi30k in minutes on two cores.
    "tiny": {
        "d_model": 128,
        "d_ff": 256,
        "num_heads": 4,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "norm": "pre",
    },
    # Table 3, row "base".
    "base": {
        "d_model": 512,
        "d_ff": 2048,
        "num_heads": 8,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "dropout": 0.1,
        "norm": "post",
    },
    # Table 3, row "big".
    "big": {
        "d_model": 1024,
        "d_ff": 4096,
        "num_heads": 16,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "dropout": 0.3,
        "norm": "post",
    },
}


class ModelConfig(BaseModel):
    """Shape of an encoder-decoder Transformer.

    ``preset`` fills what is not given explicitly; the resolved object carries every value, so a
    later change of a preset never changes an old run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["transformer"] = "transformer"
    preset: Literal["tiny", "base", "big"] | None = None
    d_model: int = Field(512, ge=8, le=16384, description="width of every layer")
    d_ff: int = Field(2048, ge=8, le=65536, description="width inside the feed-forward layers")
    num_heads: int = Field(8, ge=1, le=256)
    encoder_layers: int = Field(6, ge=1, le=100)
    decoder_layers: int = Field(6, ge=1, le=100)
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
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return {**PRESETS[values["preset"]], **values}
        return values

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: "
                "choose a number of heads that divides the width"
            )
        if self.d_model % 2:
            raise ValueError("d_model must be even: sinusoidal positions come in sine-cosine pairs")
        return self
