"""BLEU, chrF and TER, each with the signature without which it cannot be compared.

A BLEU without its signature says little (Post 2018): the same output of a WMT14 English-German
model is 27.52 by sacreBLEU and 29.02 by the script that the papers of those years used. So both are
computed, under different names: ``bleu`` is sacreBLEU's on detokenised text, ``paper_bleu`` is the
tokenised, compound-split one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sacremoses
from sacrebleu.metrics import BLEU, CHRF, TER
from sacremoses import MosesPunctNormalizer, MosesTokenizer

from data_shards.errors import UserError

_HYPHEN = re.compile(r"(\S)-(\S)")


@dataclass(frozen=True)
class Score:
    """One number with what it takes to compare and to repeat it.

    Attributes:
        value: BLEU and chrF 0 to 100, higher is better; TER from 0, lower is better.
        signature: how it was computed.
        detail: what the metric prints: precisions, brevity penalty, length ratio.
    """

    value: float
    signature: str
    detail: str


@dataclass(frozen=True)
class Scores:
    """All scores of one system's output."""

    bleu: Score
    chrf: Score
    ter: Score
    paper_bleu: Score


def score(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, target_language: str
) -> Scores:
    """Score detokenised hypotheses.

    Args:
        hypotheses: one a sentence.
        references: one list a translator, each parallel to the hypotheses.
        target_language: code, for the tokenisers.

    Raises:
        UserError: as ``bleu_metric``.
    """
    return Scores(
        bleu=_sacrebleu(bleu_metric(target_language), hypotheses, references),
        chrf=_sacrebleu(CHRF(), hypotheses, references),
        ter=_sacrebleu(TER(), hypotheses, references),
        paper_bleu=paper_bleu(hypotheses, references, target_language=target_language),
    )


def bleu_metric(target_language: str, **options: Any) -> BLEU:
    """sacreBLEU's BLEU with the tokeniser that it prescribes for the language.

    That is ``13a``, but for Chinese (``zh``), Japanese (``ja-mecab``) and Korean (``ko-mecab``),
    whose sentences have no spaces or few.

    Args:
        target_language: code.
        options: of ``sacrebleu.metrics.BLEU``.

    Raises:
        UserError: the tokeniser needs a package that is not installed.
    """
    try:
        return BLEU(trg_lang=target_language, **options)
    except RuntimeError:  # of sacreBLEU's tokenisers that want a dictionary
        raise UserError(
            f"BLEU of {target_language!r} needs sacreBLEU's tokeniser for it: "
            f"pip install 'sacrebleu[{target_language}]'"
        ) from None


def _sacrebleu(
    metric: BLEU | CHRF | TER, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> Score:
    found = metric.corpus_score(hypotheses, references)
    return Score(float(found.score), str(metric.get_signature()), str(found))


def paper_bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, target_language: str
) -> Score:
    """The BLEU of Vaswani et al. 2017: tokenised, compounds split at hyphens, cased, unsmoothed.

    The steps are those of tensor2tensor's ``get_ende_bleu.sh``: Moses' replacement of Unicode
    punctuation, Moses' tokeniser, ``rich-text`` as ``rich ##AT##-##AT## text``, and what
    ``multi-bleu.perl`` computes. Splitting compounds makes more and easier n-grams: the number is
    higher than sacreBLEU's and is not comparable with it.

    The script replaces punctuation in the hypotheses only, as its references had plain punctuation
    already. References as they are published have not: theirs is replaced as well.
    """
    normaliser = MosesPunctNormalizer()

    def tokens(lines: Sequence[str]) -> list[str]:
        return [
            paper_tokens(normaliser.replace_unicode_punct(line), target_language) for line in lines
        ]

    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    found = metric.corpus_score(tokens(hypotheses), [tokens(stream) for stream in references])
    signature = (
        f"nrefs:{len(references)}|case:mixed|tok:moses-{target_language}|punct:plain|"
        f"split:hyphens|smooth:none|sacremoses:{sacremoses.__version__}"
    )
    return Score(float(found.score), signature, str(found))


def paper_tokens(line: str, language: str) -> str:
    """Moses' tokens, compounds split at hyphens, with spaces between them."""
    tokens: str = _tokenizer(language).tokenize(line, return_str=True)
    return _HYPHEN.sub(r"\1 ##AT##-##AT## \2", tokens)


@lru_cache(maxsize=8)
def _tokenizer(language: str) -> MosesTokenizer:
    # An unknown language gets the English abbreviations, as with Moses' own script.
    return MosesTokenizer(language)
