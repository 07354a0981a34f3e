"""How fast one GPU trains base and big, and what that is of what it can: ``make bench-gpu``.

For each model: tokens a second, share of the device's peak, memory beside what is reckoned, for
padded and packed batches, lanes one by one and together, layers compiled or not, the loss by our
own operations or Liger's; then where the time goes (a profile) and how far that is from the rate at
which the device multiplies matrices of these very shapes. Data are made up: sentences as long as a
corpus' are, dealt by the plan.

On a machine without a GPU it rehearses all of that with tiny shapes on the CPU, which shows that it
runs and nothing else; no result is written unless a file is named.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_parts import (
    ON_GPU,
    REHEARSAL,
    Measured,
    Scale,
    Step,
    Training,
    Variant,
    brought,
    make_steps,
    matrix_rates,
    measure,
    model_products,
    synchronise,
    variants,
)

from model.config import ModelConfig
from model.cost import peak_flops
from model.packed_check import why_not
from trainer.config import TrainerConfig
from trainer.paper.memory import memory

RESULTS = Path(__file__).parent / "results"
_TINY: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 64,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
}

# What a kernel's or an operation's name says it is; the first that fits.
_KINDS = (
    ("attention", r"flash|fmha|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|::mm\b|addmm|bmm|::linear\b"),
    ("loss", r"cross_entropy|softmax|logsumexp|nll"),
    ("layer norm", r"layer_?norm"),
    ("dropout's masks", r"bernoulli|distribution"),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("copies and joins", r"memcpy|memset|copy_|::to\b|::cat\b|CatArray"),
    ("other element-wise", r"elementwise|triton|vectorized|reduce|::add|::mul|::sum"),
)


def main() -> None:
    """Measure, print, write."""
    given = _arguments()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    scale = ON_GPU if on_gpu else REHEARSAL
    if not on_gpu:
        print(
            "REHEARSAL: this machine has no CUDA device. The same is run on the CPU with tiny\n"
            "shapes, to show that it runs; its numbers say nothing of any GPU.\n"
        )
    elif given.quick:
        scale = Scale(**{**asdict(scale), "repeats": 2, "seconds": 1.0, "warmup_steps": 3})
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    machine = _machine(device)
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    steps = make_steps(scale)
    real = statistics.fmean(step.tokens for step in steps)
    print(
        f"{len(steps)} steps of {scale.lanes} lanes, {real:,.0f} real tokens a step (both sides)\n"
    )
    content: dict[str, Any] = {"rehearsal": not on_gpu, "scale": asdict(scale), "models": {}}
    sizes = [(size, size, size) for size in scale.matrix_sizes]
    squares = matrix_rates(sizes, device, seconds=0.3 if on_gpu else 0.02)
    best = max(squares.values())
    content["square_products_flops_per_s"] = squares
    print(
        "bf16 products: " + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in squares.items()), "TFLOP/s"
    )
    _one_rank()
    with tempfile.TemporaryDirectory() as folder:
        profiles = given.profiles or (Path("runs/bench-gpu") if on_gpu else Path(folder))
        for preset in given.models:
            config = ModelConfig(preset=preset)
            if not on_gpu:
                config = ModelConfig.model_validate({**config.model_dump(), **_TINY})
            content["models"][preset] = _of_model(
                preset, config, steps, scale, device, given, best, profiles
            )
    content["seconds"] = round(time.perf_counter() - began, 1)
    output = given.output
    if output is None and on_gpu:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        output = RESULTS / f"{_slug(machine['device'])}-gpu-{today}.json"
    if output is None:
        print(f"\nrehearsed in {content['seconds']} s; nothing written (--output names a file)")
        return
    head = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**head, **content}, indent=1) + "\n")
    print(f"\nwritten: {output}")


def _of_model(
    preset: str,
    config: ModelConfig,
    steps: Sequence[Step],
    scale: Scale,
    device: torch.device,
    given: argparse.Namespace,
    best: float,
    profiles: Path,
) -> dict[str, Any]:
    """All that is measured of one model."""
    print(f"\n== {preset}: d_model {config.d_model}, vocabulary {scale.vocabulary}")
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None
    refusal = why_not(config, "bf16", device)
    if refusal is not None:
        print(f"packed sequences cannot be had here: {refusal}")
    rows: list[Measured] = []
    print(f"{'':38}{'tokens/s':>11}{'ms a step':>11}{'MFU':>7}{'of best':>9}{'GB':>7}{'real':>7}"
          f"{'waits':>7}{'first, s':>10}")  # fmt: skip
    for variant in variants(scale.lanes, compiled=given.compile, fp8=given.fp8):
        row = _tried(variant, config, steps, scale, device, refusal)
        rows.append(row)
        print(_line(row, peak, best), flush=True)
    counted = [row for row in rows if row.failed is None]
    if not counted:
        return {"config": config.model_dump(), "variants": [asdict(row) for row in rows]}
    fastest = max(counted, key=lambda row: row.tokens_per_s)
    plainest = counted[0]
    print(f"fastest: {fastest.variant}, {fastest.tokens_per_s / plainest.tokens_per_s:.2f} times "
          f"{plainest.variant}")  # fmt: skip
    products = _products(config, steps, scale, device)
    mean_flops = statistics.fmean(
        row_flops * row_s for row_flops, row_s in ((fastest.flops_per_s, s) for s in fastest.step_s)
    )
    ideal_s = mean_flops / products["rate"]
    step_s = statistics.median(fastest.step_s)
    print(
        f"its step takes {1e3 * step_s:.1f} ms; its products alone, at the rate of their shapes "
        f"({products['rate'] / 1e12:.1f} TFLOP/s), would take {1e3 * ideal_s:.1f} ms: "
        f"{ideal_s / step_s:.2f} of the step"
    )
    reckoned = _reckoned(config, scale)
    if fastest.peak_bytes is not None:
        joined = next((row for row in counted if row.variant == "packed together"), fastest)
        print(f"memory of {joined.variant}: {(joined.peak_bytes or 0) / 1e9:.1f} GB at most; "
              f"reckoned {reckoned / 1e9:.1f} GB")  # fmt: skip
    chosen = next(
        v for v in variants(scale.lanes, compiled=given.compile, fp8=given.fp8)
        if v.name == fastest.variant
    )  # fmt: skip
    profile = _profile(preset, chosen, config, steps, scale, device, profiles)
    return {
        "config": config.model_dump(),
        "peak_flops": peak,
        "packed_refused": refusal,
        "variants": [asdict(row) for row in rows],
        "fastest": fastest.variant,
        "products": products,
        "products_share_of_step": ideal_s / step_s,
        "reckoned_bytes": reckoned,
        "profile": profile,
    }


def _tried(
    variant: Variant,
    config: ModelConfig,
    steps: Sequence[Step],
    scale: Scale,
    device: torch.device,
    refusal: str | None,
) -> Measured:
    """One variant, or why it has no numbers."""
    failed = None
    if variant.missing is not None:
        failed = f"{variant.missing} is not installed"
    elif variant.loss == "liger" and device.type != "cuda":
        failed = "Liger's kernels want a GPU"
    elif variant.fp8 and device.type != "cuda":
        failed = "fp8 wants a GPU"
    elif refusal is not None and variant.packer.lanes_together is not None:
        failed = "cannot be packed here"
    if failed is None:
        try:
            training = Training(config, scale.vocabulary, variant, device)
            return measure(training, steps, scale, device)
        except torch.cuda.OutOfMemoryError as error:
            failed = f"out of memory: {str(error).partition('. ')[0]}"
        except Exception as error:  # one variant's failure must not cost the others' numbers
            failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return Measured(variant.name, failed=failed)


def _line(row: Measured, peak: float | None, best: float) -> str:
    if row.failed is not None:
        return f"{row.variant:38}{row.failed}"
    utilisation = "-" if peak is None else f"{row.flops_per_s / peak:.3f}"
    used = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}"
    return (
        f"{row.variant:38}{row.tokens_per_s:11,.0f}{1e3 * statistics.median(row.step_s):11.1f}"
        f"{utilisation:>7}{row.flops_per_s / best:9.3f}{used:>7}{row.padding_efficiency:7.3f}"
        f"{row.waiting_for_batches:7.3f}{row.first_step_s:10.1f}"
    )


def _products(
    config: ModelConfig, steps: Sequence[Step], scale: Scale, device: torch.device
) -> dict[str, Any]:
    """How fast the device makes the model's own products; ``rate`` is of all of them together."""
    tokens = int(statistics.fmean(step.tokens for step in steps) / 2)
    seconds = 0.2 if device.type == "cuda" else 0.02
    shapes = model_products(config, tokens, scale.vocabulary)
    operations = seconds_needed = 0.0
    rates = {}
    for name, ((m, k, n), number) in shapes.items():
        [rate] = matrix_rates([(m, k, n)], device, seconds=seconds).values()
        rates[name] = {"shape": [m, k, n], "number": number, "flops_per_s": rate}
        operations += number * 2.0 * m * k * n
        seconds_needed += number * 2.0 * m * k * n / rate
    print("its products: " + ", ".join(
        f"{name} {value['flops_per_s'] / 1e12:.1f}" for name, value in rates.items()), "TFLOP/s"
    )  # fmt: skip
    return {"of": rates, "rate": operations / seconds_needed}


def _reckoned(config: ModelConfig, scale: Scale) -> float:
    """Bytes that training is reckoned to take where all lanes are one pass."""
    with torch.device("meta"):
        from model.build import build

        num_parameters = sum(p.numel() for p in build(config, scale.vocabulary).parameters())
    found = memory(
        config,
        TrainerConfig(precision="bf16"),
        stage=1,
        num_parameters=num_parameters,
        num_devices=1,
        vocab_size=scale.vocabulary,
        tokens_per_lane=scale.tokens_per_step,
    )
    assert found.total is not None
    return found.total - found.buffers  # those are DeepSpeed's


def _profile(
    preset: str,
    variant: Variant,
    config: ModelConfig,
    steps: Sequence[Step],
    scale: Scale,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Where the fastest variant's time goes: by kind, the longest kernels, and a trace."""
    from torch.profiler import ProfilerActivity, profile

    training = Training(config, scale.vocabulary, variant, device)
    ready = list(zip(steps, brought(steps[:3], variant.packer, device), strict=False))
    for step, one in ready:
        training.step(one, int(step.work.target))
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    synchronise(device)
    with profile(activities=activities) as watched:
        began = time.perf_counter()
        for step, one in ready:
            training.step(one, int(step.work.target))
        synchronise(device)
        took_s = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{preset}.trace.json"
    watched.export_chrome_trace(str(trace))
    times: dict[str, float] = {}
    for event in watched.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel == on_gpu:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + own / 1e6
    busy_s = sum(times.values())
    kinds: dict[str, float] = {}
    for key, spent_s in times.items():
        kind = next((k for k, p in _KINDS if re.search(p, key, re.IGNORECASE)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + spent_s / busy_s
    longest = sorted(times.items(), key=lambda item: -item[1])[:15]
    print(
        f"profile of {variant.name}: {len(ready)} steps, the device computes "
        f"{busy_s / took_s:.2f} of the time"
    )
    for kind, share in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {share:6.1%}  {kind}")
    for key, spent_s in longest[:8]:
        print(f"    {spent_s / busy_s:6.1%}  {key[:90]}")
    if on_gpu:
        print(f"  trace: {trace}")
    return {
        "variant": variant.name,
        "busy": busy_s / took_s,
        "kinds": kinds,
        "longest": {key[:160]: spent_s / busy_s for key, spent_s in longest},
    }


def _one_rank() -> None:
    """A process group of one, which DeepSpeed wants."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=0,
        world_size=1,
    )


def _machine(device: torch.device) -> dict[str, Any]:
    versions = {}
    for name in ("triton", "deepspeed", "liger-kernel", "torchao"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["base", "big"], help="presets")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--fp8", action="store_true", help="also try torchao's float8 layers")
    parser.add_argument("--quick", action="store_true", help="shorter repeats")
    parser.add_argument("--output", type=Path, help="default: results/<device>-gpu-<date>.json")
    parser.add_argument("--profiles", type=Path, help="folder of traces; default: runs/bench-gpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
