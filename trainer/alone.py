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
        """Make the update from the parameters' gradients, which stay as they are.

        ``norm`` is then the gradients' norm before clipping. Adam's pre-step hook, which knows it
        by then, can hold the update back by taking the masters' gradients away.
        """
        for group, sizes in zip(self._groups, self._sizes, strict=True):
            group.master.grad = _flattened(group, sizes)
        gradients = [group.master.grad for group in self._groups if group.master.grad is not None]
        self.norm = math.hypot(*(float(gradient.norm()) for gradient in gradients))
        if self._clip_norm > 0 and self.norm > self._clip_norm:
            for gradient in gradients:
                gradient.mul_(self._clip_norm / (self.norm + 1e-6))
        self._adam.step()
        for group in self._groups:
            group.master.grad = None
            group.weights.copy_(group.master)


def _flattened(group: FlatGroup, sizes: Sequence[int]) -> Tensor:
    flat = torch.empty_like(group.master)
    *parts, padding = flat.split(sizes)  # type: ignore[no-untyped-call]
    padding.zero_()
    into, gradients = [], []
    for part, parameter in zip(parts, group.parameters, strict=True):
        if parameter.grad is None:
            part.zero_()
        else:
            into.append(part)
            gradients.append(parameter.grad.reshape(-1))
    if into:
        torch._foreach_copy_(into, gradients)
    return flat
