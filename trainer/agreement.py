"""Whether an exported model translates as the run's own does: sentence by sentence.

CTranslate2's search is ours under these settings: a beam; scores that are the log-probability over
a power of the length, the end sign counted on both sides; any piece allowed (a piece that is
forbidden is left out of CTranslate2's softmax, but not of ours); a bound on the length that is not
reached (there our search ends hypotheses with the end sign, CTranslate2 without). What is then left
are rounding errors, which can turn the order of two hypotheses whose scores are as good as equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_shards.config import BOS_ID, EOS_ID
from trainer import export_ctranslate2
from trainer.config import EvaluationConfig
from trainer.run import LoadedModel
from trainer.translate import Translator

# Scores are mean log-probabilities a piece, in nats.
TIE = 1e-4

# Only a model that has learnt little goes on for so many pieces more than its source has.
_EXTRA_LENGTH = 200


@dataclass(frozen=True)
class Difference:
    """A line that the two translate differently, with both scores by the run's own model."""

    line: int  # counted from 1
    source: str
    ours: str
    theirs: str
    our_score: float
    their_score: float

    @property
    def is_tie(self) -> bool:
        """Whether the two are as good as each other."""
        return abs(self.our_score - self.their_score) <= TIE


@dataclass(frozen=True)
class Agreement:
    """How many lines were translated, and those that differ."""

    num_lines: int
    differences: list[Difference]

    @property
    def num_same(self) -> int:
        """Lines translated alike, piece for piece."""
        return self.num_lines - len(self.differences)

    @property
    def faults(self) -> list[Difference]:
        """Differences that are no ties."""
        return [difference for difference in self.differences if not difference.is_tie]


def comparable(evaluation: EvaluationConfig) -> EvaluationConfig:
    """The settings nearest to ``evaluation`` under which both search alike."""
    changes = {
        "search": "beam",
        "length_rule": "average",
        "length_penalty": 1.0,
        "coverage_penalty": 0.0,
        "max_extra_length": max(evaluation.max_extra_length, _EXTRA_LENGTH),
        "unknown": "keep",
        "precision": "fp32",
    }
    return evaluation.model_copy(update=changes)


def compare(
    loaded: LoadedModel, folder: Path, lines: Sequence[str], evaluation: EvaluationConfig
) -> Agreement:
    """Translate the lines with both and compare the best hypotheses.

    Args:
        loaded: the model that was exported.
        folder: its export for CTranslate2.
        lines: source sentences; empty ones are left out.
        evaluation: the beam and the tokens decoded together are taken from it.

    Raises:
        UserError: CTranslate2 is not installed.
    """
    settings = comparable(evaluation)
    translator = Translator([loaded], settings)
    ours = [found[0].ids for found in translator.translate(lines)]
    sources = [translator.encode(line) for line in lines]
    theirs = _their_ids(loaded, folder, sources, settings)
    used = [index for index, ids in enumerate(sources) if ids]
    differing = [index for index in used if ours[index] != theirs[index]]
    differences = []
    for index in differing:
        pair = (ours[index], theirs[index])
        our_text, their_text = loaded.vocabulary.decode(pair)
        scores = [score(loaded, sources[index], ids, settings.length_penalty) for ids in pair]
        differences.append(Difference(index + 1, lines[index], our_text, their_text, *scores))
    return Agreement(len(used), differences)


def score(loaded: LoadedModel, source: list[int], target: list[int], exponent: float) -> float:
    """The mean log-probability of ``target`` (over a power of its length) by one pass of ours.

    Args:
        source: ids with EOS.
        target: ids without BOS and EOS.
    """
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        hidden_BTD = loaded.model(
            torch.tensor([source], device=device), torch.tensor([[BOS_ID, *target]], device=device)
        )
        log_probs_TV = loaded.model.project(hidden_BTD)[0].float().log_softmax(-1)
    references_T1 = torch.tensor([*target, EOS_ID], device=device)[:, None]
    length: float = (len(target) + 1) ** exponent
    return float(log_probs_TV.gather(1, references_T1).sum()) / length


def _their_ids(
    loaded: LoadedModel, folder: Path, sources: Sequence[list[int]], settings: EvaluationConfig
) -> list[list[int]]:
    ctranslate2 = export_ctranslate2.require()
    names = export_ctranslate2.tokens(loaded.vocabulary)
    ids_of = {name: number for number, name in enumerate(names)}
    translator = ctranslate2.Translator(
        str(folder), device="cpu", inter_threads=1, intra_threads=torch.get_num_threads()
    )
    longest = max((len(ids) for ids in sources), default=0) + settings.max_extra_length
    model = loaded.config.model
    if model.positions == "learned":
        longest = min(longest, model.max_positions)
    results = translator.translate_batch(
        [[names[piece] for piece in ids[:-1]] for ids in sources],
        max_batch_size=settings.batch_tokens,
        batch_type="tokens",
        beam_size=settings.beam,
        length_penalty=settings.length_penalty,
        max_input_length=0,
        max_decoding_length=longest,
        min_decoding_length=0,
        return_end_token=True,
    )
    found = [[ids_of[token] for token in result.hypotheses[0]] for result in results]
    return [ids[:-1] if ids[-1:] == [EOS_ID] else ids for ids in found]
