"""A configured model in words: a line for lists, a sentence for a paper's method."""

from __future__ import annotations

from model.config import ModelConfig

_NAMES = {
    "rnn": "a recurrent network with attention (Elman units)",
    "lstm": "a recurrent network with attention (LSTM; Bahdanau et al., 2015)",
    "gru": "a recurrent network with attention (GRU; Bahdanau et al., 2015)",
    "convolutional": "a convolutional sequence-to-sequence model (Gehring et al., 2017)",
    "transformer": "a Transformer (Vaswani et al., 2017)",
}
_TRANSFORMER = (
    "A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, Ł. Kaiser, "
    "I. Polosukhin. Attention Is All You Need. NeurIPS 2017."
)
_BAHDANAU = (
    "D. Bahdanau, K. Cho, Y. Bengio. Neural Machine Translation by Jointly Learning to Align and "
    "Translate. ICLR 2015."
)
_LUONG = (
    "M.-T. Luong, H. Pham, C. D. Manning. Effective Approaches to Attention-based Neural Machine "
    "Translation. EMNLP 2015."
)
_GEHRING = (
    "J. Gehring, M. Auli, D. Grangier, D. Yarats, Y. N. Dauphin. Convolutional Sequence to "
    "Sequence Learning. ICML 2017."
)
_SHORT = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU", "convolutional": "convolutional"}
_SCORES = {
    "scaled_dot": "scaled dot-product attention (Vaswani et al., 2017)",
    "dot": "unscaled dot-product attention",
    "general": "general attention (Luong et al., 2015)",
    "additive": "additive attention (Bahdanau et al., 2015)",
}


def line(model: ModelConfig) -> str:
    """``4+4 layers, width 128, 4 heads, pre-norm``, and what is unusual."""
    parts = [
        *([_SHORT[model.kind]] if model.kind in _SHORT else []),
        f"{model.encoder_layers}+{model.decoder_layers} layers",
        f"width {model.d_model}",
    ]
    if model.kind == "transformer":
        parts += [f"{model.num_heads} heads", f"{model.norm}-norm"]
        parts += [f"d_k {model.d_k}"] if model.d_k is not None else []
        parts += [f"d_v {model.d_v}"] if model.d_v is not None else []
    elif model.kind == "convolutional":
        parts.append(f"kernel {model.kernel_size}")
    if _is_telling(model):
        parts.append(f"{model.attention} attention")
    if model.local_radius is not None:
        parts.append(f"self-attention within {model.local_radius}")
    return ", ".join(parts)


def sentence(model: ModelConfig) -> str:
    """What comes behind "We train", without its end."""
    parts = [
        f"{_NAMES[model.kind]} with {model.encoder_layers} encoder and {model.decoder_layers} "
        f"decoder layers, width {model.d_model}"
    ]
    if model.kind == "transformer":
        parts.append(f"{model.num_heads} attention heads")
        parts += [f"keys of width {model.d_k} a head"] if model.d_k is not None else []
        parts += [f"values of width {model.d_v} a head"] if model.d_v is not None else []
        parts.append(f"feed-forward layers of width {model.d_ff}")
        place = "before" if model.norm == "pre" else "after"
        parts.append(f"layer normalisation {place} each sub-layer")
    elif model.kind == "convolutional":
        parts.append(f"convolutions over {model.kernel_size} positions")
    if _is_telling(model):
        parts.append(_SCORES[model.attention])
    if model.local_radius is not None:
        parts.append(f"self-attention within {model.local_radius} positions")
    if model.kind in {"transformer", "convolutional"}:
        parts.append(f"{model.positions} positions")
    parts.append(
        "one matrix for both embeddings and the softmax"
        if model.tie_embeddings
        else "separate embeddings and softmax"
    )
    return ", ".join([*parts, f"and {', '.join(_dropouts(model))}"])


def references(model: ModelConfig) -> list[str]:
    """What ``sentence`` cites."""
    first = {"transformer": _TRANSFORMER, "convolutional": _GEHRING}.get(model.kind, _BAHDANAU)
    second = {"scaled_dot": _TRANSFORMER, "general": _LUONG, "additive": _BAHDANAU}.get(
        model.attention, first
    )
    return list(dict.fromkeys([first, second]))


def _is_telling(model: ModelConfig) -> bool:
    """Whether the score has to be named: of the Transformer the scaled dot product goes unsaid."""
    return model.kind != "transformer" or model.attention != "scaled_dot"


def _dropouts(model: ModelConfig) -> list[str]:
    return [f"dropout of {model.dropout:g}"] + [
        f"{name} dropout of {value:g}"
        for name, value in (
            ("attention", model.attention_dropout),
            ("activation", model.activation_dropout),
        )
        if value
    ]
