"""The metrics endpoint as a scraper sees it."""

from __future__ import annotations

import socket
import threading
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trainer.metrics import Metrics


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_scrape_returns_what_was_counted() -> None:
    port = _free_port()
    metrics = Metrics("demo", host="127.0.0.1", port=port)
    try:
        metrics.target_tokens.inc(1234)
        metrics.loss.set(2.5)
        metrics.step_seconds.observe(0.2)
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            families = {
                family.name: family
                for family in text_string_to_metric_families(response.read().decode())
            }
    finally:
        metrics.close()
    assert all(name.startswith("babelray_") for name in families)
    [sample] = [
        sample
        for sample in families["babelray_target_tokens"].samples
        if sample.name.endswith("_total")
    ]
    assert (sample.labels, sample.value) == ({"run": "demo"}, 1234.0)
    assert families["babelray_loss_nats"].samples[0].value == 2.5


def test_a_port_in_use_does_not_stop_training(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        metrics = Metrics("demo", host="127.0.0.1", port=holder.getsockname()[1])
        metrics.close()
    assert "metrics are not served" in caplog.text


def test_port_zero_counts_but_serves_nothing() -> None:
    threads = threading.active_count()
    metrics = Metrics("demo", host="127.0.0.1", port=0)
    metrics.steps.inc()
    assert threading.active_count() == threads
    assert metrics.registry.get_sample_value("babelray_steps_total", {"run": "demo"}) == 1.0
    metrics.close()
