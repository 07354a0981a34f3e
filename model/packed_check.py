"""Whether a model can be trained on packed sequences on a device, tried before it is relied on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention import make_score
from model.config import ModelConfig, why_padded
from model.packed import Segments, Side, reference_attention, varlen_attention

# Of the outputs and gradients of a trial, relative to the reference's; bfloat16 has three digits.
_MOST_ERROR = 0.03


def why_not(config: ModelConfig, precision: str, device: torch.device) -> str | None:
    """Why such a model cannot be trained on packed sequences on this device; None: it can.

    On a GPU the kernel is tried, forward and backward, against the reference; takes milliseconds
    once the device is set up.
    """
    refusal = why_padded(config)
    if refusal is not None or device.type == "cpu":
        return refusal
    if precision == "fp32":
        return "the variable-length kernel computes in bf16 and fp16, not in fp32"
    if config.key_width % 8 or config.key_width > 256:
        return f"the kernel has no heads {config.key_width} wide (8, 16, ... 256)"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    try:
        return _trial(config, dtype, device)
    except ImportError:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        return f"the variable-length kernel does not run here: {first_line}"


def _trial(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs the kernel on short sequences, some of them empty on one side or on both.

    Raises:
        ImportError, RuntimeError: it is not there, or not for this device.
    """
    generator = torch.Generator().manual_seed(0)
    shape = config.num_heads, config.key_width
    scale = make_score(config.attention, *shape).plain_scale(shape[1])
    assert scale is not None, "why_padded lets only plain dot products pass"
    starts = [torch.tensor(s, dtype=torch.int32) for s in ((0, 70, 77, 80, 80), (0, 9, 68, 68, 68))]
    for causal, keys in ((True, 0), (False, 0), (False, 1)):
        tensors = [
            torch.randn((int(starts[side][-1]), *shape), generator=generator)
            for side in (0, keys, keys, 0)
        ]
        # So that the weights are as even under any scale: rounding matters more where they are not.
        tensors[0] *= shape[1] ** -0.5 / scale

        def computed(
            attend: Callable[..., Tensor],
            place: torch.device,
            inside: torch.dtype,
            tensors: list[Tensor] = tensors,
            causal: bool = causal,
            keys: int = keys,
        ) -> list[Tensor]:
            *inputs, weight = (
                tensor.to(dtype).to(place, inside).requires_grad_() for tensor in tensors
            )
            sides = [Side(torch.empty(0), starts[side].to(place), 70) for side in (0, keys)]
            radius = config.local_radius if keys == 0 else None
            output = attend(*inputs, Segments(*sides), causal=causal, radius=radius, scale=scale)
            grads = torch.autograd.grad((output * weight.detach()).sum(), inputs)
            return [part.detach().float().cpu().flatten() for part in (output, *grads)]

        expected = computed(reference_attention, torch.device("cpu"), torch.float32)
        found = computed(varlen_attention, device, dtype)
        for one, other in zip(found, expected, strict=True):
            # (Written so that it is also false of what is no number.)
            if not (one - other).norm() < _MOST_ERROR * other.norm():
                return "the variable-length kernel gives other numbers than the reference"
    return None
