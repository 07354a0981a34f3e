"""Configuration: what a file and --set make, and what each mistake says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_shards.errors import UserError
from trainer.config import RunConfig, load_config, parse_config

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda f: f.name
)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    assert isinstance(load_config(file), RunConfig)


def test_what_is_resolved_reads_back_the_same() -> None:
    config = load_config(None, ["model.preset=tiny", "data.lanes=2", "trainer.seed=7"])
    assert parse_config(json.loads(config.to_json()), where="config.json") == config
    assert (config.model.d_model, config.data.lanes, config.trainer.seed) == (128, 2, 7)


def test_a_preset_gives_way_to_what_is_said_explicitly() -> None:
    config = load_config(None, ["model.preset=big", "model.dropout=0.25"])
    assert (config.model.d_model, config.model.dropout) == (1024, 0.25)


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert load_config(None, ["trainer.peak_learning_rate=1e-3"]).trainer.peak_learning_rate == 1e-3


def test_values_are_read_as_a_person_means_them() -> None:
    config = load_config(
        None, ["data.source=no", 'data.target="de"', "data.deduplicate=false", "data.mirror=inf"]
    )
    assert (config.data.source, config.data.target) == ("no", "de")
    assert (config.data.deduplicate, config.data.mirror) == (False, "inf")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.max_step=3", "unknown key trainer.max_step; did you mean trainer.max_steps?"),
        ("trainr.seed=3", "unknown key trainr; did you mean trainer?"),
        ("trainer.seed=-1", "trainer.seed: Input should be greater than or equal to 0"),
        ("trainer.zero_stage=4", "trainer.zero_stage: Input should be 0, 1, 2 or 3"),
        ("model.num_heads=7", "not divisible by num_heads 7"),
        ("model.kind=lstn", "model.kind: Input should be"),
        ("data.lanes=4096", "raise tokens_per_step, or lower lanes or max_length"),
        ("data.valid_source=a", "give both valid_source and valid_target"),
        ("trainer.max_steps=null", "the run would never end"),
        ("data", "write it as section.key=value"),
        ("trainer.seed.x=3", "trainer.seed"),
    ],
)
def test_each_mistake_is_one_message_with_the_mend(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, ["model.preset=tiny", setting])
    assert message in str(error.value)
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("- a\n", "must hold a mapping"),
        ("a: [", "not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_none(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(file)
    assert str(file) in str(error.value)


def test_reading_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, trainer.config;"
        "print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"
