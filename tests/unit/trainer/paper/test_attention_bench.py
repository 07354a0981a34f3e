"""The attention bench: its statistics against autograd and the model; its page from results.

No test looks at how long anything takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner, Result

from cluster.cli import cli
from data_shards.errors import UserError
from model.build import build
from model.config import ModelConfig
from model.masks import causal_mask
from tests.runs import make_run
from trainer.paper import attention_bench as bench
from trainer.paper import attention_page, attention_scale
from trainer.paper.charts import Panel
from trainer.paper.results import write_result
from trainer.run import LoadedModel, load_model

REPOSITORY = Path(__file__).resolve().parents[4]
TINY = bench.Sizes(
    lengths=(4, 40), widths=(8,), length=4, width=8, tokens=8, rounds=1,
    scale_widths=(16, 256), scale_heads=(8,),
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("bench"), steps=(20,))


@pytest.fixture(scope="module")
def result(run_dir: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_scale, "_SENTENCES", 2)
        return bench.measure(TINY, lambda line: None, load_model(run_dir))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["attention-bench", *map(str, arguments)])


def test_the_statistics_of_a_softmax_are_those_of_autograd() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, -math.inf], [500.0, 0.0, 1.0, 2.0]])
    found = attention_scale.softmax_statistics(logits)
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: x.softmax(-1), row[row > -math.inf]).norm()
        for row in logits.double()
    ]
    assert found["gradient"] == pytest.approx(float(jacobians[0]) / 2)
    assert float(jacobians[1]) == 0
    weights = [math.exp(x) for x in (0.3, -1.0, 2.0)]
    weights = [weight / sum(weights) for weight in weights]
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in weights) / 2)
    assert found["top"] == pytest.approx((max(weights) + 1) / 2)
    assert found["saturated"] == 0.5
    assert found["largest"] == 500


def test_the_scale_holds_the_variance_where_it_grows_with_the_width() -> None:
    rows = {
        (row["d_k"], row["scaled"], row["dtype"]): row
        for row in attention_scale.gaussian_rows([16, 256])
    }
    for width in (16, 256):
        assert rows[width, False, "fp32"]["variance"] == pytest.approx(width, rel=0.1)
        assert rows[width, True, "fp32"]["variance"] == pytest.approx(1, rel=0.1)
    wide, scaled = rows[256, False, "fp32"], rows[256, True, "fp32"]
    assert wide["median_gradient"] < scaled["median_gradient"] / 5
    assert wide["entropy"] < 0.3 < 3.5 < scaled["entropy"]
    # A float16 product overflows at the stated spread, and just below it does not.
    generator = torch.Generator().manual_seed(256)
    query = torch.randn(2048, 256, generator=generator, dtype=torch.float64)
    key = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    for factor, fits in ((0.99, True), (1.01, False)):
        spread = wide["bound"] * factor
        product = (query * spread) @ (key * spread).T
        assert bool(torch.isfinite(product.half()).all()) == fits


def test_what_is_looked_into_is_what_the_model_attends_with() -> None:
    torch.manual_seed(0)
    config = {"d_model": 16, "d_ff": 24, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    model = build(ModelConfig.model_validate({**config, "d_k": 5, "d_v": 3}), 30).eval()
    source, target = torch.randint(4, 30, (2, 7)), torch.randint(4, 30, (2, 6))
    maps = model.attention_maps(source, target)
    found = dict(attention_scale._head_vectors(model, lambda: model(source, target)))
    assert set(found) == {
        "encoder.0.attention", "decoder.0.attention", "decoder.0.cross", "decoder.1.attention",
        "decoder.1.cross",
    }  # fmt: skip
    for name, (query, key) in found.items():
        side, layer, module = name.split(".")
        logits = query @ key.transpose(-1, -2) / 5**0.5
        if name.startswith("decoder") and module == "attention":
            logits = logits + causal_mask(6, logits.device)
        weights = maps["cross" if module == "cross" else side][int(layer)]
        torch.testing.assert_close(logits.softmax(-1), weights)


def test_only_dot_products_of_heads_have_a_scale() -> None:
    for settings, told in (
        ({"kind": "lstm"}, "this run is a lstm"),
        ({"attention": "additive"}, "transformer with additive attention"),
    ):
        model = ModelConfig.model_validate(settings)
        loaded = cast("LoadedModel", SimpleNamespace(config=SimpleNamespace(model=model)))
        with pytest.raises(UserError, match=told):
            attention_scale.model_rows(loaded)


def test_every_way_is_measured_and_agrees_with_the_formula(result: dict[str, Any]) -> None:
    ways = {way.name for way in bench.WAYS if not way.gpu}
    assert {row["way"] for row in result["speed"]} == ways
    assert len(result["speed"]) == 2 * 2 * len(ways)
    for row in result["speed"]:
        assert row["forward_s"] > 0
        assert row["training_s"] > 0
        assert row["training_bytes"] > 0
        if row["dtype"] == "fp32" and "formula" not in row["way"]:
            assert row["difference"] < 1e-5
    assert {(row["kind"], row["state"]) for row in result["trained"]} == {
        (kind, state)
        for kind in ("encoder", "decoder", "cross")
        for state in ("initial", "trained")
    }


def test_results_make_tables_plots_and_a_page(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[Path, Sequence[Panel]] = {}

    def draw(file: Path, panels: Sequence[Panel], *, title: str, **_: str) -> None:
        assert title
        drawn[file] = panels

    monkeypatch.setattr(attention_page, "write_charts", draw)
    file, page = tmp_path / "new" / "attention.json", tmp_path / "docs" / "paper" / "a.md"
    write_result(file, result)
    assert bench.read_result(file) == json.loads(json.dumps(result))
    page.parent.mkdir(parents=True)
    names = attention_page.parts(result)
    assert set(names) == set(attention_page.PARTS)
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names))
    done = command("--input", file, "--page", page, "--plots", tmp_path / "plots")
    assert done.exit_code == 0, done.output
    assert "scaled dot, by hand" in done.stdout
    assert "cross, trained, scaled" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert all(part in text for part in names.values())
    assert set(drawn) == {
        folder / f"attention-{name}.svg"
        for folder in (tmp_path / "plots", tmp_path / "docs" / "images" / "paper")
        for name in ("speed", "scale")
    }
    for panels in drawn.values():
        for panel in panels:
            for series in panel.series:
                assert len(series.x) == len(series.y) > 0
                assert all(map(math.isfinite, series.y))
    done = command("--input", file, "--json")
    assert json.loads(done.stdout)["format"] == bench.FORMAT


def test_wrong_input_is_told(tmp_path: Path) -> None:
    other, broken = tmp_path / "other.json", tmp_path / "broken.json"
    empty = tmp_path / "empty.json"
    other.write_text("{}")
    empty.write_text(json.dumps({"format": bench.FORMAT, "speed": []}))
    broken.write_text("{")
    for arguments, told in (
        (("--input", tmp_path / "none.json"), "No such file"),
        (("--input", broken), "this is not JSON"),
        (("--input", other), "no results of attention-bench"),
        (("--input", empty), "'machine' is missing"),
        (("demo", "--input", other), "no RUN, no --quick, no --output"),
        (("nowhere", "--runs", tmp_path), "nowhere"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2
        assert told in done.stderr


def test_what_could_not_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it is measured"))
    file = tmp_path / "file"
    file.write_text("")
    for arguments, told in (
        (("--output", file / "x.json"), "is no folder"),
        (("--plots", file / "plots"), "is no folder"),
        (("--page", tmp_path / "none.md"), "cannot be read"),
        (("--page", file), "no part 'machine'"),
        (("--quick", "--page", file), "no --page"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2, arguments
        assert told in done.stderr


def test_the_page_is_made_of_the_committed_results() -> None:
    page = (REPOSITORY / "docs/paper/attention.md").read_text(encoding="utf-8")
    result = bench.read_result(REPOSITORY / "benchmarks/results/attention.json")
    for name, part in attention_page.parts(result).items():
        assert part.strip() in page, name
