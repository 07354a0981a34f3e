"""From a configuration to a model, of whatever kind."""

from __future__ import annotations

from model.config import ModelConfig
from model.convolutional import ConvolutionalModel
from model.encoder_decoder import EncoderDecoder
from model.presets import Kind
from model.recurrent import RecurrentModel
from model.transformer import Transformer

_KINDS: dict[Kind, type[EncoderDecoder]] = {
    "transformer": Transformer,
    "rnn": RecurrentModel,
    "lstm": RecurrentModel,
    "gru": RecurrentModel,
    "convolutional": ConvolutionalModel,
}


def build(config: ModelConfig, vocab_size: int) -> EncoderDecoder:
    """A freshly initialised model; draws from PyTorch's generator."""
    return _KINDS[config.kind](config, vocab_size)
