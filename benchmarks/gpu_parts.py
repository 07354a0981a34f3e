"""What gpu.py measures with: batches, a training step with variants, the device's own rates.

It needs torch, numpy and pydantic, and not the rest of the trainer: so that it also runs on a
machine that has a GPU and little else. DeepSpeed, Liger and torchao are measured where they are.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_shards.config import BOS_ID
from data_shards.plan import Plan
from model.build import build
from model.config import ModelConfig
from model.cost import Work, training_flops
from model.layers import FeedForward
from model.loss_liger import liger_projection_loss
from model.packed import with_dropout
from model.transformer import Transformer
from model.vocabulary_matrix import VocabularyMatrix
from trainer.device_batches import DeviceBatches, DeviceStep, Packer, Pass
from trainer.device_step import compiled_call

# Of sentences of WMT 2014 English-German in pieces, about: the mean, and how they scatter.
_MEAN_LENGTH, _SCATTER, _BETWEEN_SIDES = 29.0, 0.55, 0.18
_MAX_LENGTH = 256


@dataclass(frozen=True)
class Scale:
    """How much is measured: a GPU's share, or a rehearsal's."""

    pairs: int
    lanes: int
    tokens_per_step: int
    vocabulary: int
    steps_kept: int
    warmup_steps: int
    repeats: int
    seconds: float
    matrix_sizes: tuple[int, ...]


ON_GPU = Scale(400_000, 8, 25_000, 37_000, 24, 6, 5, 2.0, (2048, 4096, 8192, 16384))
REHEARSAL = Scale(3000, 4, 1024, 100, 3, 1, 2, 0.1, (64, 128))


class Lane(NamedTuple):
    """One lane's padded batch, as the stream has it."""

    source_BS: Tensor  # noqa: N815
    target_in_BT: Tensor  # noqa: N815
    target_out_BT: Tensor  # noqa: N815
    lane: int


class Step(NamedTuple):
    """A step's lanes, and what is in them."""

    step: int
    batches: list[Lane]
    work: Work

    @property
    def tokens(self) -> int:
        """Real ones, source and target."""
        return int(self.work.source + self.work.target)


def make_steps(scale: Scale) -> list[Step]:
    """Steps as the plan makes them, of made-up sentences whose lengths scatter as a corpus' do."""
    random = np.random.default_rng(1)
    mean = np.log(_MEAN_LENGTH) - _SCATTER**2 / 2
    of_pair = random.normal(mean, _SCATTER, scale.pairs)
    sides = of_pair[:, None] + random.normal(0, _BETWEEN_SIDES, (scale.pairs, 2))
    longest = min(_MAX_LENGTH, scale.tokens_per_step // scale.lanes)
    lengths = np.exp(sides).round().clip(2, longest).astype(np.int64)
    plan = Plan(
        lengths,
        [scale.pairs],
        lanes=scale.lanes,
        tokens_per_step=scale.tokens_per_step,
        window_pairs=65_536,
        seed=1,
    )
    steps = []
    for number in range(scale.steps_kept):
        lanes, works = [], []
        for planned in plan.step(number):
            of_batch = lengths[planned.pair_ids]
            lanes.append(_lane(random, of_batch, planned.lane, scale.vocabulary))
            works.append(Work.of(of_batch[:, 0].tolist(), of_batch[:, 1].tolist()))
        names = ("source", "target", "source_source", "source_target", "target_target")
        sums = {name: sum(getattr(work, name) for work in works) for name in names}
        steps.append(Step(number, lanes, Work(**sums)))
    return steps


def _lane(random: np.random.Generator, lengths: Any, lane: int, vocabulary: int) -> Lane:
    def side(column: int) -> Tensor:
        ids = random.integers(4, vocabulary, (len(lengths), int(lengths[:, column].max())))
        ids[np.arange(ids.shape[1]) >= lengths[:, column][:, None]] = 0
        return torch.from_numpy(ids)

    source, target = side(0), side(1)
    target_in = target.roll(1, 1)
    target_in[:, 0] = BOS_ID
    target_in[target == 0] = 0
    return Lane(source, target_in, target, lane)


@dataclass(frozen=True)
class Variant:
    """A way to compute a step."""

    name: str
    packer: Packer
    compiled: bool = False
    loss: str = "own"
    fp8: bool = False
    engine: bool = False
    needs: str | None = None  # a package

    @property
    def missing(self) -> str | None:
        """The package that it needs and that is not installed."""
        absent = self.needs is not None and importlib.util.find_spec(self.needs) is None
        return self.needs if absent else None


def variants(lanes: int, *, compiled: bool, fp8: bool) -> list[Variant]:
    """What is compared, from the plainest to the most."""
    joined = Packer(lanes)
    found = [
        Variant("padded, lane by lane", Packer(None)),
        Variant("packed, lane by lane", Packer(1)),
        Variant("packed together", joined),
        Variant("packed together, liger", joined, loss="liger", needs="liger_kernel"),
        Variant("packed together, DeepSpeed", joined, engine=True, needs="deepspeed"),
    ]
    if compiled:
        bucketed = Packer(lanes, bucketed=True)
        found.append(Variant("packed together, compiled", bucketed, compiled=True))
        found.append(
            Variant(
                "packed together, compiled, liger",
                bucketed,
                compiled=True,
                loss="liger",
                needs="liger_kernel",
            )
        )
        if fp8:
            found.append(
                Variant(
                    "packed together, compiled, fp8",
                    bucketed,
                    compiled=True,
                    fp8=True,
                    needs="torchao",
                )
            )
    return found


class Training:
    """A model that is trained in a variant's way, in bf16 with float32 masters."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, variant: Variant, device: torch.device
    ) -> None:
        self.config, self.variant, self.device = config, variant, device
        torch.manual_seed(1)
        with device:
            model = build(config, vocabulary)
        assert isinstance(model, Transformer)
        self.model = model.train()
        if variant.loss == "liger":
            for module in model.modules():
                if isinstance(module, VocabularyMatrix):
                    module.projection_loss = liger_projection_loss
        if variant.compiled:
            model.call_layer = compiled_call()
        if variant.fp8:
            _to_fp8(model)
        self._update: Callable[[int], None]
        self._call: Callable[..., Any]
        self._backward: Callable[[Tensor, int], None]
        if variant.engine:
            self._with_engine()
        else:
            self._alone()

    def _alone(self) -> None:
        self.model.bfloat16()
        weights = list(self.model.parameters())
        masters = [nn.Parameter(weight.detach().float()) for weight in weights]
        adam = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.98), weight_decay=0, fused=True)
        for master in masters:
            master.grad = torch.zeros_like(master)

        def update(_: int) -> None:
            torch._foreach_copy_([m.grad for m in masters], [w.grad for w in weights])
            nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
            adam.step()
            torch._foreach_copy_([w.detach() for w in weights], [m.detach() for m in masters])
            for weight in weights:
                weight.grad = None

        self._call, self._update = self.model, update
        self._backward = lambda loss, targets: (loss / targets).backward()

    def _with_engine(self) -> None:
        from trainer.config import TrainerConfig
        from trainer.engine import Engine

        engine = Engine(
            self.model,
            TrainerConfig(precision="bf16", zero_stage=1),
            world_size=1,
            device=self.device,
        )
        engine.train()
        self._call = engine
        self._update = lambda _: (engine.step(1e-4), None)[1]
        self._backward = lambda loss, targets: engine.backward(loss, target_tokens=targets)

    def step(self, ready: DeviceStep, targets: int) -> float:
        """One update; the loss, for which the host waits as the trainer does."""
        total = torch.zeros((), device=self.device)
        for one in ready.passes:
            loss = self._loss(one, ready.step)
            self._backward(loss, targets)
            total += loss.detach()
        value = float(total) / targets
        self._update(ready.step)
        return value

    def _loss(self, one: Pass, step: int) -> Tensor:
        seeds = [step * 4096 + lane for lane in one.lanes]
        torch.manual_seed(seeds[0])
        if one.packing is None:
            return self._call(*one.ids, 0.1)[0]
        packing = with_dropout(one.packing, self.config, one.lane_tokens, seeds)
        return self._call(*one.ids, 0.1, packing)[0]


def _to_fp8(model: nn.Module) -> None:
    from torchao.float8 import convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        shape = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
        return bool(shape) and all(size % 16 == 0 for size in shape)

    convert_to_float8_training(model, module_filter_fn=fits)
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.inner = _Rectified(module.inner)  # type: ignore[assignment]


class _Rectified(nn.Module):
    """Any linear layer, called as ``model.linear.Linear`` is."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor, *, relu: bool = False) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return torch.relu_(outputs) if relu else outputs


@dataclass
class Measured:
    """Of one variant on one model; rates are of real tokens, source and target."""

    variant: str
    step_s: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    flops_per_s: float = 0.0
    peak_bytes: int | None = None
    padding_efficiency: float = 0.0
    waiting_for_batches: float = 0.0
    first_step_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    failed: str | None = None


def measure(
    training: Training, steps: Sequence[Step], scale: Scale, device: torch.device
) -> Measured:
    """Steps of a variant after a warm-up, in repeats of some seconds each."""
    found = Measured(training.variant.name)
    reset_peak(device)
    stream = (step._replace(step=number) for number, step in enumerate(itertools.cycle(steps)))
    with DeviceBatches(stream, training.variant.packer, device) as ready:  # type: ignore[arg-type]
        by_number = itertools.cycle(steps)

        def one() -> tuple[Step, DeviceStep, float]:
            began = time.perf_counter()
            step, brought = next(by_number), next(ready)
            waited_s = time.perf_counter() - began
            found.losses.append(training.step(brought, int(step.work.target)))
            return step, brought, waited_s

        began = time.perf_counter()
        one()
        synchronise(device)
        found.first_step_s = time.perf_counter() - began
        for _ in range(scale.warmup_steps):
            one()
        tokens = flops = computed = num = 0.0
        waiting_s = all_s = 0.0
        for _ in range(scale.repeats):
            synchronise(device)
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < scale.seconds:
                step, brought, waited_s = one()
                waiting_s += waited_s
                tokens += step.tokens
                computed += sum(part.computed_tokens for part in brought.passes)
                flops += training_flops(
                    training.config, step.work, vocab_size=training.model.vocab_size
                )
                count += 1
            synchronise(device)
            took_s = time.perf_counter() - began
            found.step_s.append(took_s / count)
            all_s += took_s
            num += count
    found.tokens_per_s, found.flops_per_s = tokens / all_s, flops / all_s
    found.padding_efficiency = tokens / computed
    found.waiting_for_batches = waiting_s / all_s
    found.peak_bytes = peak_bytes(device)
    found.losses = found.losses[: scale.steps_kept]
    return found


def brought(steps: Sequence[Step], packer: Packer, device: torch.device) -> Iterator[DeviceStep]:
    """Some steps on the device, without a thread."""
    for step in steps:
        passes = packer.passes(step.batches, lambda tensor: tensor.to(device))  # type: ignore[arg-type]
        yield DeviceStep(step.step, [], passes)


def matrix_rates(
    shapes: Sequence[tuple[int, int, int]], device: torch.device, *, seconds: float
) -> dict[str, float]:
    """Operations a second of bf16 products [m, k] x [k, n], on random numbers; median of runs."""
    rates = {}
    for m, k, n in shapes:
        a = torch.randn((m, k), device=device, dtype=torch.bfloat16)
        b = torch.randn((k, n), device=device, dtype=torch.bfloat16)
        out = torch.empty((m, n), device=device, dtype=torch.bfloat16)
        for _ in range(3):
            torch.mm(a, b, out=out)
        took_s = []
        until = time.perf_counter() + seconds
        while not took_s or (time.perf_counter() < until and len(took_s) < 200):
            synchronise(device)
            began = time.perf_counter()
            for _ in range(10):
                torch.mm(a, b, out=out)
            synchronise(device)
            took_s.append((time.perf_counter() - began) / 10)
        rates[f"{m}x{k}x{n}"] = 2.0 * m * k * n / float(np.median(took_s))
    return rates


def model_products(config: ModelConfig, tokens: int, vocabulary: int) -> dict[str, Any]:
    """The products of a forward pass over so many tokens a side: name to (m, k, n) and number."""
    d, f = config.d_model, config.d_ff
    sides = config.encoder_layers + config.decoder_layers
    return {
        "query, key, value": ((tokens, d, 3 * d), sides),
        "cross key, value": ((tokens, d, 2 * d), config.decoder_layers),
        "output, cross query": ((tokens, d, d), sides + 2 * config.decoder_layers),
        "feed-forward in": ((tokens, d, f), sides),
        "feed-forward out": ((tokens, f, d), sides),
        "vocabulary": ((tokens, d, vocabulary), 1),
    }


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget how much memory was in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory in use at a time since then; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
