"""Gradients summed while the backward pass goes on, with ranks that all hold the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.reduction import OverlappedReduction

RANKS = 2


class Ranks:
    """Sums as ``RANKS`` equal ranks would; notes when a sum begins, ends only when waited for."""

    def __init__(self) -> None:
        self.began: list[Tensor] = []
        self.waited_for = 0

    def __call__(self, tensor: Tensor) -> Ranks.Work:
        self.began.append(tensor)
        return Ranks.Work(self, tensor)

    class Work:
        def __init__(self, ranks: Ranks, tensor: Tensor) -> None:
            self.ranks, self.tensor = ranks, tensor

        def wait(self) -> None:
            self.ranks.waited_for += 1
            self.tensor.mul_(RANKS)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.first(values).relu()).square().sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in model.parameters()
    ]


def reduced(
    dtype: torch.dtype | None = None, *, arm: bool = True, bucket_elements: int = 1
) -> tuple[list[Tensor], Ranks, int]:
    """Two passes; the gradients, the ranks, and how many sums began inside the last pass."""
    model, ranks = Model(), Ranks()
    reduction = OverlappedReduction(
        list(model.parameters()),
        ranks,
        world_size=RANKS,
        dtype=dtype,
        bucket_elements=bucket_elements,
    )
    model(torch.arange(10.0).view(2, 5)).backward()
    assert not ranks.began
    if arm:
        reduction.arm()
    model(torch.ones(2, 5)).backward()
    early = len(ranks.began)
    reduction.launch_rest()
    reduction.launch_rest()
    assert ranks.waited_for == 0
    reduction.finish()
    assert ranks.waited_for == len(ranks.began)
    return gradients(model), ranks, early


def plain(change: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> list[Tensor]:
    model = Model()
    model(torch.arange(10.0).view(2, 5)).backward()
    model(torch.ones(2, 5)).backward()
    return [change(gradient) for gradient in gradients(model)]


def equal(these: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(these, others, strict=True))


def test_gradients_are_the_mean_whatever_the_buckets_and_whether_sums_began_early() -> None:
    for arm in (True, False):
        for bucket_elements in (1, 30, 1000):
            assert equal(reduced(arm=arm, bucket_elements=bucket_elements)[0], plain())


def test_sums_begin_within_the_last_pass_in_the_buckets_own_order() -> None:
    _, ranks, early = reduced(bucket_elements=1)
    # From the last parameter back; the second layer's are complete before the first layer's.
    sizes = [parameter.numel() for parameter in reversed(list(Model().parameters()))]
    assert [tensor.numel() for tensor in ranks.began] == sizes
    # The last bucket's parameter is unused: the buckets before it in the order began early.
    assert early < len(sizes)
    _, _, unarmed = reduced(arm=False)
    assert unarmed == 0


def test_a_bucket_waits_for_those_before_it() -> None:
    model, ranks = Model(), Ranks()
    # The order of use, reversed: gradients come in the order opposite to that of the buckets.
    used = [p for name, p in model.named_parameters() if name != "unused"]
    reduction = OverlappedReduction(
        list(reversed(used)), ranks, world_size=RANKS, bucket_elements=1
    )
    began = []
    used[0].register_post_accumulate_grad_hook(lambda _: began.append(len(ranks.began)))
    reduction.arm()
    model(torch.ones(2, 5)).backward()
    assert [tensor.numel() for tensor in ranks.began] == [p.numel() for p in used]
    reduction.launch_rest()
    reduction.finish()


def test_gradients_are_rounded_to_the_type_that_is_sent() -> None:
    sent, ranks, _ = reduced(torch.bfloat16)
    assert {tensor.dtype for tensor in ranks.began} == {torch.bfloat16}
    assert equal(sent, plain(lambda gradient: gradient.bfloat16().float()))
    assert not equal(sent, plain())


def test_steps_follow_one_another() -> None:
    model, ranks = Model(), Ranks()
    reduction = OverlappedReduction(
        list(model.parameters()), ranks, world_size=RANKS, bucket_elements=30
    )
    found = []
    for _ in range(2):
        reduction.arm()
        model(torch.ones(2, 5)).backward()
        reduction.launch_rest()
        reduction.finish()
        found.append([gradient.clone() for gradient in gradients(model)])
        model.zero_grad()
    assert equal(*found)
