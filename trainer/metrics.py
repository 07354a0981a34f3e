"""Prometheus metrics of a run, all declared here; ``docs/metrics.md`` describes them."""

from __future__ import annotations

import logging
from typing import get_args
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from trainer.guard import Reason

log = logging.getLogger(__name__)

_STEP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """A run's metrics in a registry of their own, served over HTTP by one rank a node.

    Args:
        run: the run's name, the only label.
        host, port: where to serve; port 0 serves nothing.
    """

    def __init__(self, run: str, *, host: str, port: int) -> None:
        self.registry = CollectorRegistry()
        self._run = run
        self.steps = self._counter("steps", "Optimizer updates made.")
        self.target_tokens = self._counter("target_tokens", "Target tokens trained on.")
        self.source_tokens = self._counter("source_tokens", "Source tokens trained on.")
        self.loss = self._gauge("loss_nats", "Training loss a target token, label-smoothed.")
        self.nll = self._gauge("nll_nats", "Training negative log-likelihood a target token.")
        self.valid_nll = self._gauge("valid_nll_nats", "Validation negative log-likelihood.")
        self.valid_bleu = self._gauge(
            "valid_bleu", "BLEU of the newest checkpoint scored on the validation set."
        )
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last update.")
        self.grad_norm = self._gauge("grad_norm", "Gradient norm before clipping.")
        self.tokens_per_second = self._gauge(
            "tokens_per_second", "Source and target tokens a second since the last log."
        )
        self.epoch = self._gauge("epoch", "Passes over the corpus begun before this one.")
        self.world_size = self._gauge("world_size", "Workers that train.")
        self.last_step_time = self._gauge(
            "last_step_timestamp_seconds", "Unix time of the last update."
        )
        self.last_checkpoint_time = self._gauge(
            "last_checkpoint_timestamp_seconds", "Unix time of the last committed checkpoint."
        )
        self.step_seconds = self._histogram("step_seconds", "Wall time of a step.")
        self.data_wait_seconds = self._histogram(
            "data_wait_seconds", "Part of a step spent waiting for the stream."
        )
        self.checkpoint_seconds = self._histogram(
            "checkpoint_seconds", "From the copy of the state to the commit."
        )
        self.checkpoint_stall_seconds = self._counter(
            "checkpoint_stall_seconds", "Time that training stood still for checkpoints."
        )
        self.checkpoint_failures = self._counter(
            "checkpoint_failures", "Checkpoints that could not be written."
        )
        self.rewinds = self._counter("rewinds", "Returns to the weights of an earlier checkpoint.")
        skipped = Counter(
            "babelray_skipped_steps",
            "Steps not trained on, because their numbers went wrong.",
            ["run", "reason"],
            registry=self.registry,
        )
        self.skipped_steps = {reason: skipped.labels(run, reason) for reason in get_args(Reason)}
        self._server: WSGIServer | None = None
        if port:
            self._serve(host, port)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"babelray_{name}", text, ["run"], registry=self.registry)
        return counter.labels(self._run)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"babelray_{name}", text, ["run"], registry=self.registry).labels(self._run)

    def _histogram(self, name: str, text: str) -> Histogram:
        histogram = Histogram(
            f"babelray_{name}", text, ["run"], registry=self.registry, buckets=_STEP_BUCKETS_S
        )
        return histogram.labels(self._run)

    def _serve(self, host: str, port: int) -> None:
        try:
            self._server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            # The launcher checked the port; should it be taken since, training matters more.
            log.warning("metrics are not served on %s:%d: %s", host, port, error)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
