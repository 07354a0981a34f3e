"""The named shapes of every kind of model, the rows of the paper's Table 3 among them.

Source: Vaswani et al. 2017 (arXiv 1706.03762), Table 3.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["transformer", "rnn", "lstm", "gru", "convolutional"]

_BASE: dict[str, Any] = {
    "d_model": 512,
    "d_ff": 2048,
    "num_heads": 8,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "dropout": 0.1,
    "norm": "post",
}

# What each row of Table 3 changes in "base". (Its rows of label smoothing change no model.)
_TABLE_3: dict[str, dict[str, Any]] = {
    "A-1-head": {"num_heads": 1},
    "A-4-heads": {"num_heads": 4},
    "A-16-heads": {"num_heads": 16},
    "A-32-heads": {"num_heads": 32},
    "B-d_k-16": {"d_k": 16},
    "B-d_k-32": {"d_k": 32},
    "C-2-layers": {"encoder_layers": 2, "decoder_layers": 2},
    "C-4-layers": {"encoder_layers": 4, "decoder_layers": 4},
    "C-8-layers": {"encoder_layers": 8, "decoder_layers": 8},
    "C-d_model-256": {"d_model": 256},  # and so d_k = d_v = 32
    "C-d_model-1024": {"d_model": 1024},  # and so d_k = d_v = 128
    "C-d_ff-1024": {"d_ff": 1024},
    "C-d_ff-4096": {"d_ff": 4096},
    "D-dropout-0": {"dropout": 0.0},
    "D-dropout-0.2": {"dropout": 0.2},
    "E-learned": {"positions": "learned"},
}

# Of the recurrent kinds, whose parameters a layer differ, and so how many layers are of about the
# size of the Transformer's "tiny".
_RECURRENT_TINY: dict[str, Any] = {"d_model": 128, "attention": "additive"}
_RECURRENT_BASE: dict[str, Any] = {
    "d_model": 512,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "attention": "additive",
}

PRESETS: dict[Kind, dict[str, dict[str, Any]]] = {
    "transformer": {
        # A model for a laptop and for tests: it learns Multi30k in minutes on two cores.
        "tiny": {
            "d_model": 128,
            "d_ff": 256,
            "num_heads": 4,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "norm": "pre",
        },
        "base": _BASE,
        "big": {**_BASE, "d_model": 1024, "d_ff": 4096, "num_heads": 16, "dropout": 0.3},
        **{row: {**_BASE, **changed} for row, changed in _TABLE_3.items()},
    },
    "rnn": {
        "tiny": {**_RECURRENT_TINY, "d_model": 160, "encoder_layers": 4, "decoder_layers": 4},
        "base": _RECURRENT_BASE,
    },
    "lstm": {
        "tiny": {**_RECURRENT_TINY, "encoder_layers": 3, "decoder_layers": 2},
        "base": _RECURRENT_BASE,
    },
    "gru": {
        "tiny": {**_RECURRENT_TINY, "encoder_layers": 4, "decoder_layers": 2},
        "base": _RECURRENT_BASE,
    },
    "convolutional": {
        # Of about the size of the Transformer's "tiny".
        "tiny": {
            "d_model": 128,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "kernel_size": 3,
            "positions": "learned",
        },
        # Source: Gehring et al. 2017 (arXiv 1705.03122), section 5.1, in the Transformer's width.
        "base": {
            "d_model": 512,
            "encoder_layers": 8,
            "decoder_layers": 8,
            "kernel_size": 3,
            "positions": "learned",
        },
    },
}
