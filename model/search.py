"""Beam search over a batch, with caches; beam 1 is greedy search.

Shapes: B sentences still searched, J beam, N = B * J hypotheses, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.loss import PAD_ID
from model.transformer import Transformer

BOS_ID, EOS_ID = 1, 2


@dataclass(frozen=True)
class Hypothesis:
    """A translation: ids without BOS and EOS, its score and the log-probability behind it."""

    ids: list[int]
    score: float
    log_prob: float


def _penalty(length: int, exponent: float) -> float:
    """What a log-probability is divided by; ``length`` counts EOS.

    Source: Wu et al. 2016 (arXiv 1609.08144), equation 14, as Vaswani et al. 2017 use it.
    """
    return ((5 + length) / 6) ** exponent  # type: ignore[no-any-return]


def beam_search(
    model: Transformer,
    source_BS: Tensor,
    *,
    beam: int,
    length_penalty: float,
    max_extra_length: int,
    num_best: int = 1,
) -> list[list[Hypothesis]]:
    """Search the most probable translations of a batch.

    Of every sentence the ``beam`` most probable unfinished hypotheses are kept. One that ends
    among the ``beam`` best candidates of its step is finished. A sentence is done when ``beam``
    hypotheses are finished, or earlier when ``num_best`` are that no unfinished one could beat
    any more (its log-probability only falls; it is counted at the longest length allowed). Done
    sentences leave the batch. What is found for a sentence does not depend on the others.

    Args:
        source_BS: source ids, padded on the right.
        beam: unfinished hypotheses a sentence, at least 1.
        length_penalty: exponent of Wu et al.'s penalty; 0 compares plain log-probabilities.
        max_extra_length: a translation has at most this many pieces more than its source; there
            it is made to end.
        num_best: translations a sentence, at most ``beam``.

    Returns:
        For every sentence its best hypotheses, best first; never PAD or BOS among the ids.

    Raises:
        ValueError: ``num_best`` is not within 1 and ``beam``, or a source is longer than learned
            positions reach.
    """
    if not 1 <= num_best <= beam:
        raise ValueError(f"num_best {num_best} must lie between 1 and beam ({beam})")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            search = _Search(model, source_BS, beam, length_penalty, max_extra_length, num_best)
            while search.advance():
                pass
    finally:
        model.train(was_training)
    return search.results()


def top(values_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values_NV.topk(count, dim=1)``, sooner on a CPU.

    The greatest values lie in the columns' groups of the greatest maxima, and maxima are cheap:
    256 rows of 8,000 take 2.3 instead of 3.7 ms, of 37,000 5 instead of 18 (one thread).
    """
    num_rows, num_columns = values_NV.shape
    group_size = 16
    num_groups = num_columns // group_size
    if values_NV.device.type != "cpu" or num_groups < 4 * count:
        return values_NV.topk(count, dim=1)
    # Group g is the columns g, g + num_groups, g + 2 num_groups ...; the last few are in none.
    grouped = num_groups * group_size
    maxima_NG = values_NV[:, :grouped].view(num_rows, group_size, num_groups).amax(1)
    groups_NC = maxima_NG.topk(count, dim=1).indices
    columns_NM = (groups_NC[:, :, None] + torch.arange(0, grouped, num_groups)).flatten(1)
    rest = torch.arange(grouped, num_columns).expand(num_rows, -1)
    columns_NM = torch.cat([columns_NM, rest], dim=1)
    values_NC, places_NC = values_NV.gather(1, columns_NM).topk(count, dim=1)
    return values_NC, columns_NM.gather(1, places_NC)


class _Search:
    """The beams of a batch."""

    def __init__(
        self,
        model: Transformer,
        source_BS: Tensor,
        beam: int,
        exponent: float,
        max_extra_length: int,
        num_best: int,
    ) -> None:
        num_sentences = source_BS.size(0)
        self.model, self.beam, self.exponent, self.num_best = model, beam, exponent, num_best
        device = source_BS.device
        # Both lengths count EOS.
        self.limits_B = (source_BS != PAD_ID).sum(1).clamp_(min=1) + max_extra_length
        if model.config.positions == "learned":
            self.limits_B.clamp_(max=model.config.max_positions)
        self.sentences_B = torch.arange(num_sentences, device=device)
        self.finished: list[list[Hypothesis]] = [[] for _ in range(num_sentences)]
        self.ids_NT = torch.full((num_sentences * beam, 1), BOS_ID, device=device)
        # All beams begin alike: only the first counts, or they would stay alike.
        self.log_probs_BJ = torch.full((num_sentences, beam), -math.inf, device=device)
        self.log_probs_BJ[:, 0] = 0.0
        self.state = model.start(source_BS, beam)

    def advance(self) -> bool:
        """Lengthen every hypothesis by one piece; false when no sentence is left."""
        num_sentences, beam = self.log_probs_BJ.shape
        if num_sentences == 0:
            return False
        length = self.ids_NT.size(1)
        log_probs_BC, rows_BC, ids_BC = self._candidates(length)
        possible_BC = log_probs_BC > -math.inf
        ends_BC = (ids_BC == EOS_ID) & possible_BC
        # Twice the beam were taken, so that as many go on even if all of the best end here.
        self._finish(ends_BC[:, :beam], log_probs_BC, rows_BC, length)
        order_BJ = ends_BC.to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
        log_probs_BJ = log_probs_BC.masked_fill(ends_BC, -math.inf).gather(1, order_BJ)
        rows_BJ, ids_BJ = rows_BC.gather(1, order_BJ), ids_BC.gather(1, order_BJ)

        going_B = self._going(log_probs_BJ[:, 0], length)
        kept_B = None
        if not bool(going_B.all()):
            kept_B = going_B.nonzero()[:, 0]
            log_probs_BJ, rows_BJ, ids_BJ = log_probs_BJ[kept_B], rows_BJ[kept_B], ids_BJ[kept_B]
            self.sentences_B, self.limits_B = self.sentences_B[kept_B], self.limits_B[kept_B]
        rows_N = rows_BJ.flatten()
        self.log_probs_BJ = log_probs_BJ
        self.ids_NT = torch.cat([self.ids_NT[rows_N], ids_BJ.view(-1, 1)], dim=1)
        in_place = torch.arange(rows_N.numel(), device=rows_N.device)
        if kept_B is not None or not torch.equal(rows_N, in_place):
            self.state.select(rows_N, kept_B)
        return True

    def _candidates(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best lengthened hypotheses, best first: log-probability, row, new id; each [B, C]."""
        num_sentences, beam = self.log_probs_BJ.shape
        logits_NV = self.model.step(self.ids_NT[:, -1], self.state).float()
        normaliser_N1 = logits_NV.logsumexp(1, keepdim=True)
        logits_NV[:, [PAD_ID, BOS_ID]] = -math.inf
        at_limit_N = (self.limits_B <= length).repeat_interleave(beam)
        if bool(at_limit_N.any()):
            end_N = logits_NV[:, EOS_ID].clone()
            logits_NV[at_limit_N] = -math.inf
            logits_NV[:, EOS_ID] = end_N
        # The best of a sentence are among the best of its rows.
        num_candidates = min(2 * beam, logits_NV.size(1))
        best_NC, ids_NC = top(logits_NV, num_candidates)
        total_NC = best_NC - normaliser_N1 + self.log_probs_BJ.view(-1, 1)
        num_candidates = min(2 * beam, beam * num_candidates)
        log_probs_BC, index_BC = total_NC.view(num_sentences, -1).topk(num_candidates, dim=1)
        ids_BC = ids_NC.view(num_sentences, -1).gather(1, index_BC)
        first_B1 = torch.arange(num_sentences, device=ids_BC.device)[:, None] * beam
        return log_probs_BC, first_B1 + index_BC // ids_NC.size(1), ids_BC

    def _finish(self, ends_BJ: Tensor, log_probs_BC: Tensor, rows_BC: Tensor, length: int) -> None:
        places = ends_BJ.nonzero()
        if places.numel() == 0:
            return
        sentence_E, column_E = places.unbind(1)
        penalty = _penalty(length, self.exponent)
        for sentence, log_prob, ids in zip(
            self.sentences_B[sentence_E].tolist(),
            log_probs_BC[sentence_E, column_E].tolist(),
            self.ids_NT[rows_BC[sentence_E, column_E], 1:].tolist(),
            strict=True,
        ):
            self.finished[sentence].append(Hypothesis(ids, log_prob / penalty, log_prob))

    def _going(self, best_B: Tensor, length: int) -> Tensor:
        """Which sentences still have something to find."""
        going = []
        for sentence, limit, log_prob in zip(
            self.sentences_B.tolist(), self.limits_B.tolist(), best_B.tolist(), strict=True
        ):
            finished = self.finished[sentence]
            attainable = log_prob / _penalty(limit, self.exponent)
            done = len(finished) >= self.beam or length >= limit or log_prob == -math.inf
            if not done and len(finished) >= self.num_best:
                scores = sorted((hypothesis.score for hypothesis in finished), reverse=True)
                done = scores[self.num_best - 1] >= attainable
            going.append(not done)
        return torch.tensor(going, dtype=torch.bool, device=best_B.device)

    def results(self) -> list[list[Hypothesis]]:
        """The best of every sentence, best first; an empty one if all its scores were NaN."""
        nothing = Hypothesis([], -math.inf, -math.inf)
        return [
            sorted(hypotheses or [nothing], key=lambda hypothesis: -hypothesis.score)[
                : self.num_best
            ]
            for hypotheses in self.finished
        ]
