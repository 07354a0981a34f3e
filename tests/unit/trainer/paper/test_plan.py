"""The dry run: each number against another way to it, and every figure that is missing told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cluster.commands.plan import plan as plan_command
from data_shards.errors import UserError
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from data_shards.shards import prepare
from model import cost
from model.build import build
from model.config import ModelConfig
from model.cost import Work, training_flops
from trainer.config import RunConfig, TrainerConfig, load_config, parse_config
from trainer.paper.hardware import (
    DEVICES,
    UTILISATION,
    make_hardware,
    rate_of,
    split_hardware,
)
from trainer.paper.lengths import CorpusSize, corpus_size, made_up_lengths
from trainer.paper.memory import activation_bytes, checkpoint_bytes, memory, tokens_in_a_pass
from trainer.paper.plan import Dry, reckon
from trainer.paper.plan_text import lines, numbers

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


def dry_run(name: str, hardware: str = "8xP100", *settings: str) -> Dry:
    config = load_config(CONFIGS / f"{name}.yaml", settings)
    corpus = corpus_size(config.data, prepared=False)
    return reckon(config, make_hardware(*split_hardware(hardware)), corpus)


def planned(tmp_path: Path, words: str, name: str = "wmt14-en-de-base") -> Result:
    """What the command does where nothing is prepared."""
    arguments = f"--config {CONFIGS / name}.yaml --set data.root={tmp_path} {words}"
    return CliRunner().invoke(plan_command, arguments.split())


@pytest.fixture(scope="module")
def base() -> Dry:
    return dry_run("wmt14-en-de-base")


@pytest.fixture(scope="module")
def big() -> Dry:
    return dry_run("wmt14-en-de-big", "8xH100")


@pytest.mark.parametrize("size", ["base", "big"])
@pytest.mark.parametrize("target", ["de", "fr"])
def test_the_recipe_is_the_papers(size: str, target: str) -> None:
    config = load_config(CONFIGS / f"wmt14-en-{target}-{size}.yaml")
    model, data, trainer, search = config.model, config.data, config.trainer, config.evaluation
    is_big = size == "big"
    assert (model.d_model, model.d_ff, model.num_heads) == (
        (1024, 4096, 16) if is_big else (512, 2048, 8)
    )
    assert (model.encoder_layers, model.decoder_layers, model.norm) == (6, 6, "post")
    assert model.dropout == (0.3 if is_big and target == "de" else 0.1)
    assert (data.corpus, data.source, data.target) == (f"wmt14-en-{target}", "en", target)
    assert data.vocabulary_size == (37_000 if target == "de" else 32_000)
    assert trainer.max_steps == (300_000 if is_big else 100_000)
    assert (trainer.warmup_steps, trainer.peak_learning_rate) == (4000, None)
    assert (trainer.adam_beta1, trainer.adam_beta2, trainer.adam_epsilon) == (0.9, 0.98, 1e-9)
    assert (trainer.label_smoothing, trainer.clip_norm, trainer.weight_decay) == (0.1, 0, 0)
    assert trainer.decay_fraction == 0
    # Ten minutes of the paper's steps, 0.4 and 1.0 s.
    assert trainer.checkpoint_every * (1.0 if is_big else 0.4) == 600
    assert trainer.keep_checkpoints == (20 if is_big else 5)
    assert (search.beam, search.length_penalty, search.max_extra_length) == (4, 0.6, 50)


def test_a_step_has_the_papers_tokens(base: Dry) -> None:
    assert base.batches.target_tokens == pytest.approx(25_000, rel=0.01)
    assert base.batches.source_tokens == pytest.approx(25_000, rel=0.05)
    assert base.batches.epochs == pytest.approx(
        100_000 * base.batches.target_tokens / 137_628_246, rel=0.01
    )


def test_other_lengths_leave_other_tokens_of_the_same_bound() -> None:
    # As docs/paper/recipe.md and table2.md say.
    batches = dry_run("wmt14-en-fr-base").batches
    assert f"{batches.source_tokens:,.0f} + {batches.target_tokens:,.0f}" == "22,107 + 26,047"


def test_operations_and_hours_follow_by_hand(base: Dry) -> None:
    mean = base.corpus.mean_work
    whole = Work(*(value * base.batches.pairs_per_step for value in vars(mean).values()))
    flops = training_flops(base.config.model, whole, vocab_size=37_000)
    assert base.flops == pytest.approx(flops * 100_000)
    compute = flops / (8 * 9.5e12 * UTILISATION)
    assert base.times.compute == pytest.approx(compute)
    assert base.times.hours == pytest.approx((compute + base.times.optimizer) * 100_000 / 3600)
    # The paper: 12 hours, of which steps of 0.4 s are 11.1.
    assert 9 < base.times.hours < 12.5


def test_uneven_lanes_wait_for_the_fullest_device(base: Dry) -> None:
    three = dry_run("wmt14-en-de-base", "3xP100")
    assert three.times.compute == pytest.approx(base.times.compute * 3)
    assert any("share out evenly" in note for note in three.notes)


def test_reductions_are_reckoned_where_the_bus_is_known(big: Dry) -> None:
    # ZeRO 1: three times 7/8 of two bytes a parameter over 476 GB/s (docs/scaling.md: 2.4 ms).
    assert big.times.reduction == pytest.approx(2.36e-3, rel=0.01)
    assert dry_run("wmt14-en-de-big", "1xH100").times.reduction == 0
    more = dry_run("wmt14-en-de-big", "16xH100", "data.lanes=16", "data.window_pairs=4096")
    assert more.times.reduction is None
    assert any("between machines" in note for note in more.notes)


def test_time_bounds_a_run_that_has_no_steps() -> None:
    config = load_config(
        CONFIGS / "wmt14-en-de-base.yaml", ["trainer.max_steps=null", "trainer.max_minutes=30"]
    )
    corpus = corpus_size(config.data, prepared=False)
    timed = reckon(config, make_hardware(8, "H100"), corpus)
    assert timed.times.hours == pytest.approx(0.5)
    assert timed.times.num_steps == pytest.approx(1800 / timed.times.step)


def test_a_prepared_corpus_is_counted(tmp_path: Path) -> None:
    files = {}
    for side, word in (("source", "cat"), ("target", "Katze")):
        files[side] = str(tmp_path / side)
        text = "".join(f"{n} {word} {'abcdefgh'[n % 8] * (n % 7)} {n * n}\n" for n in range(400))
        Path(files[side]).write_text(text)
    config = RunConfig.model_validate(
        {
            "model": {"preset": "tiny"},
            "data": {
                "corpus": "files", "root": tmp_path, **files, "heldout_pairs": 10,
                "vocabulary_size": 60, "max_length": 64, "lanes": 2, "tokens_per_step": 1024,
            },
            "trainer": {"max_steps": 40},
        }
    )  # fmt: skip
    with pytest.raises(UserError, match=r"is not prepared at .*data prepare"):
        corpus_size(config.data)
    manifest = Manifest.load(prepare(config.data, progress=lambda line: None))
    dry = reckon(config, make_hardware(2, "L4"), corpus_size(config.data), price=1.5)
    plan = Plan.of(manifest, config.data, config.trainer.seed)
    assert dry.batches.steps_per_epoch == plan.steps_per_epoch
    assert dry.batches.epochs == 40 / plan.steps_per_epoch
    assert dry.batches.target_tokens == pytest.approx(
        manifest.data.target_tokens / plan.steps_per_epoch
    )
    assert dry.num_parameters == sum(
        p.numel() for p in build(config.model, manifest.vocabulary_size).parameters()
    )
    assert dry.times.price == pytest.approx(2 * 1.5 * dry.times.hours)
    assert not any("not prepared" in note for note in dry.notes)


def test_made_up_lengths_have_the_means() -> None:
    lengths = made_up_lengths(100_000, 29.5, 38.2, 128)
    assert lengths.mean(axis=0) == pytest.approx([29.5, 38.2], rel=0.005)
    assert lengths.min() >= 2
    assert lengths.max() == 128


def test_means_of_pairs_are_those_of_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.paper.lengths._CHUNK_PAIRS", 300)
    lengths = made_up_lengths(1024, 20, 22, 128)
    work = CorpusSize(False, "", lengths, np.array([1024]), 1024, 100).mean_work
    s, t = lengths.astype(float).T
    expected = [s, t, s * s, s * t, t * t]
    assert list(vars(work).values()) == [pytest.approx(value.mean()) for value in expected]


def kept_bytes(config: ModelConfig, dtype: torch.dtype, vocab: int, length: int) -> float:
    """What autograd keeps of a pair of tokens, but for the softmax' gradient."""
    model = build(config, vocab).to(dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    source = torch.randint(4, vocab, (4, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model.training_loss(source, source, source, 0.1)
    del loss
    return (sum(kept.values()) - 4 * vocab * config.d_model) / (4 * length)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
@pytest.mark.parametrize("shape", [(64, 256, 1, 2), (128, 256, 3, 1)])
def test_the_formula_of_activations_is_the_models(
    precision: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    d_model, d_ff, encoder, decoder = shape
    config = ModelConfig(
        preset="base", d_model=d_model, d_ff=d_ff, num_heads=4,
        encoder_layers=encoder, decoder_layers=decoder,
    )  # fmt: skip
    length = 16
    kept = kept_bytes(config, dtype, vocab=64, length=length)
    formula = activation_bytes(config, precision, 1)
    assert formula is not None
    # Attention that is not fused keeps its weights, and a mask, but not what it gives.
    attentions = encoder + 2 * decoder
    unfused, given = attentions * 4 * length * dtype.itemsize, attentions * d_model * dtype.itemsize
    assert 0.95 * (formula - given) < kept < 1.1 * (formula + unfused)


def test_stages_share_out_what_they_say() -> None:
    model, trainer = ModelConfig(preset="base"), TrainerConfig(precision="bf16")
    of = [
        memory(
            model, trainer, stage=stage, num_parameters=80, num_devices=8,
            vocab_size=1000, tokens_per_lane=100,
        )
        for stage in range(4)
    ]  # fmt: skip
    assert [(m.weights, m.gradients, m.optimizer) for m in of] == [
        (160, 160, 960), (160, 160, 120), (160, 20, 120), (20, 20, 120),
    ]  # fmt: skip
    assert of[0].activations == of[3].activations
    alone = memory(
        model, TrainerConfig(precision="fp32"), stage=0, num_parameters=80, num_devices=8,
        vocab_size=1000, tokens_per_lane=100,
    )  # fmt: skip
    assert (alone.weights, alone.gradients, alone.optimizer) == (320, 320, 640)
    assert alone.buffers == 2 * 80 * 4
    assert [m.buffers for m in of] == [320, 320, 480, 320]
    single = memory(
        model, TrainerConfig(precision="fp32"), stage=0, num_parameters=80, num_devices=1,
        vocab_size=1000, tokens_per_lane=100,
    )  # fmt: skip
    # (As stage 1: masters besides the weights, and the gradient once more.)
    assert (single.optimizer, single.buffers) == (960, 320)
    assert checkpoint_bytes(TrainerConfig(ema_decay=0.99), 10) == 160


@pytest.mark.parametrize(("precision", "bytes_a_logit"), [("fp32", 12), ("bf16", 12)])
def test_the_loss_has_its_logits_four_times_over_in_half_precision(
    precision: str, bytes_a_logit: int
) -> None:
    # In bf16 two matrices, and two of float32 while logsumexp runs; in fp32 two and one.
    trainer = TrainerConfig.model_validate({"precision": precision})
    vocab, tokens, model = 1000, 100.0, ModelConfig(preset="base")
    of = memory(
        model, trainer, stage=0, num_parameters=80, num_devices=1,
        vocab_size=vocab, tokens_per_lane=tokens,
    )  # fmt: skip
    kept = activation_bytes(model, precision, tokens)
    assert kept is not None
    assert of.activations == kept + tokens * vocab * bytes_a_logit + 4 * vocab * 512


def test_a_device_without_the_precision_is_reckoned_in_its_own_throughout(base: Dry) -> None:
    assert base.config.trainer.precision == "bf16"
    single = dry_run("wmt14-en-de-base", "8xP100", "trainer.precision=fp32")
    assert base.memory == single.memory
    assert base.times == single.times
    assert "of one P100 with 16 GB, in fp32" in "\n".join(lines(base))


@pytest.mark.parametrize("name", cost._PEAK_FLOPS)
def test_every_device_with_a_peak_has_a_data_sheet(name: str) -> None:
    found = [device for key, device in DEVICES.items() if key.partition("-")[0] == name]
    assert found
    for device in found:
        assert device.memory_gb_s is not None
        assert rate_of(device, "fp16").flops == cost.peak_flops(name, "fp16")


@pytest.mark.parametrize(
    ("memory_gb", "stage", "verdict"),
    [
        (80, 1, "fits"),
        # In bf16 the activations of a lane are 3.3 GB, the rest by stage 3.6, 1.4, 1.0 and 0.6.
        (5.4, 0, "does not fit; trainer.zero_stage=1 does"),
        (5.0, 1, "does not fit; trainer.zero_stage=2 does"),
        (2.0, 1, "does not fit, nor does any stage for its activations: raise data.lanes"),
        (
            2.0,
            0,
            "does not fit, nor does any stage for its activations: set trainer.zero_stage=1 and "
            "raise data.lanes",
        ),
        (0.5, 1, "does not fit, nor does any stage: take more devices, or such with more memory"),
    ],
)
def test_what_does_not_fit_is_told_what_would(
    big: Dry, memory_gb: float, stage: int, verdict: str
) -> None:
    dry = replace(
        big,
        config=load_config(CONFIGS / "wmt14-en-de-big.yaml", [f"trainer.zero_stage={stage}"]),
        hardware=make_hardware(8, "H100", memory_gb=memory_gb),
    )
    text = " ".join(" ".join(lines(dry)).split())
    assert f"* trainer.zero_stage={stage}: {verdict} hardware" in text, dry.memory


@pytest.mark.parametrize("kind", ["lstm", "convolutional"])
def test_another_kind_has_no_hours_unless_its_speed_is_given(kind: str) -> None:
    settings = "model.preset=base", f"model.kind={kind}"
    dry = dry_run("wmt14-en-de-base", "8xH100", *settings)
    assert all(row.total is None for row in dry.memory)
    assert any(f"not reckoned for kind {kind}" in note for note in dry.notes)
    assert any("Give --utilisation SHARE or --sustained" in note for note in dry.notes)
    t = dry.times
    assert (t.compute, t.launch, t.step, t.hours, t.device_hours, t.price) == (None,) * 6
    text = "\n".join(lines(dry))
    assert "–" in text
    assert "a step       not known: optimizer" in text
    assert "of training" not in text
    assert "a share of 9.89·10¹⁴" in text
    assert json.loads(json.dumps(numbers(dry)))["times"]["hours"] is None

    config = load_config(CONFIGS / "wmt14-en-de-base.yaml", settings)
    hardware, corpus = make_hardware(8, "H100"), corpus_size(config.data, prepared=False)
    given = reckon(config, hardware, corpus, utilisation=0.1, price=2.0)
    assert given.times.compute == pytest.approx(dry.flops_per_step / 8 / 98.9e12)
    assert given.times.launch is None
    assert given.times.price is not None
    notes = " ".join(given.notes)
    assert "starting of kernels is not in the time" in notes
    assert ("wait of each position" in notes) == (kind == "lstm")


def test_time_bounds_no_run_whose_speed_is_not_known() -> None:
    settings = ["model.preset=base", "model.kind=lstm", "trainer.max_minutes=30"]
    dry = dry_run("wmt14-en-de-base", "8xH100", *settings)
    assert dry.times.num_steps == 100_000
    assert any("trainer.max_minutes ends the run before" in note for note in dry.notes)
    with pytest.raises(UserError, match=r"set trainer\.max_steps, or give --utilisation"):
        dry_run("wmt14-en-de-base", "8xH100", *settings, "trainer.max_steps=null")


def test_the_lines_and_the_values_are_the_same_plan(base: Dry) -> None:
    text = "\n".join(lines(base))
    assert "4,500,966 pairs" in text
    assert f"{base.num_parameters:,} parameters" in text
    assert "it has no bf16" in text
    found = json.loads(json.dumps(numbers(base)))
    assert found["hardware"]["devices"] == 8
    assert found["corpus"]["is_prepared"] is False
    assert found["times"]["step"] == base.times.step
    assert found["memory"][1]["total"] == base.memory[1].total


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hardware 8P100", "write number and kind"),
        ("--hardware 8xP10", "did you mean P100?"),
        ("--hardware 8xTPU", "no data sheet of 'TPU'"),
        ("--hardware 0xP100", "at least 1"),
        ("", "say what to reckon for"),
        ("--hardware 8xP100 --gpus 2", "not both"),
        ("--hardware 9xP100", "Set data.lanes=9"),
        ("--gpus 8 --gpu P100 --utilisation 2", "a share of the peak"),
        ("--gpu P100 --price -1", "price of a device-hour"),
        ("--gpu P100 --sustained 0", "operations a second"),
        ("--gpu P100 --sustained 1 --utilisation 0.5", "leave --utilisation out"),
        ("--gpu P100 --memory -1", "--memory -1: give the memory"),
        ("--gpu P100 --memory inf", "--memory inf: give the memory"),
        ("--gpu X9 --memory 10", "no peak rate of X9 is known: give --sustained"),
        ("--gpu P100 --pairs 5000", "give all three"),
        ("--gpu P100 --pairs 50 --source-length 9 --target-length 9", "at least 1024"),
        ("--gpu P100 --pairs 5000 --source-length 900 --target-length 9", "--source-length 900"),
        ("--gpu P100 --set data.target=fr", "no figures of it"),
        ("--gpu P100 --set data.corpus=multi30k", "multi30k .* is not prepared"),
    ],
)
def test_what_cannot_be_planned_is_said(tmp_path: Path, words: str, message: str) -> None:
    result = planned(tmp_path, words)
    assert isinstance(result.exception, UserError)
    assert re.search(message, str(result.exception))


def test_the_user_may_bring_device_and_corpus(tmp_path: Path) -> None:
    words = (
        "--set data.corpus=files --hardware 4xX9 --memory 10 --sustained 2 --json "
        "--pairs 50000 --source-length 20 --target-length 22"
    )
    found = json.loads(planned(tmp_path, words).output)
    assert found["hardware"]["flops"] == 2e12
    assert found["hardware"]["memory_gb"] == 10
    assert found["corpus"]["num_pairs"] == 50_000
    assert found["times"]["compute"] == pytest.approx(found["flops_per_step"] / 4 / 2e12)


def test_given_memory_comes_before_the_data_sheets() -> None:
    assert make_hardware(8, "h100", memory_gb=94).device.memory_gb == 94
    assert make_hardware(8, "h100").device.memory_gb == 80


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys, trainer.paper.plan_text, trainer.paper.lengths; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_plans_in_docs_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Where nothing is prepared: the pages name configurations by a relative path, and so is data/.
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    page = (CONFIGS.parent / "docs" / "paper" / "recipe.md").read_text()
    part = page.partition("<!-- plans: begin -->")[2].partition("<!-- plans: end -->")[0]
    shown = re.findall(r"```console\n\$ babelray plan ([^\n]*)\n(.*?)```", part, re.DOTALL)
    assert len(shown) >= 3
    for words, output in shown:
        assert CliRunner().invoke(plan_command, words.split()).output == output


def test_lanes_that_are_packed_together_are_in_memory_together() -> None:
    def tokens(devices: int, **trainer: Any) -> int:
        data = {"tokens_per_step": 24_000, "lanes": 8}
        values = {"model": {"preset": "base"}, "data": data, "trainer": trainer}
        return tokens_in_a_pass(parse_config(values, where="test"), devices)

    assert [tokens(n, precision="bf16") for n in (1, 3, 8, 16)] == [24_000, 9000, 3000, 3000]
    assert tokens(1, precision="bf16", tokens_per_pass=7000) == 6000
    assert tokens(1, precision="bf16", batches="padded") == 3000
    assert tokens(1) == 3000
