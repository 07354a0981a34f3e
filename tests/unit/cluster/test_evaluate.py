"""``babelray evaluate`` without Ray: options, messages, tables."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from cluster.cli import cli
from cluster.evaluate import Actors, _Actor, _check_room, _explained, _patiently, _ray_writes_to
from data_shards.errors import UserError
from tests.runs import make_run
from trainer.run import read_events


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("trained"), steps=(20, 40))


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs" / "demo")


def evaluate(run_dir, *arguments):
    """In this process: ``--actors 0``."""
    fixed = ("evaluate", "demo", "--runs", str(run_dir.parent), "--actors", "0")
    return CliRunner().invoke(cli, [*fixed, *map(str, arguments)])


def test_one_result_with_its_signatures(run_dir):
    done = evaluate(run_dir, "--samples", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    for line, name in zip(lines, ("BLEU ", "chrF ", "TER ", "paper BLEU "), strict=False):
        assert line.startswith(name)
    assert "tok:13a" in lines[0]
    assert "split:hyphens" in lines[3]
    assert lines[4].startswith("30 sentences of test, checkpoint best (step 40), beam 4")
    assert done.stdout.count("hypothesis  ") == 2


def test_several_checkpoints_and_test_sets_beside_each_other(run_dir):
    done = evaluate(
        run_dir, "--checkpoint", "best,20", "--checkpoint", "average:2", "--test-set", "test,valid"
    )
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()[1:7]]
    assert [row[:2] for row in rows] == [
        [test_set, checkpoint]
        for checkpoint in ("best", "20", "average-2")
        for test_set in ("test", "valid")
    ]
    assert sum(line.startswith("BLEU:") for line in done.stdout.splitlines()) == 1
    assert len([e for e in read_events(run_dir) if e["event"] == "evaluated"]) == 6


def test_json_of_one_and_of_several(run_dir):
    one = json.loads(evaluate(run_dir, "--json").stdout)
    assert one["checkpoint"] == "best"
    several = json.loads(evaluate(run_dir, "--json", "--checkpoint", "best,20").stdout)
    assert several["results"][0]["bleu"] == one["bleu"]


def test_a_comparison_and_a_breakdown(run_dir):
    shutil.copytree(run_dir, run_dir.parent / "other")
    done = evaluate(run_dir, "--compare", "other@20", "--compare", "@average", "--breakdown")
    assert done.exit_code == 0, done.output
    for part in ("other 20", "demo average", "p (bootstrap)", "baseline", "1,000 samples"):
        assert part in done.stdout
    for part in ("by words of the source", "by their frequency in training", "the worst sentences"):
        assert part in done.stdout
    assert not (run_dir.parent / "other" / "evaluation").exists()


def test_an_ensemble(run_dir):
    done = evaluate(run_dir, "--ensemble", "@20", "--json")
    assert json.loads(done.stdout)["checkpoint"] == "best+20"
    assert (run_dir / "evaluation" / "test-best+20.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--test-set", "wtm14,tset"], ["'wtm14' (did you mean wmt14", "'tset'", "--reference"]),
        (["--checkpoint", "7"], ["no checkpoint of step 7", "20, 40"]),
        (["--compare", "dem"], ["no run 'dem'", "did you mean demo"]),
        (["--set", "evaluation.beem=3"], ["evaluation.beam"]),
        (["--actors", "3:1"], ["1:3"]),
        (["--actors", "many"], ["such as 4"]),
        (["--source", "x.en"], ["--reference"]),
        (["--push-gateway", "127.0.0.1:9"], ["did not take them"]),
    ],
)
def test_mistakes(run_dir, arguments, parts):
    done = evaluate(run_dir, *arguments)
    assert done.exit_code in (1, 2)
    for part in parts:
        assert part in done.output
    assert "Traceback" not in done.output


def test_ctrl_c_says_how_to_go_on(run_dir, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.evaluate.translate_all", interrupted)
    done = evaluate(run_dir)
    assert done.exit_code == 130
    assert done.stderr == (
        "interrupted; what was translated is kept, and the same command goes on from there\n"
    )


def test_more_actors_than_the_cluster_has_room_for():
    _check_room(Actors(2, 9), 2, has_gpu=False)
    with pytest.raises(UserError, match=r"--actors 3: the cluster has 2 GPUs.*--actors 2"):
        _check_room(Actors(3, 3), 2, has_gpu=True)


class TestWhatAnActorMeets:
    def decoded(self, run_dir, monkeypatch, error):
        def failing(self, batch):
            raise error

        monkeypatch.setattr("trainer.decoding_job.BatchDecoder.__call__", failing)
        batch = {"system": 0, "job": 0, "number": 0, "indices": [0], "lines": ["a"]}
        (found,) = _Actor((), "cpu")({"batch": [json.dumps(batch)]})["decoded"]
        return json.loads(found)

    def test_a_mistake_of_the_users_is_a_message(self, run_dir, monkeypatch):
        found = self.decoded(run_dir, monkeypatch, UserError("the checkpoint is gone"))
        assert found == {"error": "the checkpoint is gone", "failed": False}

    def test_want_of_memory_names_the_mend(self, run_dir, monkeypatch):
        found = self.decoded(run_dir, monkeypatch, torch.OutOfMemoryError("CUDA"))
        assert "evaluation.batch_tokens" in found["error"]
        assert found["failed"]

    def test_of_anything_else_the_last_line_and_how_to_go_on(self):
        found = _explained(RuntimeError("a\nValueError: what happened\n"))
        assert str(found).startswith("decoding failed: ValueError: what happened. What was")


def test_only_rays_lines_go_to_the_file(tmp_path, capfd):
    import os

    with _ray_writes_to(tmp_path / "logs" / "evaluation.log"):
        os.write(2, b"from Ray's C++\n")
        print("from Ray's Python")
    os.write(2, b"afterwards\n")
    print("to the terminal", file=sys.stderr)
    assert (tmp_path / "logs" / "evaluation.log").read_text() == (
        "from Ray's C++\nfrom Ray's Python\n"
    )
    assert capfd.readouterr().err == "afterwards\nto the terminal\n"


def test_a_comparison_of_different_searches_says_so(run_dir):
    other = shutil.copytree(run_dir, run_dir.parent / "other")
    arguments = ("--compare", "other@20", "--compare", "@20")
    assert "different settings" not in evaluate(run_dir, *arguments).stdout
    values = json.loads((other / "config.json").read_text())
    values["evaluation"]["beam"] = 2
    (other / "config.json").write_text(json.dumps(values))
    lines = evaluate(run_dir, *arguments).stdout.splitlines()
    assert (
        "searched with different settings: demo best beam=4; other 20 beam=2; demo 20 beam=4"
    ) in lines


def test_who_waits_long_is_told_once_where_to_look():
    told = []

    def rows():
        yield {"decoded": 1}
        assert not told
        for number in (2, 3):
            time.sleep(0.3)
            yield {"decoded": number}

    found = [row["decoded"] for row in _patiently(rows(), lambda: told.append(1), patience_s=0.1)]
    assert found == [1, 2, 3]
    assert told == [1]


def test_who_scores_long_does_not_wait():
    told = []
    for _ in _patiently([{}, {}], lambda: told.append(1), patience_s=0.1):
        time.sleep(0.3)
    assert told == []
