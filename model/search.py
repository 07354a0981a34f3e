"""Search for translations of a batch, with caches: beam, greedy and sampled; one model or several.

Shapes: B sentences still searched, J hypotheses of each, N = B * J, V vocabulary, C candidates,
S source length, T target length, P prefix length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.encoder_decoder import EncoderDecoder
from model.loss import PAD_ID
from model.sampling import draw, truncated, uniforms
from model.scoring import CoverageRule, LengthRule, coverage_score, length_score

BOS_ID, EOS_ID, UNK_ID = 1, 2, 3

# Logits made and searched at a time on a CPU: few, to stay in its caches, and few bytes, for memory
# that is taken afresh each time is slow.
_CHUNK_ROWS = 256
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Hypothesis:
    """A translation: ids without BOS and EOS, its score and the log-probability behind it."""

    ids: list[int]
    score: float
    log_prob: float


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        method: ``beam``; ``greedy``, which is a beam of 1; or ``sample``, which draws ``num_best``
            translations that do not depend on each other.
        beam: unfinished hypotheses a sentence.
        num_best: translations a sentence; of a beam at most ``beam``.
        length_rule, length_penalty: see ``length_score``.
        coverage_rule, coverage_penalty: see ``coverage_score``; 0 is none. What was attended to is
            the mean over the heads of the last decoder layer.
        max_extra_length: a translation has at most this many pieces more than its source; there it
            is made to end.
        allow_unknown: whether the unknown piece may be written.
        temperature: of samples: logits are divided by it.
        top_k, top_p: of samples: see ``truncated``.
        seed: of samples.
    """

    method: Literal["beam", "greedy", "sample"] = "beam"
    beam: int = 4
    num_best: int = 1
    length_rule: LengthRule = "wu"
    length_penalty: float = 0.6
    coverage_rule: CoverageRule = "wu"
    coverage_penalty: float = 0.0
    max_extra_length: int = 50
    allow_unknown: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1


def search(
    models: Sequence[EncoderDecoder],
    source_BS: Tensor,
    options: SearchOptions,
    *,
    prefixes: Sequence[list[int]] | None = None,
    keys: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Search the translations of a batch; what is found for one does not depend on the others.

    Beam search keeps the most probable unfinished hypotheses of every sentence. One that ends among
    the ``beam`` best candidates of its step is finished. A sentence is done when ``beam`` are
    finished, or earlier when ``num_best`` are that no unfinished one could beat any more. Rules for
    length and coverage decide between finished ones, as in Wu et al. 2016. Done sentences leave the
    batch.

    Args:
        models: one, or several of one vocabulary whose probabilities are averaged.
        source_BS: source ids, padded on the right.
        prefixes: for every sentence ids that its translations begin with, whatever they cost.
        keys: for every sentence a number, not negative, that with the seed decides its samples; by
            default its row.

    Returns:
        For every sentence its translations, best first; never PAD or BOS among the ids.

    Raises:
        ValueError: ``num_best`` does not suit the method, a prefix holds PAD, BOS or EOS, or a
            source or a prefix is longer than learned positions reach.
    """
    beam = 1 if options.method == "greedy" else options.beam
    if options.num_best < 1 or (options.method != "sample" and options.num_best > beam):
        raise ValueError(f"num_best {options.num_best} must lie between 1 and beam ({beam})")
    prefixes = prefixes or [[]] * source_BS.size(0)
    with _evaluating(models), torch.inference_mode():
        if options.method == "sample":
            return _sample(models, source_BS, options, prefixes, keys)
        batch = _Batch(models, source_BS, beam, options, prefixes)
        beams = _Beams(batch, options)
        while batch.num_sentences:
            beams.advance()
        return beams.results()


def best_pieces(
    logits_NV: Tensor, offset_N1: Tensor, width: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` greatest ``logits + offset`` of every ``width`` rows, greatest first.

    On a CPU they are looked for among the groups of columns with the greatest maxima, for maxima
    are cheap: 256 rows of 6,000 in fours take 1.4 instead of 3.1 ms (one thread).

    Returns:
        Values, rows (counted within their ``width``) and columns, [N / width, count] each.
    """
    num_rows, num_columns = logits_NV.shape
    num_sentences, group_size = num_rows // width, 16
    num_groups = num_columns // group_size
    if logits_NV.device.type != "cpu" or num_groups < 4 * count:
        sums_BX = (logits_NV + offset_N1).view(num_sentences, -1)
        values_BC, places_BC = sums_BX.topk(min(count, sums_BX.size(1)), dim=1)
        return values_BC, places_BC // num_columns, places_BC % num_columns
    # Group g is the columns g, g + num_groups, g + 2 num_groups ...; the last few are in none.
    grouped = num_groups * group_size
    maxima_NG = logits_NV[:, :grouped].view(num_rows, group_size, num_groups).amax(1)
    groups_BC = (maxima_NG + offset_N1).view(num_sentences, -1).topk(count, dim=1).indices
    steps = torch.arange(0, grouped, num_groups)
    columns_BM = ((groups_BC % num_groups)[:, :, None] + steps).flatten(1)
    parents_BM = (groups_BC // num_groups).repeat_interleave(group_size, dim=1)
    rest = torch.arange(grouped, num_columns).repeat(num_sentences, width)
    columns_BM = torch.cat([columns_BM, rest], dim=1)
    rest = torch.arange(width).repeat_interleave(num_columns - grouped).repeat(num_sentences, 1)
    parents_BM = torch.cat([parents_BM, rest], dim=1)
    rows_BM = torch.arange(num_sentences)[:, None] * width + parents_BM
    sums_BM = logits_NV[rows_BM, columns_BM] + offset_N1[:, 0][rows_BM]
    values_BC, places_BC = sums_BM.topk(count, dim=1)
    return values_BC, parents_BM.gather(1, places_BC), columns_BM.gather(1, places_BC)


@contextmanager
def _evaluating(models: Sequence[EncoderDecoder]) -> Iterator[None]:
    were_training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


class _Batch:
    """The unfinished hypotheses of the sentences that are not done."""

    def __init__(
        self,
        models: Sequence[EncoderDecoder],
        source_BS: Tensor,
        width: int,
        options: SearchOptions,
        prefixes: Sequence[list[int]],
    ) -> None:
        device = source_BS.device
        self.models, self.width = models, width
        self.keep_BS = source_BS != PAD_ID
        # Both lengths count EOS.
        limits_B = self.keep_BS.sum(1).clamp_(min=1) + options.max_extra_length
        for model in models:
            if model.config.positions == "learned":
                limits_B.clamp_(max=model.config.max_positions)
        self.forced_BP = _padded(prefixes).to(device)
        self.limits_B = limits_B.maximum((self.forced_BP >= 0).sum(1) + 1)
        self.sentences_B = torch.arange(source_BS.size(0), device=device)
        self.ids_NT = torch.full((source_BS.size(0) * width, 1), BOS_ID, device=device)
        self.coverage_NS: Tensor | None = None
        if options.coverage_penalty > 0:
            self.coverage_NS = source_BS.new_zeros(
                (source_BS.size(0) * width, source_BS.size(1)), dtype=torch.float32
            )
        self._allow_unknown = options.allow_unknown
        self._states = [model.start(source_BS, width) for model in models]

    @property
    def num_sentences(self) -> int:
        return self.sentences_B.size(0)

    @property
    def length(self) -> int:
        """Pieces of a hypothesis once the next is chosen, EOS included."""
        return self.ids_NT.size(1)

    def logits(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """The next piece, some sentences at a time, so that caches hold what is looked through.

        Yields:
            Logits [n, V], -inf where a piece may not be; their normaliser [n, 1], of all pieces;
            and which n of the N rows they are.
        """
        record: list[Tensor] | None = None if self.coverage_NS is None else []
        states = [
            model.step(self.ids_NT[:, -1], state, record)
            for model, state in zip(self.models, self._states, strict=True)
        ]
        if record:
            self._cover(record)
        forced_N = self._forced()
        for rows in self._chunks():
            logits_NV = self._combined([states_ND[rows] for states_ND in states])
            normaliser_N1 = logits_NV.logsumexp(1, keepdim=True)
            self._force(logits_NV, None if forced_N is None else forced_N[rows])
            yield logits_NV, normaliser_N1, rows

    def _chunks(self) -> list[slice]:
        """Rows in chunks of whole sentences."""
        num_rows = len(self.ids_NT)
        step = num_rows
        if self.ids_NT.device.type == "cpu":
            most = min(_CHUNK_ROWS, _CHUNK_ELEMENTS // self.models[0].vocab_size)
            step = max(1, most // self.width) * self.width
        return [slice(start, start + step) for start in range(0, num_rows, step)]

    def _combined(self, states: list[Tensor]) -> Tensor:
        """Logits of the models' mean probabilities."""
        logits = [
            model.project(states_ND).float()
            for model, states_ND in zip(self.models, states, strict=True)
        ]
        if len(logits) == 1:
            return logits[0]
        return torch.stack([logits_NV.log_softmax(1) for logits_NV in logits]).logsumexp(0)

    def _cover(self, record: list[Tensor]) -> None:
        assert self.coverage_NS is not None
        for weights_BHJS in record:
            attention_NS = weights_BHJS.mean(1).flatten(0, 1)
            self.coverage_NS = self.coverage_NS + attention_NS / len(record)

    def _forced(self) -> Tensor | None:
        """The piece that each hypothesis must go on with, -1 for any; None if none must."""
        forced_B = torch.where(self.limits_B <= self.length, EOS_ID, -1)
        if self.length <= self.forced_BP.size(1):
            prefix_B = self.forced_BP[:, self.length - 1]
            forced_B = torch.where(prefix_B >= 0, prefix_B, forced_B)
        return forced_B.repeat_interleave(self.width) if bool((forced_B >= 0).any()) else None

    def _force(self, logits_NV: Tensor, forced_N: Tensor | None) -> None:
        if forced_N is not None:
            values_N1 = logits_NV.gather(1, forced_N.clamp_min(0)[:, None])
        logits_NV[:, : BOS_ID + 1] = -math.inf
        if not self._allow_unknown:
            logits_NV[:, UNK_ID] = -math.inf
        if forced_N is not None:
            rows_F = (forced_N >= 0).nonzero()[:, 0]
            logits_NV[rows_F] = -math.inf
            logits_NV[rows_F, forced_N[rows_F]] = values_N1[rows_F, 0]

    def extend(self, parents_BJ: Tensor, ids_BJ: Tensor) -> None:
        """Lengthen the hypotheses, each from its parent."""
        if self.width > 1:
            first_B1 = torch.arange(self.num_sentences, device=parents_BJ.device)[:, None]
            rows_N = (first_B1 * self.width + parents_BJ).flatten()
            self.ids_NT = self.ids_NT[rows_N]
            if self.coverage_NS is not None:
                self.coverage_NS = self.coverage_NS[rows_N]
        self.ids_NT = torch.cat([self.ids_NT, ids_BJ.view(-1, 1)], dim=1)
        for state in self._states:
            state.reorder(parents_BJ)

    def leave(self, going_B: Tensor) -> Tensor:
        """Let sentences leave; which of the former sentence is now where, [B]."""
        num_left = int(going_B.sum())
        vacant = (~going_B[:num_left]).nonzero()[:, 0]
        movers = num_left + going_B[num_left:].nonzero()[:, 0]
        order_B = torch.arange(num_left, device=going_B.device)
        order_B[vacant] = movers
        for state in self._states:
            state.keep(vacant, movers, num_left)
        self.sentences_B, self.limits_B = self.sentences_B[order_B], self.limits_B[order_B]
        self.forced_BP, self.keep_BS = self.forced_BP[order_B], self.keep_BS[order_B]
        steps = torch.arange(self.width, device=going_B.device)
        rows_N = (order_B[:, None] * self.width + steps).flatten()
        self.ids_NT = self.ids_NT[rows_N]
        if self.coverage_NS is not None:
            self.coverage_NS = self.coverage_NS[rows_N]
        return order_B

    def finished(
        self, sentence_E: Tensor, row_E: Tensor, log_prob_E: Tensor, options: SearchOptions
    ) -> Iterator[tuple[int, Hypothesis]]:
        """The hypotheses of these rows, ended here, with the numbers of their sentences."""
        added = [0.0] * row_E.numel()
        if self.coverage_NS is not None:
            added = coverage_score(
                self.coverage_NS[row_E],
                self.keep_BS[sentence_E],
                options.coverage_rule,
                options.coverage_penalty,
            ).tolist()
        for sentence, ids, log_prob, addition in zip(
            self.sentences_B[sentence_E].tolist(),
            self.ids_NT[row_E, 1:].tolist(),
            log_prob_E.tolist(),
            added,
            strict=True,
        ):
            score = length_score(log_prob, self.length, options.length_rule, options.length_penalty)
            yield sentence, Hypothesis(ids, score + addition, log_prob)


def _padded(prefixes: Sequence[list[int]]) -> Tensor:
    """Prefixes as a matrix [B, P], -1 where there is none."""
    longest = max((len(ids) for ids in prefixes), default=0)
    matrix = torch.full((len(prefixes), longest), -1)
    for row, ids in enumerate(prefixes):
        if any(piece in {PAD_ID, BOS_ID, EOS_ID} for piece in ids):
            raise ValueError(f"prefix {row} holds PAD, BOS or EOS: {ids}")
        matrix[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return matrix


class _Beams:
    """Beam search over a batch."""

    def __init__(self, batch: _Batch, options: SearchOptions) -> None:
        self.batch, self.options = batch, options
        self.finished: list[list[Hypothesis]] = [[] for _ in range(batch.num_sentences)]
        device = batch.sentences_B.device
        # All hypotheses begin alike: only the first counts, or they would stay alike.
        self.log_probs_BJ = torch.full((batch.num_sentences, batch.width), -math.inf, device=device)
        self.log_probs_BJ[:, 0] = 0.0

    def advance(self) -> None:
        """Lengthen every hypothesis by one piece."""
        batch, beam = self.batch, self.batch.width
        log_probs_BC, parents_BC, ids_BC = self._candidates()
        possible_BC = log_probs_BC > -math.inf
        ends_BC = (ids_BC == EOS_ID) & possible_BC
        # Twice the beam were taken, so that as many go on even if all of the best end here.
        self._finish(ends_BC[:, :beam], log_probs_BC, parents_BC)
        order_BJ = ends_BC.to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
        log_probs_BJ = log_probs_BC.masked_fill(ends_BC, -math.inf).gather(1, order_BJ)
        going_B = self._going(log_probs_BJ[:, 0])
        batch.extend(parents_BC.gather(1, order_BJ), ids_BC.gather(1, order_BJ))
        if not bool(going_B.all()):
            log_probs_BJ = log_probs_BJ[batch.leave(going_B)]
        self.log_probs_BJ = log_probs_BJ

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best lengthened hypotheses, best first: log-probability, parent, new id; [B, C]."""
        width = self.batch.width
        log_probs_N1 = self.log_probs_BJ.view(-1, 1)
        chunks = [
            best_pieces(logits_NV, log_probs_N1[rows] - normaliser_N1, width, 2 * width)
            for logits_NV, normaliser_N1, rows in self.batch.logits()
        ]
        log_probs_BC, parents_BC, ids_BC = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return log_probs_BC, parents_BC, ids_BC

    def _finish(self, ends_BJ: Tensor, log_probs_BC: Tensor, parents_BC: Tensor) -> None:
        sentence_E, column_E = ends_BJ.nonzero().unbind(1)
        if sentence_E.numel():
            row_E = sentence_E * self.batch.width + parents_BC[sentence_E, column_E]
            log_prob_E = log_probs_BC[sentence_E, column_E]
            for sentence, hypothesis in self.batch.finished(
                sentence_E, row_E, log_prob_E, self.options
            ):
                self.finished[sentence].append(hypothesis)

    def _going(self, best_B: Tensor) -> Tensor:
        """Which sentences still have something to find."""
        options, length, going = self.options, self.batch.length, []
        for sentence, limit, log_prob in zip(
            self.batch.sentences_B.tolist(),
            self.batch.limits_B.tolist(),
            best_B.tolist(),
            strict=True,
        ):
            finished = self.finished[sentence]
            done = len(finished) >= self.batch.width or length >= limit or log_prob == -math.inf
            if not done and len(finished) >= options.num_best:
                scores = sorted((hypothesis.score for hypothesis in finished), reverse=True)
                # Its log-probability only falls, coverage only takes away.
                attainable = length_score(
                    log_prob, limit, options.length_rule, options.length_penalty
                )
                done = scores[options.num_best - 1] >= attainable
            going.append(not done)
        return torch.tensor(going, dtype=torch.bool, device=best_B.device)

    def results(self) -> list[list[Hypothesis]]:
        """The best of every sentence, best first."""
        return [_best(hypotheses, self.options.num_best) for hypotheses in self.finished]


def _best(hypotheses: list[Hypothesis], count: int) -> list[Hypothesis]:
    """The best, best first; an empty one if all scores are NaN."""
    finite = [hypothesis for hypothesis in hypotheses if hypothesis.score > -math.inf]
    nothing = Hypothesis([], -math.inf, -math.inf)
    return sorted(finite or [nothing], key=lambda hypothesis: -hypothesis.score)[:count]


def _sample(
    models: Sequence[EncoderDecoder],
    source_BS: Tensor,
    options: SearchOptions,
    prefixes: Sequence[list[int]],
    keys: Sequence[int] | None,
) -> list[list[Hypothesis]]:
    """``num_best`` samples a sentence, each a row of its own, so that it leaves when it ends."""
    num_samples, device = options.num_best, source_BS.device
    keys = range(source_BS.size(0)) if keys is None else keys
    repeated = [ids for ids in prefixes for _ in range(num_samples)]
    batch = _Batch(models, source_BS.repeat_interleave(num_samples, dim=0), 1, options, repeated)
    longest = int(batch.limits_B.max()) if batch.num_sentences else 0
    seeds = [(key, sample) for key in keys for sample in range(num_samples)]
    uniform_BT = torch.zeros((len(seeds), longest), dtype=torch.float64)
    for row, (key, sample) in enumerate(seeds):
        uniform_BT[row] = uniforms(options.seed, key, sample, longest)
    uniform_BT = uniform_BT.to(device)
    log_probs_B = torch.zeros(batch.num_sentences, device=device)
    parents_BJ = torch.zeros((batch.num_sentences, 1), dtype=torch.int64, device=device)
    drawn: list[list[Hypothesis]] = [[] for _ in range(source_BS.size(0))]
    while batch.num_sentences:
        uniform_B = uniform_BT[batch.sentences_B, batch.length - 1]
        chunks = []
        for logits_BV, normaliser_B1, rows in batch.logits():
            allowed_BV = truncated(logits_BV / options.temperature, options.top_k, options.top_p)
            chosen_B = draw(allowed_BV, uniform_B[rows])
            gained_B1 = logits_BV.gather(1, chosen_B[:, None]) - normaliser_B1
            chunks.append((chosen_B, gained_B1[:, 0]))
        ids_B, gained_B = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        log_probs_B = log_probs_B + gained_B
        ended_B = (ids_B == EOS_ID) | (batch.limits_B <= batch.length)
        rows_E = ended_B.nonzero()[:, 0]
        for number, hypothesis in batch.finished(rows_E, rows_E, log_probs_B[rows_E], options):
            drawn[number // num_samples].append(hypothesis)
        batch.extend(parents_BJ[: batch.num_sentences], ids_B[:, None])
        if rows_E.numel():
            log_probs_B = log_probs_B[batch.leave(~ended_B)]
    return [_best(hypotheses, num_samples) for hypotheses in drawn]
