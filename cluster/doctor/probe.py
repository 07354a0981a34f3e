"""Imports torch, DeepSpeed and Ray and tries each GPU: run as a process of its own by ``software``.

A driver that hangs or a library that crashes must not take the doctor with it. Each finding is one
JSON line on standard output, written at once, so that what was reached before is known.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import redirect_stdout
from typing import Any, TextIO


def main() -> None:
    """Everything, in the order in which it depends on each other."""
    out = sys.stdout
    with redirect_stdout(sys.stderr):  # where libraries chat
        for name, look in (("torch", _torch), ("deepspeed", _deepspeed), ("ray", _ray)):
            _say(out, {"begin": name})
            try:
                _say(out, {name: look()})
            except Exception as error:
                _say(out, {name: {"error": f"{type(error).__name__}: {error}"}})
            if name == "torch":
                _devices(out)


def _say(out: TextIO, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=out, flush=True)


def _torch() -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        available = torch.cuda.is_available()
    # Says, among other things, that the driver is too old, and its version.
    said = [str(item.message) for item in caught if "CUDA" in str(item.message)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "available": available,
        "devices": torch.cuda.device_count() if available else 0,
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        if available
        else None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "said": said[0] if said else None,
    }


def _devices(out: TextIO) -> None:
    """Name and memory of each GPU, and a matrix product on it compared with the CPU's."""
    try:
        import torch
    except Exception:
        return
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        _say(out, {"begin": f"GPU {index}"})
        try:
            _say(out, {"gpu": {"index": index, **_device(index)}})
        except Exception as error:
            said = str(error).strip().partition("\n")[0]
            _say(out, {"gpu": {"index": index, "error": f"{type(error).__name__}: {said}"}})


def _device(index: int) -> dict[str, Any]:
    import torch

    device = torch.device("cuda", index)
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    expected = a @ b
    errors = {}
    bf16 = (about.major, about.minor) >= (8, 0)
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if bf16 else [])):
        product = (a.to(device, dtype) @ b.to(device, dtype)).to("cpu", torch.float64)
        errors[str(dtype).removeprefix("torch.")] = float(
            (product - expected).norm() / expected.norm()
        )
    return {
        "name": about.name,
        "capability": [about.major, about.minor],
        "free": free,
        "total": total,
        "bf16": bf16,
        "errors": errors,
    }


def _deepspeed() -> dict[str, Any]:
    from trainer.engine import import_deepspeed

    return {"version": import_deepspeed().__version__}


def _ray() -> dict[str, Any]:
    import ray

    return {"version": ray.__version__}


if __name__ == "__main__":
    main()
