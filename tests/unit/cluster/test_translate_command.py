"""``babelray translate`` and ``babelray attention`` as a user meets them."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.cli import cli
from tests.runs import make_run, pairs
from trainer.attention import word_alignment
from trainer.run import load_model
from trainer.translate import Translator

REPOSITORY = Path(__file__).resolve().parents[3]
SENTENCES = [source for source, _ in pairs(12, seed=21)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``demo``."""
    return make_run(tmp_path_factory.mktemp("use"), steps=(60, 120)).parent


@pytest.fixture(scope="module")
def translator(runs: Path) -> Translator:
    loaded = load_model(runs / "demo", "best")
    return Translator([loaded], loaded.config.evaluation, num_best=3)


def translate(runs: Path, *arguments: str, text: str | bytes = "") -> Result:
    return CliRunner().invoke(cli, ["translate", "demo", "--runs", str(runs), *arguments], text)


def process(runs: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cluster.cli", "translate", "demo", "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    return subprocess.Popen([*command, *arguments], cwd=REPOSITORY, env=environment, **options)


def test_a_line_out_for_each_line_in(runs: Path, translator: Translator) -> None:
    lines = [*SENTENCES[:5], "", "  ", SENTENCES[5]]
    text = "\ufeff" + "\r\n".join(lines)
    expected = [found[0].text for found in translator.translate(lines)]
    result = translate(runs, text=text)
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n") == [*expected, ""]
    assert expected[5:7] == ["", ""]
    assert all(expected[:5])
    assert translate(runs, text="").stdout == ""


def test_nbest_scores_and_alignment(runs: Path, translator: Translator) -> None:
    lines = [SENTENCES[0], "", SENTENCES[1]]
    found = translator.translate(lines)
    expected = [
        f"{number} ||| {translation.text} ||| {translation.score:.6g}"
        for number, translations in enumerate(found)
        for translation in translations
    ]
    text = "\n".join(lines)
    assert translate(runs, "--nbest", "3", text=text).stdout.splitlines() == expected
    scored = translate(runs, "--scores", text=text).stdout.splitlines()
    assert scored[0] == f"{found[0][0].text} ||| {found[0][0].score:.6g}"
    aligned = translate(runs, "--alignment", "--nbest", "1", text=text).stdout.splitlines()
    links = word_alignment(
        translator.loaded, [(translator.encode(lines[0]), found[0][0].ids)]
    )  # fmt: skip
    assert aligned[0] == expected[0] + " ||| " + " ".join(f"{s}-{t}" for s, t in links[0])
    assert aligned[1] == "1 |||  ||| 0 ||| "


def test_json_has_everything(runs: Path, translator: Translator) -> None:
    text = f"{SENTENCES[2]}\n\n"
    result = translate(runs, "--json", "--nbest", "2", text=text)
    first, empty = (json.loads(line) for line in result.stdout.splitlines())
    assert first["source"] == SENTENCES[2]
    [found] = translator.translate([SENTENCES[2]])
    assert [one["text"] for one in first["translations"]] == [one.text for one in found[:2]]
    best = first["translations"][0]
    assert best["score"] == pytest.approx(found[0].score, abs=1e-5)
    assert best["log_prob"] == pytest.approx(found[0].log_prob, abs=1e-5)
    assert best["pieces"] == translator.loaded.vocabulary.pieces(found[0].ids)
    words = len(best["text"].split())
    assert sorted(target for _, target in best["alignment"]) == list(range(words))
    assert empty["translations"] == [
        {"text": "", "score": 0.0, "log_prob": 0.0, "pieces": [], "alignment": []}
    ]


def test_prefixes(runs: Path, tmp_path: Path) -> None:
    text = "\n".join(SENTENCES[:3])
    for line in translate(runs, "--prefix", "Haus Baum", text=text).stdout.splitlines():
        assert line.startswith("Haus Baum")
    file = tmp_path / "prefixes"
    file.write_text("Katze\n\nrot", encoding="utf-8")
    free = translate(runs, text=text).stdout.splitlines()
    found = translate(runs, "--prefix-file", str(file), text=text).stdout.splitlines()
    assert found[0].startswith("Katze")
    assert found[1] == free[1]
    assert found[2].startswith("rot")
    for lines in (SENTENCES[:2], SENTENCES[:4]):
        result = translate(runs, "--prefix-file", str(file), text="\n".join(lines))
        assert result.exit_code == 2
        assert "prefixes has 3 lines, the input" in result.stderr
    result = translate(runs, "--prefix-file", str(file), "--prefix", "x", text=text)
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def scored(output: str) -> dict[str, float]:
    """Translations with their scores."""
    lines = (line.rsplit(" ||| ", 1) for line in output.splitlines())
    return {text: float(score) for text, score in lines}


def test_an_ensemble_of_the_same_model_twice_says_the_same(runs: Path) -> None:
    text = "\n".join(SENTENCES[:4])
    alone = translate(runs, "--scores", "--checkpoint", "60", text=text).stdout
    twice = ("--scores", "--checkpoint", "60", "--ensemble", "@60")
    both = [scored(out) for out in (translate(runs, *twice, text=text).stdout, alone)]
    assert both[0] == pytest.approx(both[1], abs=2e-5)  # a mean of two is rounded otherwise
    other = ("--scores", "--checkpoint", "60", "--ensemble", "demo@120")
    assert translate(runs, *other, text=text).stdout != alone
    result = translate(runs, "--ensemble", "@61", text=text)
    assert result.exit_code == 2
    assert "step 61" in result.stderr


def test_samples_do_not_depend_on_how_lines_come(runs: Path, tmp_path: Path) -> None:
    sampled = ("--set", "evaluation.search=sample", "--nbest", "2")
    whole = translate(runs, *sampled, text="\n".join(SENTENCES[:6])).stdout.splitlines()
    with process(runs, *sampled, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        found = []
        for sentence in SENTENCES[:6]:
            running.stdin.write(f"{sentence}\n".encode())
            running.stdin.flush()
            found += [running.stdout.readline().decode().rstrip("\n") for _ in range(2)]
        running.stdin.close()
    # A slow pipe: each line was answered before the next was written.
    assert [line.split(" ||| ")[:2] for line in found] == [
        line.split(" ||| ")[:2] for line in whole
    ]


def test_what_comes_before_a_broken_line_is_translated(runs: Path, translator: Translator) -> None:
    text = f"{SENTENCES[0]}\n{SENTENCES[1]}\n".encode() + "grün\n".encode("latin1") + b"rest\n"
    result = translate(runs, text=text)
    assert result.exit_code == 2
    assert re.search(r"stdin.*, line 3: not UTF-8", result.stderr)
    expected = [found[0].text for found in translator.translate(SENTENCES[:2])]
    assert result.stdout.splitlines() == expected


def test_a_reader_that_leaves_ends_it_quietly(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "many"
    file.write_text("dog\n" * 2500)
    with process(
        runs, "--input", str(file), "--set", "evaluation.search=greedy",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""


class Terminal:
    """A person at a terminal: what they type, and what they see of standard error."""

    def __init__(self, runs: Path, output: Any, *arguments: str) -> None:
        self.screen, inside = pty.openpty()
        self.running = process(
            runs, *arguments, stdin=inside, stdout=output or inside, stderr=inside,
            start_new_session=True,
        )  # fmt: skip
        os.close(inside)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def wait_for(self, pattern: str, *, interrupting: bool = False) -> str:
        """Read the screen until ``pattern`` is there; what came up to its end.

        Args:
            interrupting: send SIGINT, and again every few seconds until it has been heard.
        """
        deadline = time.monotonic() + 60
        again = time.monotonic()
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.seen!r}"
            if interrupting and time.monotonic() >= again:
                os.kill(self.running.pid, signal.SIGINT)
                again = time.monotonic() + 3
            if select.select([self.screen], [], [], 0.1)[0]:
                self.seen += self._decoder.decode(os.read(self.screen, 4096))
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self) -> int:
        """The exit status."""
        try:
            return self.running.wait(30)
        finally:
            self.running.kill()
            self.running.wait()
            os.close(self.screen)


def test_at_a_terminal(runs: Path, translator: Translator) -> None:
    first, second = (translator.translate([line])[0][0].text for line in SENTENCES[:2])
    terminal = Terminal(runs, None)
    assert "Ctrl-D ends" in terminal.wait_for("en> ")
    terminal.type(f"{SENTENCES[0]}\n")
    assert f"\r\n{first}\r\n" in terminal.wait_for(r"\nen> ")
    # A line that is given up, then the history: the line before the last.
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.wait_for(r"\nen> ", interrupting=True)
    terminal.type(f"{SENTENCES[1]}\n")
    terminal.wait_for(re.escape(f"\r\n{second}\r\nen> "))
    terminal.type("\x1b[A\x1b[A\n")
    assert f"\r\n{first}\r\n" in terminal.wait_for(r"\nen> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_at_a_terminal_with_the_output_in_a_file(
    runs: Path, translator: Translator, tmp_path: Path
) -> None:
    file = tmp_path / "translations"
    with file.open("wb") as output:
        terminal = Terminal(runs, output)
    terminal.wait_for("en> ")
    terminal.type(f"{SENTENCES[0]}\n")
    screen = terminal.wait_for(r"\nen> ")
    found = translator.translate([SENTENCES[0]])[0][0].text
    # What was typed is answered at once, and nothing else is in the file.
    assert file.read_text(encoding="utf-8") == f"{found}\n"
    assert found not in screen
    terminal.type("\x04")
    assert terminal.end() == 0
    assert file.read_text(encoding="utf-8") == f"{found}\n"
