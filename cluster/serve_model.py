"""The model behind the server: requests that wait together are translated together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.serve_app import Alternative, Attention, Line
from cluster.serve_replica import listen_on_loopback
from data_shards.config import UNK_ID
from trainer.attention import attention_maps
from trainer.config import EvaluationConfig
from trainer.run import LoadedModel
from trainer.translate import Translation, Translator

# A map of n pieces has n * n numbers in each layer and head: beyond this a page cannot show them.
MAX_ATTENTION_PIECES = 80


@dataclass(frozen=True)
class Job:
    """The lines of one request, and their source ids (those of an empty line are none)."""

    lines: tuple[str, ...]
    ids: tuple[list[int], ...]
    num_best: int

    @property
    def longest(self) -> int:
        """Pieces of the longest line."""
        return max(map(len, self.ids), default=0)


def padded_tokens(jobs: Sequence[Job], budget: int) -> int:
    """Source tokens of the jobs as one batch, padding included.

    A job larger than the budget goes alone; it is cut into batches where it is translated.
    """
    tokens = sum(len(job.ids) for job in jobs) * max((job.longest for job in jobs), default=0)
    return min(tokens, budget) if len(jobs) == 1 else tokens


class Engine:
    """A model that answers jobs; not for two threads at once."""

    def __init__(
        self, loaded: LoadedModel, evaluation: EvaluationConfig, max_num_best: int
    ) -> None:
        self._loaded = loaded
        self._vocabulary = loaded.vocabulary
        self._best = Translator([loaded], evaluation)
        self._several = (
            Translator([loaded], evaluation, num_best=max_num_best) if max_num_best > 1 else None
        )

    def job(self, lines: Sequence[str], num_best: int) -> Job:
        """The lines as a job for ``translate``."""
        return Job(tuple(lines), tuple(map(self._best.encode, lines)), num_best)

    def translate(self, jobs: Sequence[Job]) -> list[list[list[Translation]]]:
        """For each job and line its translations, best first."""
        found: list[list[list[Translation]]] = [[] for _ in jobs]
        for translator, chosen in (
            (self._best, [i for i, job in enumerate(jobs) if not self._wants_several(job)]),
            (self._several, [i for i, job in enumerate(jobs) if self._wants_several(job)]),
        ):
            if not chosen:
                continue
            assert translator is not None
            lines = [line for index in chosen for line in jobs[index].lines]
            # As if each were alone: what is sampled does not depend on who else asks.
            keys = [key for index in chosen for key in range(len(jobs[index].lines))]
            translations = iter(translator.translate(lines, keys=keys))
            for index in chosen:
                job = jobs[index]
                found[index] = [next(translations)[: job.num_best] for _ in job.lines]
        return found

    def described(self, job: Job, translations: list[list[Translation]]) -> list[Line]:
        """A job's lines as the endpoint gives them."""
        vocabulary = self._vocabulary
        whole = vocabulary.encode(job.lines)
        return [
            Line(
                source=line,
                source_pieces=vocabulary.pieces(ids[:-1]),
                unknown_pieces=ids.count(UNK_ID),
                cut=len(all_ids) > max(0, len(ids) - 1),
                alternatives=[
                    Alternative(
                        text=found.text,
                        score=round(found.score, 4),
                        log_prob=round(found.log_prob, 4),
                        pieces=vocabulary.pieces(found.ids),
                    )
                    for found in alternatives
                ],
            )
            for line, ids, all_ids, alternatives in zip(
                job.lines, job.ids, whole, translations, strict=True
            )
        ]

    def attention(self, job: Job, translations: list[list[Translation]]) -> Attention | str:
        """The weights for the first line with text and its best translation, or why not."""
        first = next((index for index, ids in enumerate(job.ids) if ids), None)
        if first is None:
            return "there is no attention to show for an empty text"
        source_ids, target_ids = job.ids[first], translations[first][0].ids
        if max(len(source_ids), len(target_ids) + 1) > MAX_ATTENTION_PIECES:
            return (
                f"the attention is left out: line {first + 1} or its translation has more than "
                f"{MAX_ATTENTION_PIECES} pieces"
            )
        maps = attention_maps(self._loaded, source_ids, target_ids)
        return Attention(
            source=maps.source,
            inputs=maps.inputs,
            outputs=maps.outputs,
            **{kind: _rounded(maps.weights[kind]) for kind in maps.kinds},
        )

    def _wants_several(self, job: Job) -> bool:
        return self._several is not None and job.num_best > 1


class Model:
    """One replica: keeps the model busy with batches while further requests gather.

    ``serve.batch`` forms them: up to the evaluation's ``batch_tokens``, padding included.
    """

    def __init__(
        self,
        loaded: list[Any],
        evaluation: EvaluationConfig,
        max_num_best: int,
        wait_s: float,
        is_local: bool,
    ) -> None:
        import ray
        import torch
        from ray import serve

        if is_local:
            listen_on_loopback()
        [reference] = loaded  # in a list, or Serve would take it for a result to wait for
        model: LoadedModel = ray.get(reference)
        if torch.cuda.is_available():
            model = replace(model, model=model.model.to("cuda"))
        self._engine = Engine(model, evaluation, max_num_best)
        budget = evaluation.batch_tokens

        async def together(jobs: list[Job]) -> list[list[list[Translation]]]:
            # In this very thread: while the event loop stands still, requests gather. Served from
            # another, Serve would cut the waiting ones into batches of a few milliseconds each.
            return self._engine.translate(jobs)

        self._together: Any = serve.batch(
            max_batch_size=budget,
            batch_wait_timeout_s=wait_s,
            batch_size_fn=lambda jobs: padded_tokens(jobs, budget),
        )(together)
        self._engine.translate([self._engine.job(["."], 1)])  # the first request need not wait

    async def translate(
        self, lines: list[str], num_best: int, attention: bool
    ) -> tuple[list[Line], Attention | str | None]:
        """What the endpoint gives for these lines."""
        job = self._engine.job(lines, num_best)
        translations = await self._together(job)
        described = self._engine.described(job, translations)
        if not attention:
            return described, None
        return described, self._engine.attention(job, translations)


def _rounded(weights: Any) -> Any:
    """A tensor as nested lists with three decimals, the most that a map can show."""
    return [
        [[[round(weight, 3) for weight in row] for row in head] for head in layer]
        for layer in weights.tolist()
    ]
