"""The page of an exported model: what it is, and five lines that use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.description import sentence
from trainer.config import RunConfig
from trainer.export_ctranslate2 import search_options


def readme(card: Mapping[str, Any], config: RunConfig) -> str:
    """Markdown; the lines of Python run in the export's folder and ask for a sentence.

    Args:
        card: what ``export.json`` holds.
        config: the run's settings.
    """
    program, install = (
        (_ctranslate2(config), "`pip install ctranslate2 sentencepiece`")
        if card["format"] == "ctranslate2"
        else (_SAFETENSORS, "`pip install .` in babelray's checkout")
    )
    parts = [
        f"# {card['run']}: {card['source_language']} to {card['target_language']}",
        f"In this folder, after {install}:",
        f"```python\n{program}\n```",
        "Sentences are expected as written, not tokenised; accents composed (Unicode NFC).",
        _table(card, config),
    ]
    if card["scores"]:
        parts += ["## Scores", _scores(card)]
    return "\n\n".join(parts) + "\n"


_SAFETENSORS = """\
from trainer.export import load_exported
from trainer.translate import Translator
loaded = load_exported(".")
translator = Translator([loaded], loaded.config.evaluation)
print(translator.translate([input("Sentence: ")])[0][0].text)"""


def _ctranslate2(config: RunConfig) -> str:
    options = ", ".join(f"{name}={value}" for name, value in search_options(config).items())
    return f"""\
import ctranslate2, sentencepiece
pieces = sentencepiece.SentencePieceProcessor(model_file="vocabulary.model")
source = pieces.encode(input("Sentence: "), out_type=str)
found = ctranslate2.Translator(".").translate_batch([source], {options})
print(pieces.decode(found[0].hypotheses[0]))"""


def _table(card: Mapping[str, Any], config: RunConfig) -> str:
    steps = card["averaged_steps"]
    of = f"mean of steps {', '.join(map(str, steps))}" if len(steps) > 1 else f"step {card['step']}"
    rows = {
        "model": sentence(config.model),
        "parameters": f"{card['num_parameters']:,}, {card['quantization']} in this folder",
        "checkpoint": f"{card['checkpoint']} ({of})",
        "trained on": f"{card['corpus']}, {card['num_pairs']:,} pairs",
        "the corpus' licence": card["licence"],
        "vocabulary": f"{card['vocabulary_size']:,} SentencePiece pieces, both languages",
    }
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _scores(card: Mapping[str, Any]) -> str:
    lines = [
        f"- {score['test_set']}: BLEU {score['bleu']:.2f} (`{score['signature']}`), "
        f"chrF {score['chrf']:.2f} (`{score['chrf_signature']}`)"
        for score in card["scores"]
    ]
    return "\n".join(["Of the float32 weights, decoded by babelray.", "", *lines])
