from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from data_shards.errors import UserError
from tests.runs import pairs, write_lines
from trainer.evaluate import evaluate
from trainer.events import EventLog
from trainer.exhibits_cost import Rate
from trainer.figures import Series, curves
from trainer.formats import format_bytes, format_duration, format_number
from trainer.report import write_report
from trainer.report_comparison import read_runs, write_comparison
from trainer.run import events_path

_VOID = {"wbr", "meta", "link", "br", "col", "img", "hr", "input"}
# Attributes by which a page reaches for something else.
_REFERRING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}


class Page(HTMLParser):
    """Parses a page strictly: every element closed in turn, every id once."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.references = [], [], [], []
        self.attributes = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def _note(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in _REFERRING]


@pytest.fixture(scope="module")
def trained(trained_run, tmp_path_factory):
    run_dir = shutil.copytree(trained_run, tmp_path_factory.mktemp("report") / "demo")
    _log(run_dir)
    evaluate(run_dir, checkpoint="60", beam=1)
    evaluate(run_dir, checkpoint="last", beam=2)
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs" / "demo")


def _log(run_dir, steps=range(10, 181, 10)):
    log = EventLog(events_path(run_dir))
    log.write("started", step=0, world_size=2, parameters=12_345, torch="2.0", device="cpu")
    for step in steps:
        log.write(
            "step", step=step, epoch=0, loss=5 - step / 100, nll=4.5 - step / 100,
            mean_loss=5 - step / 100, mean_nll=4.5 - step / 100,
            learning_rate=step * 1e-5, grad_norm=1.0, target_tokens=step * 1000,
            source_tokens=step * 900, tokens_per_second=4000.0 + step, mfu=None, world_size=2,
            elapsed_s=step / 2,
        )  # fmt: skip
        if step in (60, 120, 180):
            log.write("validated", step=step, valid_nll=1.0, perplexity=2.71828, best=step == 60)
            log.write("checkpoint", step=step, bytes=1_234_567, seconds=0.5, best=step == 60)
        if step == 60:
            log.write("resumed", step=60, world_size=1, parameters=12_345, torch="2.0")
    log.write("finished", step=180, reason="max_steps", elapsed_s=90.0)
    log.close()


def _log_of_this_version(run_dir):
    """Two attempts with all that is measured, the first killed at step 60."""
    log = EventLog(events_path(run_dir))
    begun = {
        "world_size": 2, "peak_flops": 3e11, "peak_source": "measured", "sustained_flops": 2e11,
        "machine": {"cpu": "A processor", "cores": 2, "memory_bytes": 8_000_000_000, "gpu": None},
        "versions": {"python": "3.12.0", "torch": "2.13.0"}, "device": "cpu",
    }  # fmt: skip
    for event, first in (("started", 0), ("resumed", 40)):
        log.write(event, step=first, **begun)
        if first:
            log.write("recovered", step=first + 1, cause="killed", seconds=4.5, message="rank 1")
        for step in range(first + 10, 61 if first == 0 else 101, 10):
            log.write(
                "step", step=step, epoch=0, mean_nll=5 - step / 100, learning_rate=1e-4,
                grad_norm=1.0, target_tokens=step * 1000, source_tokens=step * 900,
                tokens_per_second=4000.0, mfu=0.25, padding_efficiency=0.9, skew=1.05,
                phases={"forward": 0.2, "backward": 0.3, "checkpoint": 0.0}, flops=step * 8e10,
                energy_joules=None, world_size=2, elapsed_s=step / 2, data_hash="ff",
            )  # fmt: skip
    log.close()


def _page(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_full_page_parses_and_shows_every_section(trained):
    page = _page(trained)
    assert len(page.ids) == len(set(page.ids))
    text = " ".join(page.text.split())
    result = json.loads((trained / "evaluation" / "test-last.json").read_text())
    assert f"BLEU{result['bleu']:.2f}" in text
    assert result["signature"] in text
    for expected in (
        "2.72", "finished: reached trainer.max_steps", "The sharpest head",
        "Every head", "Paper BLEU", "by words of the source", "worst sentences",
        "12,345 exactly", "resumed once; 1 to 2 workers", "chrF, worst", "chrF, median",
        "data.vocabulary_size", "Filters", "Licence", "1.23 MB each", "342k", "4,095",
    ):  # fmt: skip
        assert expected in text, expected
    headings = re.findall(r"<h3>([^<]+)", (trained / "report.html").read_text())
    assert headings[:5] == ["Loss", "BLEU", "Learning rate", "Throughput", "Gradient norm"]


def test_what_this_version_measures_is_shown(run_dir):
    events_path(run_dir).unlink()
    _log_of_this_version(run_dir)
    page = Page(write_report(run_dir, rate=Rate(2.5, "EUR")).read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    for expected in (
        "1.2·10¹³", "9.6·10¹²", "80.0 %", "3.3·10¹⁸ base, 2.3·10¹⁹ big", "EUR a device-hour",
        "not known: the log has no reading of an energy counter", "1 × a worker was killed",
        "at least 20, 10.0 s of training", "Phases of a step", "forward the forward pass",
        "60.0 %", "Model FLOPs utilisation", "Padding efficiency", "Skew between workers",
        "A processor", "8 GB", "restarted once", "babelray train --config",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(page.ids) == len(set(page.ids))
    labels = [attributes.get("aria-label", "") for _, attributes in page.attributes]
    assert any("Marks: restarted at step 40." in label for label in labels)
    assert "log does not tell the phases" not in text


def test_several_runs_in_one_page(trained, run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text())
    config["trainer"]["seed"] = 7
    (run_dir / "config.json").write_text(json.dumps(config))
    events_path(run_dir).unlink()
    _log_of_this_version(run_dir)
    begun = shutil.copytree(run_dir, tmp_path / "runs" / "<begun>")
    events_path(begun).unlink()
    shutil.rmtree(begun / "evaluation")
    logs = read_runs([trained, run_dir, begun])
    names = [log.name for log in logs]
    assert names[0].endswith("/demo")  # two are called demo
    assert names[1:] == ["runs/demo", "<begun>"]
    page = Page(write_comparison(logs, tmp_path / "out" / "all.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    text = " ".join(page.text.split())
    for expected in (
        "3 runs compared", *names, "Against training time", "Against tokens",
        "hours of training", "Operations, the paper's method–1.2·10¹³–", "trainer.seed177",
        "not started: nothing has been logged yet", "versions.pythonnone3.12.0none",
    ):  # fmt: skip
        assert expected in text, expected
    assert "data.vocabulary_size" not in text  # the same in all


def test_runs_that_cannot_be_compared(trained, tmp_path):
    with pytest.raises(UserError, match="given twice"):
        read_runs([trained, trained.parent / "." / trained.name])
    with pytest.raises(UserError, match="no such run"):
        read_runs([trained, tmp_path / "absent"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output"):
        write_comparison(read_runs([trained]), tmp_path / "file" / "page.html")


def test_the_page_refers_to_nothing_but_itself(trained):
    page = _page(trained)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    # A page's own anchors and a picture's own parts must exist.
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    raw = (trained / "report.html").read_text()
    assert not re.search(
        r"https?:|//[a-z]|@import|file:|\bfetch\(|XMLHttp|import\(", raw.split("</style>")[1]
    )
    assert "url(" not in raw.replace("url(#", "")
    for reference in re.findall(r"url\(#([^)]+)\)", raw):
        assert reference in page.ids


def test_pictures_have_text_and_tables_have_headers(trained):
    page = _page(trained)
    pictures = [attributes for tag, attributes in page.attributes if tag == "svg"]
    assert len(pictures) >= 5 + 1 + 1
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in pictures)
    cells = [attributes for tag, attributes in page.attributes if tag == "th"]
    assert cells
    assert all(cell.get("scope") in ("row", "col") for cell in cells)
    assert page.attributes[0] == ("html", {"lang": "en"})


def test_colours_are_the_pages_so_that_dark_and_print_work(trained):
    raw = write_report(trained).read_text()
    _, body = raw.split("</style>")
    assert set(re.findall(r"#[0-9a-f]{6}\b", body)) == set()
    assert "var(--series-1)" in body
    assert "prefers-color-scheme: dark" in raw
    assert "@media print" in raw


def test_sentences_are_escaped(run_dir, tmp_path):
    nasty = '<script>alert("1")</script> & <b>'
    lines = [source for source, _ in pairs(3, seed=4)]
    source = write_lines(tmp_path / "s.en", [nasty, *lines])
    reference = write_lines(tmp_path / "r.de", [nasty, *lines])
    shutil.rmtree(run_dir / "evaluation")
    evaluate(run_dir, checkpoint="last", source=source, reference=reference, beam=1)
    page = _page(run_dir)
    assert page.tags.count("script") == 3  # the page's own
    assert "b" in page.tags
    assert page.text.count(nasty) == 4  # among the samples and among the worst
    assert "<script>alert" not in (run_dir / "report.html").read_text()


def test_a_run_that_only_began(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "evaluation")
    events_path(run_dir).unlink()
    page = _page(run_dir)
    for expected in (
        "not started",
        "not evaluated yet",
        "No step has been logged",
        "no checkpoint",
    ):
        assert expected in page.text
    assert "babelray evaluate demo" in page.text


def test_a_single_logged_step(run_dir):
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "evaluation")
    events_path(run_dir).unlink()
    log = EventLog(events_path(run_dir))
    log.write("step", step=1, epoch=0, nll=9.0, learning_rate=1e-7, target_tokens=5, loss=9.1)
    log.close()
    page = _page(run_dir)
    assert "unfinished" in page.text
    assert "Learning rate" in page.text


def test_a_step_without_finite_numbers(run_dir):
    log = EventLog(events_path(run_dir))
    log.write("step", step=190, epoch=0, nll=float("nan"), grad_norm=float("inf"), loss=None)
    log.close()
    _page(run_dir)


def test_without_the_corpus_the_rest_is_there(run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["dir"] = str(tmp_path / "moved")
    (run_dir / "config.json").write_text(json.dumps(config))
    page = _page(run_dir)
    assert "no prepared corpus at" in page.text
    assert "Throughput" in page.text
    assert "tok:13a" in page.text


def test_bleu_while_training_is_a_curve_and_no_history(run_dir):
    shutil.rmtree(run_dir / "evaluation")
    assert "<h3>BLEU" not in write_report(run_dir).read_text()
    log = EventLog(events_path(run_dir))
    for step in (60, 120, 180):
        log.write("evaluated", test_set="valid", checkpoint=str(step), step=step, bleu=step / 7)
    log.write("evaluated", test_set="valid", checkpoint="average", step=180, bleu=77.7)
    log.close()
    raw = write_report(run_dir).read_text()
    [picture] = re.findall(r"<h3>BLEU.*?</svg>", raw, flags=re.DOTALL)
    assert "valid: 25.7 at last" in picture
    history = raw[raw.index('id="events"') :]
    assert "bleu 77.7" in history
    assert "bleu 25.71" not in history


def test_a_damaged_checkpoint_costs_only_the_attention_map(run_dir):
    for file in (run_dir / "checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"cut")
    page = _page(run_dir)
    assert "There is no checkpoint to look into" in page.text
    assert "chrF, worst" in page.text


def test_damaged_evaluations_are_passed_over(run_dir):
    (run_dir / "evaluation" / "test-broken.json").write_text('{"bleu": ')
    (run_dir / "evaluation" / "test-old.json").write_text('{"bleu": 1.0, "time": 1.0}')
    (run_dir / "evaluation" / "test-last.hypotheses.txt").write_text("too short\n")
    page = _page(run_dir)
    assert "test-old" not in page.text
    assert "No evaluation with its test set at hand" in page.text


def test_the_same_run_gives_the_same_pictures(trained):
    def pictures():
        return re.findall(r"<svg.*?</svg>", write_report(trained).read_text(), flags=re.DOTALL)

    assert pictures() == pictures()


def test_drawing_leaves_matplotlibs_settings_alone(trained):
    before = dict(mpl.rcParams)
    write_report(trained)
    assert dict(mpl.rcParams) == before


def test_any_name_can_stand_in_a_picture():
    lines = [Series("日本語 $x_{", [1, 2], [3.0, 4.0]), Series("a & <b>", [1, 2], [4.0, 5.0])]
    picture = curves(lines, name="x", title='"quoted" <title>', y_label="y")
    page = Page(picture)
    assert "日本語 $x_{" in page.text
    assert "a & <b>" in page.text
    assert page.attributes[0][1]["aria-label"] == '"quoted" <title>'


def test_no_such_run(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (1234, "1,234"), (12_345, "12.3k"), (1_966_080, "1.97M"),
     (213_000_000, "213M"), (4.5e9, "4.5B"), (0.00421, "0.00421"), (123.456, "123.5"),
     (3620.6, "3,621"), (999_999, "1M"), (None, "–")],
)  # fmt: skip
def test_numbers_are_rounded_as_one_would_say_them(value, text):
    assert format_number(value) == text


def test_durations_and_sizes():
    assert [format_duration(s) for s in (9.44, 59.99, 521, 11_100, 187_200, None)] == [
        "9.4 s", "1 min 0 s", "8 min 41 s", "3 h 5 min", "2 d 4 h", "–",
    ]  # fmt: skip
    assert [format_bytes(b) for b in (12, 7_900_000, 3.2e9)] == ["12 B", "7.9 MB", "3.2 GB"]
