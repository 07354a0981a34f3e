"""Gradients summed over the ranks while the backward pass goes on, bucket by bucket.

DeepSpeed overlaps its reductions with the backward pass under ZeRO 2 and 3 alone (the caller owns
gradient accumulation here). Without ZeRO this does it: as soon as the last pass of a step has given
all gradients of a bucket, its sum begins. Buckets are the same at every step and launched in the
same order on every rank, so the order of summation, and with it every bit, repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Bucket:
    """Parameters of one type whose gradients are summed as one tensor."""

    parameters: list[nn.Parameter]
    waiting_for: int = 0  # gradients
    flat: Tensor | None = None  # while it is being summed
    work: Any = None


class OverlappedReduction:
    """The mean over ranks of a module's gradients.

    A step is ``arm()``, a backward pass, ``launch_rest()``, ``finish()``; passes before it only
    accumulate. All ranks must make the same calls, and no other collective between the first two.

    Args:
        parameters: all that have gradients, in the order that the forward pass uses them, roughly.
        sum_over_ranks: begins to sum a tensor in place; what it returns can be waited for.
        world_size: how many ranks there are.
        dtype: what is sent; by default the gradients' own type.
        bucket_elements: a bucket is closed when it has so many.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sum_over_ranks: Callable[[Tensor], Any],
        *,
        world_size: int,
        dtype: torch.dtype | None = None,
        bucket_elements: int,
    ) -> None:
        self._sum_over_ranks = sum_over_ranks
        self._world_size, self._dtype = world_size, dtype
        self._buckets = _cut(parameters, bucket_elements)
        self._armed = False
        self._next = 0  # bucket to launch
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._hook(bucket)
                )

    def arm(self) -> None:
        """The backward pass that comes is the step's last."""
        assert self._next == 0, "the last step is not finished"
        self._armed = True
        for bucket in self._buckets:
            bucket.waiting_for = len(bucket.parameters)

    def launch_rest(self) -> None:
        """The backward pass is over: what got no gradient in it is summed as it stands.

        Without ``arm`` before, everything is. A second call of a step does nothing.
        """
        self._armed = False
        for bucket in self._buckets[self._next :]:
            self._launch(bucket)
        self._next = len(self._buckets)

    def finish(self) -> None:
        """Wait; every parameter's gradient is the mean over ranks now, the same bits on all."""
        for bucket in self._buckets:
            assert bucket.work is not None, "launch_rest comes first"
            assert bucket.flat is not None
            bucket.work.wait()
            flat, bucket.flat, bucket.work = bucket.flat, None, None
            flat = flat.mul_(1.0 / self._world_size).to(bucket.parameters[0].dtype)
            sizes = [parameter.numel() for parameter in bucket.parameters]
            parts = flat.split(sizes)  # type: ignore[no-untyped-call]
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self._next = 0

    def _hook(self, bucket: _Bucket) -> Any:
        def has_gradient(_: Tensor) -> None:
            if not self._armed:
                return
            bucket.waiting_for -= 1
            # In the order of all ranks, whatever the order in which gradients come.
            while self._next < len(self._buckets) and not self._buckets[self._next].waiting_for:
                self._launch(self._buckets[self._next])
                self._next += 1

        return has_gradient

    def _launch(self, bucket: _Bucket) -> None:
        parts = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in bucket.parameters
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        bucket.flat = flat if self._dtype is None else flat.to(self._dtype)
        for parameter in bucket.parameters:
            parameter.grad = None  # held twice no longer than the copy takes
        bucket.work = self._sum_over_ranks(bucket.flat)


def _cut(parameters: Sequence[nn.Parameter], bucket_elements: int) -> list[_Bucket]:
    """From the last parameter to the first: about the order in which gradients come."""
    buckets: list[_Bucket] = []
    elements = 0
    for parameter in reversed(parameters):
        last = buckets[-1].parameters[0] if buckets else None
        if last is None or elements >= bucket_elements or last.dtype != parameter.dtype:
            buckets.append(_Bucket([]))
            elements = 0
        buckets[-1].parameters.append(parameter)
        elements += parameter.numel()
    return buckets
