"""The update of ZeRO 1 where one rank has everything: nothing to reduce, share out or gather.

DeepSpeed's own goes through the gradients parameter by parameter several times (a bucket to reduce,
overflow, norm), which for a small model is a twentieth of a step on a CPU. Here they are copied
into one float32 tensor, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Elements whose squares are summed in float32: of many more a CPU loses the small ones to rounding
# (of 60 million 0.5 % of the norm, of 200 million 3 %).
_NORM_ELEMENTS = 1 << 16

# Gradients that are copied at a time, before they are let go.
_COPIED_TOGETHER = 16


@dataclass(frozen=True)
class FlatGroup:
    """Parameters that lie one behind the other in a flat master.

    Attributes:
        parameters: in that order, from the master's first element on.
        weights: the parameters' own memory, flat, in the module's type.
        master: float32, as long as ``weights``; its end may be padding.
    """

    parameters: Sequence[nn.Parameter]
    weights: Tensor
    master: Tensor


class UpdateAlone:
    """Norm, clipping and Adam over whole groups, and the weights made of the masters.

    Args:
        groups: all that is trained.
        adam: over the groups' masters.
        clip_norm: largest gradient norm; 0 leaves it alone.
    """

    def __init__(self, groups: Sequence[FlatGroup], adam: Any, clip_norm: float) -> None:
        self._groups, self._adam, self._clip_norm = groups, adam, clip_norm
        self.norm = 0.0
        self._sizes = [
            [
                *(parameter.numel() for parameter in group.parameters),
                group.master.numel() - sum(parameter.numel() for parameter in group.parameters),
            ]
            for group in groups
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Make the update from the parameters' gradients, which are taken from them.

        ``norm`` is then the gradients' norm before clipping. Adam's pre-step hook, which knows it
        by then, can hold the update back by taking the masters' gradients away.
        """
        for group, sizes in zip(self._groups, self._sizes, strict=True):
            group.master.grad = _flattened(group, sizes)
        gradients = [group.master.grad for group in self._groups if group.master.grad is not None]
        self.norm = exact_norm(gradients)
        if self._clip_norm > 0 and self.norm > self._clip_norm:
            for gradient in gradients:
                gradient.mul_(self._clip_norm / (self.norm + 1e-6))
        self._adam.step()
        for group in self._groups:
            group.master.grad = None
            group.weights.copy_(group.master)


def exact_norm(tensors: Sequence[Tensor]) -> float:
    """The norm of all elements together, which no number of them makes too small.

    Not finite where an element is not.
    """
    parts: list[Tensor] = []
    for tensor in tensors:
        # (A GPU sums over many threads, and so exactly enough.)
        parts += tensor.flatten().split(_NORM_ELEMENTS) if tensor.is_cpu else [tensor]  # type: ignore[no-untyped-call]
    return math.hypot(*torch.stack(torch._foreach_norm(parts)).tolist()) if parts else 0.0


def _flattened(group: FlatGroup, sizes: Sequence[int]) -> Tensor:
    flat = torch.empty_like(group.master)
    *parts, padding = flat.split(sizes)  # type: ignore[no-untyped-call]
    padding.zero_()
    pairs = list(zip(parts, group.parameters, strict=True))
    for first in range(0, len(pairs), _COPIED_TOGETHER):
        into, gradients = [], []
        for part, parameter in pairs[first : first + _COPIED_TOGETHER]:
            if parameter.grad is None:
                part.zero_()
            else:
                into.append(part)
                gradients.append(parameter.grad.reshape(-1))
                parameter.grad = None  # so that not all of both are there at once
        if into:
            torch._foreach_copy_(into, gradients)
    return flat
