"""The model behind scaling.py and docs/scaling.md: formulas that can be followed by hand.

Nothing here was run on a GPU. The parts that come from this code are measured by scaling_parts.py,
what hardware and others' programs do is published (scaling_data.py), and one published rate sets
the one free number, the share of the peak that matrix products reach.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from common import RESULTS
from scaling_data import (
    GPU_MTBF_H,
    GPUS,
    HOP_S,
    NETWORK_EFFICIENCY,
    PAPER_P100_FLOPS,
    PAPER_STEP_S,
    PAPER_TARGET_TOKENS,
    PAPER_VOCABULARY,
    PUBLISHED,
    Gpu,
    Published,
)

from model.config import ModelConfig
from model.cost import Work, peak_flops, training_flops

MAX_LENGTH = 256  # data.max_length: a lane must hold the longest pair
BUCKET_ELEMENTS = 50_000_000  # trainer/engine.py
OPTIMIZER_BYTES = 32  # a parameter: master, two moments read and written, gradient, bf16 weight
LOGITS_ELEMENTS = 1 << 27  # model/loss.py: at a time on a GPU
LOGIT_BYTES = 12  # logits and softmax in half precision, and two in float32 while logsumexp runs
CHECKPOINT_BYTES = 12  # a parameter: master and two moments in float32
START_S = 20.0  # command to first step (benchmarks/README.md)
RECOVERY_S = 6.6  # death of a rank to the next step (benchmarks/README.md)


@dataclass(frozen=True)
class Job:
    """A training: steps of so many source and as many target tokens, padding included."""

    name: str
    model: str
    tokens_per_step: int
    steps: int
    vocabulary: int = PAPER_VOCABULARY


JOBS = (
    Job("base, the paper's", "base", 25_000, 100_000),
    Job("big, the paper's", "big", 25_000, 300_000),
    # 3,584 x 128 tokens, max_update=30000: fairseq's issue 506 (WMT18).
    Job("base, large batches", "base", 400_000, 30_000),
    Job("big, large batches", "big", 400_000, 30_000),
    # 5,120 x 128 tokens, 80,000 updates: fairseq's issues 233 and 361.
    Job("big, en-fr, large batches", "big", 655_360, 80_000, 32_000),
)


@dataclass(frozen=True)
class Cluster:
    """GPUs in full nodes; ``network_gb`` is Gb/s of a node, all its adapters together."""

    gpu: Gpu
    gpus: int
    network_gb: float
    gpus_per_node: int = 8
    network_efficiency: float = NETWORK_EFFICIENCY

    @property
    def nodes(self) -> int:
        """A last one may not be full."""
        return math.ceil(self.gpus / self.gpus_per_node)

    def bus_gb_s(self) -> float:
        """What an all-reduce moves: the slower of NVLink and, between nodes, the adapters."""
        if self.nodes == 1:
            return self.gpu.bus_gb_s
        return min(self.gpu.bus_gb_s, self.network_gb / 8 * self.network_efficiency)

    def message_s(self) -> float:
        """Latency of one collective: up and down a tree over the nodes."""
        return 0.0 if self.gpus == 1 else HOP_S * (1 + math.log2(self.nodes))


@cache
def parts() -> dict[str, Any]:
    """What scaling_parts.py measured."""
    found: dict[str, Any] = json.loads((RESULTS / "scaling_parts.json").read_text())
    return found


@cache
def stream_tokens_per_s() -> float:
    """Source and target tokens a second that one rank's stream makes, in the slowest case."""
    cases = json.loads((RESULTS / "stream.json").read_text())["stream"]
    return float(min(case["tokens_per_s"] for case in cases))


def num_parameters(model: str, vocabulary: int) -> int:
    """Of a preset with tied embeddings and post-norm; a test holds it against the built model."""
    config = ModelConfig(preset=model)
    d, f = config.d_model, config.d_ff
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * f + d + f, 2 * d
    encoder = config.encoder_layers * (attention + feed_forward + 2 * norm)
    decoder = config.decoder_layers * (2 * attention + feed_forward + 3 * norm)
    return vocabulary * d + encoder + decoder


def flops_per_target_token(model: str, vocabulary: int) -> float:
    """Forward and backward, the source side included, padding not; lengths of the corpus."""
    pair = parts()["corpus"]
    config = ModelConfig(preset=model)
    return training_flops(config, Work(**pair), vocab_size=vocabulary) / float(pair["target"])


def optimizer_s(parameters: float, gpu: Gpu) -> float:
    """Adam is bound by memory."""
    return parameters * OPTIMIZER_BYTES / (gpu.memory_gb_s * 1e9)


@cache
def efficiency() -> float:
    """Share of the peak that products reach: from the one published rate that calibrates."""
    (one,) = (result for result in PUBLISHED if result.calibrates)
    gpu = GPUS[one.gpu]
    peak = peak_flops(gpu.peak, gpu.precision)
    assert peak is not None
    products_s = one.step_s - optimizer_s(num_parameters(one.model, one.vocabulary), gpu)
    flops = one.target_tokens * flops_per_target_token(one.model, one.vocabulary)
    return flops / products_s / peak


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they go into; nothing overlaps unless asked."""

    compute: float
    launch: float
    optimizer: float
    bandwidth: float
    latency: float
    stream: float = 0.0

    def seconds(self, *, overlap: bool = False) -> float:
        """``overlap``: reductions run beside the backward pass, two thirds of the computing."""
        busy = max(self.compute, self.launch, self.stream)
        communication = self.bandwidth + self.latency
        hidden = min(communication, busy * 2 / 3) if overlap else 0.0
        return busy + self.optimizer + communication - hidden

    def bound(self, cluster: Cluster) -> str:
        """The largest part."""
        names = {
            "compute": self.compute,
            "CPU launches": self.launch,
            "optimizer": self.optimizer,
            "NVLink" if cluster.nodes == 1 else "network bandwidth": self.bandwidth,
            "latency": self.latency,
            "input stream": self.stream,
        }
        return max(names, key=lambda name: names[name])


def sent_bytes(
    parameters: float,
    ranks: int,
    *,
    stage: int,
    lanes: int = 1,
    size: int = 2,
    gradient_size: int | None = None,
) -> float:
    """What a rank sends at a step, and receives.

    DeepSpeed 0.19 reduces by all-reduce at stages 0 to 2 alike (reduce_scatter with
    use_multi_rank_bucket_allreduce), 1 and 2 gather the weights on top, 2 and 3 reduce after every
    lane, 3 gathers the weights for each forward and each backward pass.

    Args:
        lanes: of a rank.
        size: bytes of a weight.
        gradient_size: bytes of a gradient on its way (trainer.gradient_dtype); default ``size``.
    """
    gradient = size if gradient_size is None else gradient_size
    passes: dict[int, int] = {
        0: 2 * gradient,
        1: 2 * gradient + size,
        2: 2 * gradient * lanes + size,
        3: (gradient + 2 * size) * lanes,
    }
    return (ranks - 1) / ranks * parameters * float(passes[stage])


def num_messages(parameters: float, *, stage: int, lanes: int = 1) -> int:
    """Collectives of a step: buckets, the gathering, the step's own sum, the norm, overflow."""
    buckets = math.ceil(parameters / BUCKET_ELEMENTS)
    reductions = buckets * (lanes if stage >= 2 else 1)
    gathers = {0: 0, 1: buckets, 2: buckets, 3: 2 * buckets * lanes}[stage]
    return reductions + gathers + 3


def balance(ranks: int, tokens_per_lane: float) -> dict[str, float]:
    """The measured row of the plan that is nearest, in powers of two."""
    rows: list[dict[str, float]] = parts()["balance_en_de"]

    def distance(row: dict[str, float]) -> float:
        lanes, tokens = row["lanes"] / ranks, row["tokens_per_lane"] / tokens_per_lane
        return abs(math.log2(lanes)) + abs(math.log2(tokens))

    return min(rows, key=distance)


def memory_gb(model: str, parameters: float, ranks: int, tokens: float, stage: int) -> float:
    """Of a rank: weights and gradients in half precision, Adam's state, what backward needs."""
    state = CHECKPOINT_BYTES / (ranks if stage else 1)
    kept = parts()["kept_bytes_per_token"][model] * tokens + parts()["kept_bytes_once"][model]
    logits = min(tokens * PAPER_VOCABULARY, LOGITS_ELEMENTS) * LOGIT_BYTES
    return (parameters * (4 + state) + kept + logits + 4 * BUCKET_ELEMENTS) / 1e9


@dataclass(frozen=True)
class Row:
    """What a job is reckoned to take on a cluster; seconds of a step, and of all."""

    job: str
    gpu: str
    gpus: int
    network_gb: float
    stage: int
    lanes_per_rank: int
    tokens_per_lane: int
    bound: str
    step_s: float
    overlapped_step_s: float
    target_tokens_per_s: float
    hours: float
    gpu_hours: float
    node_gb_per_step: float
    imbalance: float
    parts: dict[str, float]


def reckon(job: Job, cluster: Cluster, *, stage: int = 1) -> Row | str:
    """The row, or why there is none."""
    parameters = num_parameters(job.model, job.vocabulary)
    lanes, tokens = 1, job.tokens_per_step / cluster.gpus
    room_gb = 0.9 * cluster.gpu.memory_gb
    while memory_gb(job.model, parameters, cluster.gpus, tokens, stage) > room_gb:
        lanes, tokens = 2 * lanes, tokens / 2
        if tokens < MAX_LENGTH:
            return "out of memory"
    if tokens < MAX_LENGTH:
        return f"lanes of {tokens:.0f} tokens, shorter than the longest pair"
    row = balance(cluster.gpus, tokens)
    fill = row["target_tokens_per_step"] / (row["lanes"] * row["tokens_per_lane"])
    target_tokens = fill * job.tokens_per_step
    peak = peak_flops(cluster.gpu.peak, cluster.gpu.precision)
    assert peak is not None
    flops = target_tokens / cluster.gpus * flops_per_target_token(job.model, job.vocabulary)
    sent = sent_bytes(parameters, cluster.gpus, stage=stage, lanes=lanes)
    step = Step(
        compute=flops * row["imbalance"] / (peak * efficiency()),
        launch=lanes * parts()["dispatch"]["seconds"],
        optimizer=optimizer_s(parameters / (cluster.gpus if stage else 1), cluster.gpu),
        bandwidth=sent / (cluster.bus_gb_s() * 1e9),
        latency=num_messages(parameters, stage=stage, lanes=lanes) * cluster.message_s()
        if cluster.gpus > 1
        else 0.0,
        stream=2 * target_tokens / cluster.gpus / stream_tokens_per_s(),
    )
    seconds = step.seconds()
    hours = (job.steps * seconds + START_S) / 3600
    return Row(
        job=job.name,
        gpu=cluster.gpu.name,
        gpus=cluster.gpus,
        network_gb=cluster.network_gb,
        stage=stage,
        lanes_per_rank=lanes,
        tokens_per_lane=int(tokens),
        bound=step.bound(cluster),
        step_s=seconds,
        overlapped_step_s=step.seconds(overlap=True),
        target_tokens_per_s=target_tokens / seconds,
        hours=hours,
        gpu_hours=hours * cluster.gpus,
        node_gb_per_step=sent / 1e9 if cluster.nodes > 1 else 0.0,
        imbalance=row["imbalance"],
        parts=asdict(step),
    )


def predict(result: Published) -> tuple[float, float]:
    """Seconds of a published step: with all reductions overlapped, and with none."""
    gpu = GPUS[result.gpu]
    cluster = Cluster(gpu, result.gpus, result.network_gb, result.gpus_per_node)
    parameters = num_parameters(result.model, result.vocabulary)
    peak = peak_flops(gpu.peak, gpu.precision)
    assert peak is not None
    flops = result.target_tokens * flops_per_target_token(result.model, result.vocabulary)
    sent = sent_bytes(parameters, result.gpus, stage=0, size=result.gradient_bytes)
    step = Step(
        compute=flops / result.gpus / (peak * efficiency()),
        launch=parts()["dispatch"]["seconds"],
        optimizer=optimizer_s(parameters, gpu),
        bandwidth=sent / (cluster.bus_gb_s() * 1e9),
        latency=num_messages(parameters, stage=0) * cluster.message_s(),
    )
    return step.seconds(overlap=True), step.seconds()


def predict_paper(model: str) -> float:
    """Seconds of the paper's step: products alone, at the same share of what it says of a P100."""
    flops = PAPER_TARGET_TOKENS * flops_per_target_token(model, PAPER_VOCABULARY)
    return flops / 8 / (PAPER_P100_FLOPS * efficiency())


@dataclass(frozen=True)
class Failures:
    """What failures cost a run: hours between them, the best interval, shares of the time."""

    mtbf_h: float
    best_interval_s: float
    lost_share: float


def failures(gpus: int, save_s: float, interval_s: float | None = None) -> Failures:
    """After Young 1974: of an interval half is lost at a failure.

    Args:
        save_s: what training loses by a checkpoint.
        interval_s: between checkpoints; the best one by default.
    """
    mtbf_s = GPU_MTBF_H / gpus * 3600
    best = math.sqrt(2 * save_s * mtbf_s)
    interval = interval_s or best
    lost = save_s / interval + (interval / 2 + RECOVERY_S) / mtbf_s
    return Failures(mtbf_s / 3600, best, lost)


def checks() -> list[dict[str, Any]]:
    """Published against predicted."""
    rows = []
    for result in PUBLISHED:
        overlapped, serial = predict(result)
        rows.append(
            {
                "name": result.name,
                "source": result.source,
                "published_ms": result.step_s * 1e3,
                "overlapped_ms": overlapped * 1e3,
                "serial_ms": serial * 1e3,
                "overlapped_error": overlapped / result.step_s - 1,
                "serial_error": serial / result.step_s - 1,
                "calibrates": result.calibrates,
            }
        )
    for model, step_s in PAPER_STEP_S.items():
        alone = predict_paper(model)
        rows.append(
            {
                "name": f"Vaswani et al. 2017, {model}, 8 x P100",
                "source": "https://arxiv.org/abs/1706.03762",
                "published_ms": step_s * 1e3,
                "overlapped_ms": alone * 1e3,
                "serial_ms": None,
                "overlapped_error": alone / step_s - 1,
                "serial_error": None,
                "calibrates": False,
            }
        )
    return rows
