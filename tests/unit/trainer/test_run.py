from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from data_shards.errors import UserError
from trainer.events import EventLog
from trainer.run import (
    choose_checkpoints,
    events_path,
    load_model,
    open_checkpoints,
    read_config,
    read_events,
)
from trainer.storage import Storage


@pytest.fixture(scope="module")
def trained(trained_run):
    return trained_run


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy whose files a test may damage."""
    return shutil.copytree(trained, tmp_path / "runs" / "demo")


def _weights(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors"


def choose(run_dir, checkpoint):
    return choose_checkpoints(open_checkpoints(run_dir), checkpoint)


class TestConfig:
    def test_the_configuration_comes_back_whole(self, trained):
        config = read_config(trained)
        assert config.to_json() == (trained / "config.json").read_text()

    def test_a_missing_run_names_those_there_are(self, run_dir):
        with pytest.raises(UserError, match=r"no such run: .*dmeo .*: demo$"):
            read_config(run_dir.parent / "dmeo")

    def test_without_any_run_the_mend_is_to_train(self, tmp_path):
        with pytest.raises(UserError, match="babelray train"):
            read_config(tmp_path / "runs" / "demo")

    def test_an_unreadable_configuration_is_named(self, run_dir):
        (run_dir / "config.json").write_text('{"model": ')
        with pytest.raises(UserError, match=r"cannot be read: .*config\.json"):
            read_config(run_dir)


class TestEvents:
    def _log(self, run_dir, *events):
        log = EventLog(events_path(run_dir))
        for event, values in events:
            log.write(event, **values)
        log.close()

    def test_a_run_without_a_log_has_no_events(self, tmp_path):
        assert read_events(tmp_path) == []

    def test_a_cut_line_is_left_out_at_the_end_and_in_the_middle(self, tmp_path):
        self._log(tmp_path, ("step", {"step": 1}))
        with events_path(tmp_path).open("a") as stream:
            stream.write('{"event": "step", "st')
        assert [event["step"] for event in read_events(tmp_path)] == [1]
        self._log(tmp_path, ("step", {"step": 2}))
        assert [event["step"] for event in read_events(tmp_path)] == [1, 2]

    def test_what_a_resume_undid_is_dropped_and_the_later_value_wins(self, tmp_path):
        self._log(
            tmp_path,
            ("started", {"step": 0}),
            ("step", {"step": 10, "loss": 1.0}),
            ("checkpoint", {"step": 10}),
            ("step", {"step": 20, "loss": 2.0}),
            ("validated", {"step": 25, "valid_nll": 9.0}),
            ("step", {"step": 30, "loss": 3.0}),
            ("resumed", {"step": 10}),
            ("step", {"step": 20, "loss": 2.5}),
        )
        events = read_events(tmp_path)
        assert [event["event"] for event in events] == [
            "started", "step", "checkpoint", "resumed", "step",
        ]  # fmt: skip
        assert [e["loss"] for e in events if e["event"] == "step"] == [1.0, 2.5]

    def test_a_step_logged_twice_without_a_resume_counts_once(self, tmp_path):
        self._log(
            tmp_path, ("step", {"step": 10, "loss": 1.0}), ("step", {"step": 10, "loss": 2.0})
        )
        assert [event["loss"] for event in read_events(tmp_path)] == [2.0]

    def test_a_run_that_starts_anew_has_undone_all(self, tmp_path):
        """Killed before its first checkpoint: the next attempt begins at step 0."""
        self._log(
            tmp_path,
            ("started", {"step": 0}),
            ("step", {"step": 500, "loss": 1.0}),
            ("started", {"step": 0}),
            ("step", {"step": 50, "loss": 2.0}),
        )
        events = read_events(tmp_path)
        assert [event["event"] for event in events] == ["started", "started", "step"]
        assert events[-1]["loss"] == 2.0

    def test_skips_and_rewinds_that_a_resume_undid_are_dropped(self, tmp_path):
        self._log(
            tmp_path,
            ("skipped", {"step": 4, "reason": "loss_spike"}),
            ("skipped", {"step": 14, "reason": "loss_spike"}),
            ("rewound", {"step": 15, "to_step": 10}),
            ("resumed", {"step": 10}),
            ("skipped", {"step": 14, "reason": "loss_not_finite"}),
        )
        found = [(e["event"], e.get("step"), e.get("reason")) for e in read_events(tmp_path)]
        assert found == [
            ("skipped", 4, "loss_spike"),
            ("resumed", 10, None),
            ("skipped", 14, "loss_not_finite"),
        ]

    def test_evaluations_of_later_checkpoints_survive_a_resume(self, tmp_path):
        self._log(tmp_path, ("evaluated", {"step": 20, "bleu": 1.0}), ("resumed", {"step": 10}))
        assert [event["event"] for event in read_events(tmp_path)] == ["evaluated", "resumed"]


class TestChoice:
    def test_only_committed_checkpoints_count(self, run_dir):
        (run_dir / "checkpoints" / "step-00000180" / "COMMIT").unlink()
        (run_dir / "checkpoints" / "notes").mkdir()
        assert choose(run_dir, "average") == [60, 120]
        assert choose(run_dir, "last") == [120]

    def test_each_word(self, run_dir):
        steps = partial(choose, run_dir)
        assert steps("best") == [180]  # nothing validated yet: the last
        (run_dir / "best.json").write_text('{"step": 120, "valid_nll": 1.5}')
        assert steps("best") == [120]
        assert steps("last") == [180]
        assert steps("60") == [60]
        assert steps("average") == [60, 120, 180]
        assert steps("average:2") == [120, 180]
        assert steps("ema") == [180]

    @pytest.mark.parametrize("word", ["bset", "average:", "average:0", "best:2", "-1", "", "²"])
    def test_another_word_is_refused(self, trained, word):
        with pytest.raises(UserError, match="use best, last, average, average:N, ema or a step"):
            choose(trained, word)

    def test_an_absent_step_names_those_there_are(self, trained):
        with pytest.raises(UserError, match=r"no checkpoint of step 3.*: 60, 120, 180"):
            choose(trained, "3")

    def test_more_than_there_are_cannot_be_averaged(self, trained):
        with pytest.raises(UserError, match="only 3 checkpoints"):
            choose(trained, "average:4")

    def test_a_run_without_checkpoints_says_so(self, run_dir):
        shutil.rmtree(run_dir / "checkpoints")
        with pytest.raises(UserError, match="no checkpoint yet"):
            choose(run_dir, "best")

    def test_a_best_checkpoint_that_is_gone_is_not_replaced_in_silence(self, run_dir):
        (run_dir / "best.json").write_text('{"step": 3, "valid_nll": 1.5}')
        with pytest.raises(UserError, match=r"best checkpoint .step 3. is gone.*--checkpoint last"):
            choose(run_dir, "best")


class TestModel:
    def test_a_moving_average_must_have_been_kept(self, run_dir):
        with pytest.raises(UserError, match=r"no moving average.*trainer\.ema_decay"):
            load_model(run_dir, "ema")

    @pytest.mark.parametrize("kind", ["folder", "remote"])
    def test_checkpoints_lie_where_the_configuration_puts_them(
        self, kind, run_dir, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        expected = load_model(run_dir, "60").model.state_dict()
        where = str(tmp_path / "storage") if kind == "folder" else f"memory://{tmp_path.name}"
        config = json.loads((run_dir / "config.json").read_text())
        config["recovery"]["storage"] = where
        (run_dir / "config.json").write_text(json.dumps(config))
        storage = Storage.of(where)
        for file in sorted((run_dir / "checkpoints").rglob("*.*")) + sorted(
            (run_dir / "checkpoints").rglob("COMMIT")
        ):
            storage.put(file, f"demo/{file.relative_to(run_dir).as_posix()}")
        storage.write("demo/best.json", b'{"step": 60, "valid_nll": 1.5}')
        loaded = load_model(run_dir, "best")
        assert loaded.step == 60
        found = loaded.model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_the_weights_are_the_files(self, trained):
        loaded = load_model(trained, "120")
        assert (loaded.step, loaded.label, loaded.steps) == (120, "120", (120,))
        assert not loaded.model.training
        expected = load_file(_weights(trained, 120))
        state = loaded.model.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)

    def test_average_is_the_mean_of_the_last(self, trained):
        loaded = load_model(trained, "average:2")
        assert (loaded.step, loaded.label, loaded.steps) == (180, "average-2", (120, 180))
        one, other = load_file(_weights(trained, 120)), load_file(_weights(trained, 180))
        for name, weight in loaded.model.state_dict().items():
            torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=0, atol=1e-7)

    def test_a_truncated_file_is_told_with_both_sizes_and_the_mend(self, run_dir):
        file = _weights(run_dir, 180)
        content = file.read_bytes()
        file.write_bytes(content[:-7])
        sizes = f"has {len(content) - 7} bytes, {len(content)} were written"
        with pytest.raises(UserError, match=f"{sizes}; .*another step: 60, 120"):
            load_model(run_dir, "last")

    def test_a_flipped_bit_is_told_by_its_sha256(self, run_dir):
        file = _weights(run_dir, 180)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"step-00000180.*differs from what was written"):
            load_model(run_dir, "average")

    def test_a_checkpoint_without_its_manifest_is_refused(self, run_dir):
        (_weights(run_dir, 180).parent / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"manifest\.json is missing; .*another step"):
            load_model(run_dir, "last")

    def test_another_corpus_in_the_same_place_is_refused(self, run_dir):
        file = read_config(run_dir).data.folder() / "manifest.json"
        original = file.read_bytes()
        try:
            file.write_bytes(original + b"\n")
            with pytest.raises(UserError, match="trained on another corpus"):
                load_model(run_dir, "last")
        finally:
            file.write_bytes(original)

    def test_weights_of_another_shape_are_refused_by_name(self, run_dir):
        config = json.loads((run_dir / "config.json").read_text())
        config["model"]["d_ff"] = 32
        (run_dir / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"does not fit the run's configuration: .* has shape"):
            load_model(run_dir, "last")
