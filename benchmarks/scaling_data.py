"""Published numbers that the scaling model rests on or is held against, each with its source.

Read on 2026-11-23. What a data sheet promises is called so; the rest somebody measured.
"""

from __future__ import annotations

from dataclasses import dataclass

_DLE = (
    "https://github.com/NVIDIA/DeepLearningExamples/blob/d666f145/PyTorch/Translation/Transformer"
    "/README.md#training-performance-results"
)
_MLPERF = (
    "https://github.com/mlcommons/training_results_v0.7/blob/c6640611/NVIDIA/results"
    "/{}_ngc20.06_pytorch/transformer/result_0.txt"
)
_NCCL = "https://github.com/NVIDIA/nccl-tests/issues/"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        peak: name in ``model.cost.peak_flops``.
        precision: of the half-precision units that it has.
        memory_gb, memory_gb_s: data sheets.
        bus_gb_s: bus bandwidth of an all-reduce over the 8 of a node (nccl-tests' busbw).
        price: dollars an hour, an example; None where none was read.
    """

    name: str
    peak: str
    precision: str
    memory_gb: float
    memory_gb_s: float
    bus_gb_s: float
    bus_source: str
    price: float | None = None


GPUS = {
    gpu.name: gpu
    for gpu in (
        # 0.8 of the 150 GB/s one way of NVLink 2 (data sheet): NCCL's protocols cost about 20 %,
        # says its author at nccl-tests 212. No measurement of a DGX-1 was found.
        Gpu("v100-16", "V100", "fp16", 16, 900, 120, "data sheet x 0.8"),
        Gpu("v100-32", "V100", "fp16", 32, 900, 120, "data sheet x 0.8"),
        Gpu("a100-40", "A100", "bf16", 40, 1555, 200, _NCCL + "149"),
        Gpu("a100-80", "A100", "bf16", 80, 2039, 200, _NCCL + "149"),
        # 8 x H100: 476 GB/s with NVLink SHARP.
        Gpu("h100", "H100", "bf16", 80, 3350, 476, _NCCL + "290", price=2.49),
        Gpu("h200", "H200", "bf16", 141, 4800, 475, _NCCL + "272"),
    )
}

# https://computespec.pages.dev/learn/pricing/cloud-gpu-pricing-explained: Lambda's H100 at 2.49 an
# hour, and AWS' p5.48xlarge at 98.32 for eight, 12.29 each.
PRICES = "2.49 (Lambda) to 12.29 (AWS p5.48xlarge) dollars an H100 hour, on demand"

# Of the network's nominal bandwidth, what an all-reduce gets: 84.8 of 100 GB/s on average over 3
# nodes with 4 x HDR each. Over NDR 0.92 to 0.96 (nccl-tests 290).
NETWORK_EFFICIENCY, NETWORK_EFFICIENCY_SOURCE = 0.85, _NCCL + "119"

# A few bytes between two nodes: 19 microseconds, so a hop of the tree there and back.
HOP_S, HOP_SOURCE = 19e-6, _NCCL + "150"

# 419 unexpected interruptions in 54 days of 16,384 H100 (Meta, Llama 3).
GPU_MTBF_H = 54 * 24 * 16_384 / 419
GPU_MTBF_SOURCE = (
    "https://direct.datacenterdynamics.com/en/news/"
    "meta-report-details-hundreds-of-gpu-and-hbm3-related-interruptions-to-llama-3-training-run"
)


@dataclass(frozen=True)
class Published:
    """A result to hold the model against.

    Attributes:
        gpus_per_node: 16 in a DGX-2.
        network_gb: Gb/s of a node, all its adapters together; 0 for one node.
        target_tokens: real ones a step, over all GPUs.
        step_s: as published, or target_tokens over the published rate.
        gradient_bytes: of one gradient number, as it is sent.
    """

    name: str
    source: str
    model: str
    gpu: str
    gpus: int
    target_tokens: float
    step_s: float
    vocabulary: int = 33_708
    gpus_per_node: int = 8
    network_gb: float = 0
    gradient_bytes: int = 2
    calibrates: bool = False


# Budgets are of padded tokens. MLPerf's run with a budget of 10,240 a GPU tells 9,349 real ones.
_FILL = 74_793 / 8 / 10_240


def _dle(gpu: str, gpus: int, budget: int, rate: float, **values: object) -> Published:
    tokens = gpus * budget * _FILL
    name = f"DeepLearningExamples, {gpus} x {gpu}"
    return Published(name, _DLE, "big", gpu, gpus, tokens, tokens / rate, **values)  # type: ignore[arg-type]


def _mlperf(
    system: str, gpu: str, gpus: int, tokens: float, rate: float, gb: float, per_node: int = 8
) -> Published:
    source, name = _MLPERF.format(system), f"MLPerf v0.7, {gpus} x {gpu}"
    return Published(
        name,
        source,
        "big",
        gpu,
        gpus,
        tokens,
        tokens / rate,
        gpus_per_node=per_node,
        network_gb=gb,
    )


PUBLISHED = (
    _dle("a100-40", 1, 10_240, 82_059, calibrates=True),
    _dle("a100-40", 4, 10_240, 286_081),
    _dle("a100-40", 8, 10_240, 551_599),
    _dle("v100-16", 1, 5_120, 32_942),
    _dle("v100-16", 8, 5_120, 214_656),
    _dle("v100-32", 1, 10_240, 39_911),
    _dle("v100-32", 16, 10_240, 517_227, gpus_per_node=16),
    # The second epoch of each log: wpb and wps. 8 x HDR a node: NVIDIA/systems of the same place.
    _mlperf("dgx1", "v100-16", 8, 74_793, 352_453, 0),
    # DGX-2H: 16 a node, of 450 W, 8 x EDR.
    _mlperf("dgx2h_n10", "v100-32", 160, 668_588, 6.82519e6, 800, per_node=16),
    _mlperf("dgxa100", "a100-40", 8, 100_937, 810_800, 0),
    _mlperf("dgxa100_n2", "a100-40", 16, 100_771, 1.47237e6, 1600),
    _mlperf("dgxa100_n10", "a100-40", 80, 668_546, 7.17176e6, 1600),
    _mlperf("dgxa100_n20", "a100-40", 160, 668_546, 1.27298e7, 1600),
    _mlperf("dgxa100_n60", "a100-40", 480, 652_160, 2.25985e7, 1600),
    # 80,000 updates of 617 thousand tokens in 30,878 s, validation included. Ott et al. 2018 had
    # DGX-1s (fairseq issue 486); those have 4 x EDR (MLPerf v0.6, NVIDIA/systems/dgx1_n60).
    Published(
        "fairseq, WMT14 en-fr, 128 x V100",
        "https://github.com/facebookresearch/fairseq/issues/361",
        "big", "v100-16", 128, 617_000, 30_878 / 80_000, network_gb=400,
    ),
    Published(
        "fairseq, WMT18 en-de, 128 x V100",
        "https://github.com/facebookresearch/fairseq/issues/506",
        "big", "v100-16", 128, 417_527, 417_527 / 1.20e6, network_gb=400,
    ),
)  # fmt: skip

# Vaswani et al. 2017, section 5.2 and the note to Table 2 (arXiv 1706.03762): seconds a step of
# 25,000 target tokens on 8 P100, at an assumed 9.5 TFLOPS sustained each; float32.
PAPER_TARGET_TOKENS, PAPER_VOCABULARY = 25_000, 37_000
PAPER_P100_FLOPS = 9.5e12
PAPER_STEP_S = {"base": 0.4, "big": 1.0}
PAPER_STEPS = {"base": 100_000, "big": 300_000}
