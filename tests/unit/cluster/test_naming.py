"""Run names, claims and what a resume may change."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import naming
from data_shards.errors import UserError
from trainer.config import RecoveryConfig, RunConfig, load_config

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"


def open_tiny(runs: Path, *settings: str, name: str | None = "one", **kwargs: bool) -> RunConfig:
    arguments = {"resume": False, **kwargs}
    config, _ = naming.open_run(TINY, settings, name, runs=runs, **arguments)
    return config


def store(runs: Path, *settings: str, name: str = "one") -> Path:
    naming.write_config(open_tiny(runs, *settings, name=name), runs / name)
    return runs / name


@pytest.mark.parametrize("name", ["a", "Run-1.2_b", "9" * 100])
def test_accepts_plain_names(name: str) -> None:
    naming.check_name(name)


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "..", "a b", "ü", "9" * 101])
def test_refuses_names_that_are_no_plain_folder(name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        naming.check_name(name)


@pytest.mark.parametrize("file", ["tiny.yaml", "my config!.yaml", "....yaml", "x" * 200])
def test_a_generated_name_is_valid(file: str) -> None:
    naming.check_name(naming.new_name(Path(file)))
    naming.check_name(naming.new_name(None))


def test_a_generated_name_tells_the_configuration() -> None:
    assert naming.new_name(Path("configs/tiny.yaml")).startswith("tiny-20")


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = open_tiny(tmp_path, "trainer.max_steps=7", "data.root=somewhere")
    naming.write_config(config, tmp_path / "one")
    assert load_config(tmp_path / "one" / "config.json") == config
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["config.json"]


def test_data_folders_become_absolute_and_sources_do_not() -> None:
    config = load_config(TINY, ["data.cache_dir=cache", "data.source=corpus.en"])
    data = naming.absolute(config).data
    assert data.root == Path.cwd() / "data"
    assert data.cache_dir == Path.cwd() / "cache"
    assert data.dir is None
    assert data.fingerprint() == config.data.fingerprint()


def test_a_taken_name_is_refused_with_the_mends(tmp_path: Path) -> None:
    store(tmp_path)
    with pytest.raises(UserError, match=r"exists already.*--resume.*--name.*--overwrite"):
        open_tiny(tmp_path)


def test_checkpoints_without_configuration_are_not_taken_for_a_fresh_run(tmp_path: Path) -> None:
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="exists already"):
        open_tiny(tmp_path)


def test_overwrite_takes_the_name_and_clears_all_but_the_lock(tmp_path: Path) -> None:
    run = store(tmp_path)
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    open_tiny(tmp_path, overwrite=True)
    with naming.claim(run):
        naming.clear(run, RecoveryConfig())
        assert [path.name for path in run.iterdir()] == [".lock"]


def test_checkpoints_in_another_storage_belong_to_the_run(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    setting = f"recovery.storage={storage}"
    open_tiny(tmp_path, setting)  # nothing there yet
    step = storage / "one" / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (step / "COMMIT").write_text("0\n")
    with pytest.raises(UserError, match="exists already"):
        open_tiny(tmp_path, setting)
    # A machine that has nothing but the configuration goes on with it.
    config, name = naming.open_run(TINY, (setting,), "one", runs=tmp_path, resume=True)
    assert (config.recovery.storage, name) == (str(storage), "one")
    config = open_tiny(tmp_path, setting, overwrite=True)
    run = tmp_path / "one"
    with naming.claim(run):
        naming.clear(run, config.recovery)
    assert not step.exists()


def test_the_places_of_checkpoints_are_absolute_unless_they_are_urls(tmp_path: Path) -> None:
    config = open_tiny(tmp_path, "recovery.storage=there", "recovery.staging=fast")
    assert config.recovery.storage == str(Path.cwd() / "there")
    assert config.recovery.staging == Path.cwd() / "fast"
    assert open_tiny(tmp_path, "recovery.storage=file:///x").recovery.storage == "file:///x"


def test_resume_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--name"):
        open_tiny(tmp_path, name=None, resume=True)


def test_resume_of_a_run_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    store(tmp_path, name="demo")
    with pytest.raises(UserError, match="did you mean demo"):
        open_tiny(tmp_path, name="demi", resume=True)


def test_resume_without_a_file_takes_the_runs_own_configuration(tmp_path: Path) -> None:
    store(tmp_path, "model.d_ff=64", "trainer.max_steps=5")
    config, name = naming.open_run(
        None, ("trainer.max_steps=9",), "one", runs=tmp_path, resume=True
    )
    assert name == "one"
    assert config.model.d_ff == 64
    assert config.trainer.max_steps == 9


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.max_steps=9",
        "trainer.max_minutes=1.5",
        "trainer.log_every=3",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=3",
        "trainer.patience=3",
        "trainer.threads=1",
        "evaluation.beam=8",
        "data.root=elsewhere",
        "data.prefetch_steps=2",
        "data.shards_url=https://elsewhere/corpus",
    ],
)
def test_resume_may_change_when_to_look_and_to_stop(tmp_path: Path, setting: str) -> None:
    store(tmp_path)
    open_tiny(tmp_path, setting, resume=True)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("model.d_ff=64", "model.d_ff"),
        ("model.dropout=0.2", "model.dropout"),
        ("data.lanes=2", "data.lanes"),
        ("data.tokens_per_step=8192", "data.tokens_per_step"),
        ("data.window_pairs=100", "data.window_pairs"),
        ("data.vocabulary_size=300", "data.vocabulary_size"),
        ("trainer.seed=2", "trainer.seed"),
        ("trainer.precision=fp32", "trainer.precision"),
        ("trainer.peak_learning_rate=0.5", "trainer.peak_learning_rate"),
    ],
)
def test_resume_refuses_what_changes_the_run(tmp_path: Path, setting: str, key: str) -> None:
    store(tmp_path)
    with pytest.raises(UserError) as caught:
        open_tiny(tmp_path, setting, resume=True)
    assert key in str(caught.value)
    assert "start a new run" in str(caught.value)


def test_every_changeable_field_exists() -> None:
    fields = {
        f"{section}.{key}"
        for section, values in load_config(TINY).model_dump().items()
        for key in values
    }
    assert fields >= naming.CHANGEABLE


def test_a_preset_spelt_out_is_the_same_run(tmp_path: Path) -> None:
    run = store(tmp_path)
    values = json.loads((run / "config.json").read_text())
    values["model"]["preset"] = None
    spelt_out = tmp_path / "spelt-out.yaml"
    spelt_out.write_text(json.dumps(values))
    naming.open_run(spelt_out, (), "one", runs=tmp_path, resume=True)


def test_finds_a_run_by_name_and_by_path(tmp_path: Path) -> None:
    run = store(tmp_path)
    assert naming.find_run("one", tmp_path) == run
    assert naming.find_run(str(run), Path("elsewhere")) == run


def test_an_unknown_run_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        naming.find_run("x", tmp_path)
    store(tmp_path, name="first")
    with pytest.raises(UserError, match="there are: first"):
        naming.find_run("zzzz", tmp_path)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    run = store(tmp_path)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        open_tiny(tmp_path, resume=True)


def test_two_processes_cannot_hold_one_run(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.naming import claim\n"
        "with claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TINY.parents[1],
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"being trained by process {holder.pid}"):
            naming.claim(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        with naming.claim(tmp_path):  # the kernel has freed what the killed process held
            pass


def test_start_or_resume_begins_what_is_not_there_and_goes_on_with_what_is(tmp_path: Path) -> None:
    open_tiny(tmp_path, start_or_resume=True)
    store(tmp_path)
    config = open_tiny(tmp_path, "trainer.max_steps=7", start_or_resume=True)
    assert config.trainer.max_steps == 7
    with pytest.raises(UserError, match=r"--resume would change .*\n  trainer\.seed: 1 in the run"):
        open_tiny(tmp_path, "trainer.seed=9", start_or_resume=True)


@pytest.mark.parametrize(("file", "name"), [(None, "one"), (TINY, None)])
def test_start_or_resume_needs_to_know_what(
    tmp_path: Path, file: Path | None, name: str | None
) -> None:
    with pytest.raises(UserError, match="needs --name RUN and --config FILE"):
        naming.open_run(file, (), name, runs=tmp_path, resume=False, start_or_resume=True)


def test_a_claim_waits_for_another_to_end(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from cluster.naming import claim\n"
            "with claim(Path(sys.argv[1])):\n    print('ready', flush=True); time.sleep(1)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="is being trained by process"), naming.claim(tmp_path):
            pass
        with naming.claim(tmp_path, patience_s=30):
            assert holder.wait() == 0


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(naming.fcntl, "flock", refuse)
    message = r"\.lock cannot be locked \(Function not implemented\).*Lustre: flock"
    with pytest.raises(UserError, match=message), naming.claim(tmp_path):
        pass
