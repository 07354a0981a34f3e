from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from data_shards.errors import RunFailedError
from trainer import evaluation_metrics
from trainer.evaluate import evaluate


@pytest.fixture(scope="module")
def result(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics") / "runs" / "demo"
    return evaluate(shutil.copytree(trained_run, folder), checkpoint="last")


def samples(text):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_textfile_holds_what_the_results_hold(result):
    found = samples((result.file.parent / "metrics.prom").read_text())
    labels = (("checkpoint", "last"), ("run", "demo"), ("test_set", "test"))
    assert found["babelray_evaluation_bleu", labels] == pytest.approx(result.bleu)
    assert found["babelray_evaluation_paper_bleu", labels] == pytest.approx(result.paper_bleu)
    assert found["babelray_evaluation_ter", labels] == pytest.approx(result.ter)
    assert found["babelray_evaluation_sentences", labels] == 30
    assert found["babelray_evaluation_step", labels] == 180


def test_an_older_result_lacks_a_score_and_series_are_bounded(result, tmp_path):
    many = [replace(result, checkpoint=str(n), time=float(n), ter=None) for n in range(150)]
    found = samples(evaluation_metrics.write(tmp_path, "demo", many).read_text())
    bleu = [dict(labels)["checkpoint"] for name, labels in found if name.endswith("tion_bleu")]
    assert sorted(map(int, bleu)) == list(range(50, 150))
    assert not any(name.endswith("_ter") for name, _ in found)


def test_a_push_gateway_gets_them(result):
    received = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, body.decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        evaluation_metrics.push(f"127.0.0.1:{server.server_port}", "demo", [result])
        thread.join(timeout=10)
    ((path, body),) = received
    assert path == "/metrics/job/babelray_evaluation/run/demo"
    assert ("babelray_evaluation_step",) in {(name,) for name, _ in samples(body)}


def test_a_gateway_that_is_not_there(result):
    with pytest.raises(
        RunFailedError, match=r"results are written, but .*127\.0\.0\.1:9 .*refused"
    ):
        evaluation_metrics.push("127.0.0.1:9", "demo", [result])
