"""The scaling model of docs/scaling.md: its formulas by hand, its page against its own numbers."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model.build import build
from model.config import ModelConfig
from trainer.paper.memory import activation_bytes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def scripts() -> Iterator[Path]:
    """The folder of the benchmarks, importable as when they are run."""
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def model(scripts: Path) -> ModuleType:
    return importlib.import_module("scaling_model")


@pytest.fixture(scope="module")
def command(scripts: Path) -> ModuleType:
    return importlib.import_module("scaling")


@pytest.mark.parametrize("preset", ["base", "big"])
def test_parameters_are_those_of_the_model_that_is_built(model: ModuleType, preset: str) -> None:
    with torch.device("meta"):
        built = build(ModelConfig.model_validate({"preset": preset}), 37_000)
    assert model.num_parameters(preset, 37_000) == sum(p.numel() for p in built.parameters())


def test_flops_of_a_pair_are_six_a_weight_and_token_and_a_little_for_attention(
    model: ModuleType,
) -> None:
    """An independent count: 6 operations a weight that a token passes, attention some percents."""
    config, pair = ModelConfig(preset="big"), model.parts()["corpus"]
    d, f = config.d_model, config.d_ff
    encoder, decoder = 6 * (4 * d * d + 2 * d * f), 6 * (6 * d * d + 2 * d * f)
    cross = 6 * 2 * d * d  # keys and values of the source
    weights = (pair["source"] * (encoder + cross) + pair["target"] * (decoder + d * 37_000)) * 6
    counted = model.flops_per_target_token("big", 37_000) * pair["target"]
    assert 1.0 < counted / weights < 1.05


@pytest.mark.parametrize(
    ("stage", "lanes", "shares"),
    # In units of (n - 1) / n of the half-precision weights.
    [(0, 1, 2), (0, 4, 2), (1, 1, 3), (1, 4, 3), (2, 1, 3), (2, 4, 9), (3, 1, 3), (3, 4, 12)],
)
def test_what_a_rank_sends(model: ModuleType, stage: int, lanes: int, shares: int) -> None:
    sent = model.sent_bytes(1000, 8, stage=stage, lanes=lanes)
    assert sent == pytest.approx(shares * 7 / 8 * 1000 * 2)
    assert model.sent_bytes(1000, 1, stage=stage, lanes=lanes) == 0


def test_the_bus_is_the_slower_of_nvlink_and_network(model: ModuleType) -> None:
    h100 = model.GPUS["h100"]
    assert model.Cluster(h100, 8, 25).bus_gb_s() == 476
    assert model.Cluster(h100, 16, 400).bus_gb_s() == pytest.approx(50 * 0.85)
    assert model.Cluster(h100, 16, 100_000).bus_gb_s() == 476
    assert model.Cluster(h100, 9, 400).nodes == 2


def test_a_step_by_hand(model: ModuleType) -> None:
    step = model.Step(
        compute=0.030, launch=0.008, optimizer=0.001, bandwidth=0.012, latency=0.002, stream=0.001
    )
    assert step.seconds() == pytest.approx(0.030 + 0.001 + 0.014)
    assert step.seconds(overlap=True) == pytest.approx(0.031)  # 14 fit into 20 of backward
    small = model.Step(0.003, 0.006, 0.0, 0.010, 0.0)
    assert small.seconds(overlap=True) == pytest.approx(0.006 + 0.010 - 0.004)
    one, two = (model.Cluster(model.GPUS["h100"], n, 400) for n in (8, 16))
    assert step.bound(one) == "compute"
    assert (small.bound(one), small.bound(two)) == ("NVLink", "network bandwidth")


def test_the_calibration_meets_its_one_point_and_no_other_is_marked(model: ModuleType) -> None:
    marked = [row for row in model.checks() if row["calibrates"]]
    assert len(marked) == 1
    assert marked[0]["serial_error"] == pytest.approx(0, abs=1e-9)
    assert 0.2 < model.efficiency() < 0.6


def test_big_on_one_gpu_takes_its_operations_over_the_speed(model: ModuleType) -> None:
    job = model.Job("test", "big", 25_000, 1000)
    row = model.reckon(job, model.Cluster(model.GPUS["a100-80"], 1, 0))
    tokens = row.target_tokens_per_s * row.step_s
    assert 0.85 * 25_000 < tokens < 25_000  # what the plan fills of the budget
    flops = tokens * model.flops_per_target_token("big", 37_000)
    expected = (
        flops / (312e12 * model.efficiency()) + model.num_parameters("big", 37_000) * 32 / 2039e9
    )
    assert row.step_s == pytest.approx(expected, rel=0.01)
    assert row.hours == pytest.approx((1000 * row.step_s + 20) / 3600)
    assert row.parts["bandwidth"] == row.parts["latency"] == row.node_gb_per_step == 0


def test_more_gpus_than_the_batch_has_lanes_for_are_refused(model: ModuleType) -> None:
    job = model.Job("test", "base", 25_000, 1000)
    h100 = model.GPUS["h100"]
    assert isinstance(model.reckon(job, model.Cluster(h100, 64, 400)), model.Row)
    assert "195 tokens" in model.reckon(job, model.Cluster(h100, 128, 400))


def test_what_does_not_fit_is_cut_into_more_lanes(model: ModuleType) -> None:
    job = model.Job("test", "big", 400_000, 1000)
    small, large = (model.GPUS[name] for name in ("v100-16", "h200"))
    many, few = (model.reckon(job, model.Cluster(gpu, 8, 0)) for gpu in (small, large))
    assert many.lanes_per_rank > few.lanes_per_rank >= 1
    assert many.tokens_per_lane * many.lanes_per_rank * 8 == 400_000
    parameters = model.num_parameters("big", 37_000)
    assert model.memory_gb("big", parameters, 8, many.tokens_per_lane, 1) < 0.9 * 16
    assert model.memory_gb("big", parameters, 8, 2 * many.tokens_per_lane, 1) > 0.9 * 16
    nothing = model.Gpu("x", "V100", "fp16", 1.0, 900, 120, "")
    assert model.reckon(job, model.Cluster(nothing, 8, 0)) == "out of memory"


@pytest.mark.parametrize("preset", ["base", "big"])
def test_what_autograd_keeps_is_the_plans_formula_and_once_the_softmax_gradient(
    model: ModuleType, preset: str
) -> None:
    parts, config = model.parts(), ModelConfig(preset=preset)
    assert parts["kept_bytes_once"][preset] == pytest.approx(4 * 37_000 * config.d_model, rel=0.01)
    formula = activation_bytes(config, "bf16", 1)
    # Measured on the CPU's path, which keeps weights of attention as well.
    assert formula <= parts["kept_bytes_per_token"][preset] < 1.1 * formula
    # Twelve bytes a logit, of 2^27 at most.
    for tokens, logits in ((1000, 1000 * 37_000), (20_000, 0)):
        more = [model.memory_gb(preset, 1e8, 8, n, 1) for n in (tokens, tokens + 1000)]
        expected = 1000 * parts["kept_bytes_per_token"][preset] + 12 * logits
        assert more[1] - more[0] == pytest.approx(expected / 1e9)


def test_the_best_interval_loses_least(model: ModuleType) -> None:
    best = model.failures(512, 3.0)
    assert best.mtbf_h == pytest.approx(54 * 24 * 16_384 / 419 / 512)
    assert best.best_interval_s == pytest.approx(math.sqrt(6 * best.mtbf_h * 3600))
    for factor in (0.5, 0.9, 1.1, 2):
        other = model.failures(512, 3.0, best.best_interval_s * factor)
        assert other.lost_share > best.lost_share


def test_the_command_reckons_one_cluster(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(
        ["--gpus", "h100", "--nodes", "4", "--network", "400", "--model", "big", "--price", "2.5"]
    )
    shown = capsys.readouterr().out
    assert "4 nodes of 8 x h100, 400 Gb/s a node" in shown
    assert "network bandwidth" in shown
    assert "dollars at 2.5 a GPU hour" in shown


def test_the_command_refuses_what_cannot_be(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"128 x h100 cannot: lanes of 195 tokens"):
        command.main(["--gpus", "h100", "--nodes", "16"])
    for wrong in (["--nodes", "0"], ["--nodes", "2", "--network", "0"]):
        with pytest.raises(SystemExit):
            command.main(["--gpus", "h100", *wrong])
    assert "must be" in capsys.readouterr().err


def test_page_and_result_tell_what_the_model_says(
    scripts: Path, model: ModuleType, command: ModuleType
) -> None:
    written = json.loads((scripts / "results" / "scaling.json").read_text())
    assert written["efficiency"] == pytest.approx(model.efficiency())
    assert [row["name"] for row in written["checks"]] == [row["name"] for row in model.checks()]
    page = (ROOT / "docs" / "scaling.md").read_text()
    for name, table in command.page_tables().items():
        assert command.between(page, name) == table, f"run benchmarks/scaling.py: {name}"
