"""What can be counted of Table 1's layers, the same on every machine: operations, sequential steps,
path lengths, and how strong the gradient is at the end of a path.

Shapes: B batch, N positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from trainer.flop_count import torch_flops
from trainer.paper.table1_layers import Layer, make, make_stack

# Values only move.
_MOVES = {
    "_reshape_alias",
    "_to_copy",
    "_unsafe_view",
    "cat",
    "clone",
    "constant_pad_nd",
    "copy_",
    "detach",
    "stack",
    "transpose_",
    "unsafe_chunk",
    "unsafe_split",
}


def operations(layer: Layer, n: int, d: int, *, window: int | None = None) -> int:
    """Operations of a forward pass as PyTorch's counter sees them, by shapes alone: nothing runs.

    A multiply-add counts as two; what is no product (softmax, gates, sums) is not counted.
    """
    module, inputs_BND = _on_meta(layer, n, d, window)
    with torch.no_grad():
        return torch_flops(lambda: module(inputs_BND))


def chain_length(layer: Layer, n: int, d: int = 8) -> int:
    """Operations on the longest chain of which each needs the one before it: sequential steps.

    Counted in what PyTorch dispatches: a product, a sum, a softmax is a step, however large, and
    what only moves values is none. Recurrent layers come as their cells: on the device "meta" no
    kernel joins them. What does not depend on the input (a mask) could be made beforehand, and is
    not counted.
    """
    module, inputs_BND = _on_meta(layer, n, d, None)
    chain = _Chain(inputs_BND)
    with torch.no_grad(), chain:
        output_BND = module(inputs_BND)
    return chain.length_of(output_BND)


def _on_meta(layer: Layer, n: int, d: int, window: int | None) -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return make(layer, d, window=window), torch.empty(1, n, d)


class _Chain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers, for every tensor made of the input, how many operations came one after another.

    Views have their base's length. What is written into a view does not lengthen its base: no
    layer here reads a base after that.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lengths: Any = WeakTensorKeyDictionary()
        self._lengths[inputs] = 0

    def length_of(self, tensor: Tensor) -> int:
        """Of a tensor that depends on the input."""
        return int(self._lengths[tensor])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run it; what it makes is one longer than its longest input, if it counts."""
        given = (args, kwargs or {})
        lengths = [self._lengths[one] for one in _tensors(given) if one in self._lengths]
        result = func(*args, **(kwargs or {}))
        if lengths:
            moves = func.is_view or func.overloadpacket.__name__ in _MOVES
            for one in _tensors(result):
                self._lengths[one] = max(lengths) + (0 if moves else 1)
        return result


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


# --- longest path -----------------------------------------------------------------------------


def path_length(layer: Layer, n: int, *, window: int | None = None, d: int = 4) -> int:
    """The fewest layers through which the gradient of every output reaches every input it can see.

    For recurrence the fewest steps from cell to cell, within one layer, by which the last output's
    gradient reaches the first input: it is cut off after so many cells, as truncated
    back-propagation does. That this is n follows from the loop over cells, one a position; the
    gradient only shows that nothing is lost on the way. Found by doubling and bisection, each
    length tried by gradients.
    """

    def connects(length: int) -> bool:
        if layer.cell is not None:
            return reach_of_recurrence(layer.cell, n, length, d=d) == n
        reached, outputs = dependence(layer, n, length, window=window, d=d)
        return all(
            row[: output + 1 if layer.forward else n].all()
            for row, output in zip(reached, outputs, strict=True)
        )

    most = 1
    while not connects(most):
        most *= 2
    least = most // 2  # does not connect, or is 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if connects(middle) else (middle, most)
    return most


# Beyond it only the outputs at both ends are looked at: they are farthest from some input.
_ALL_OUTPUTS = 64


def dependence(
    layer: Layer, n: int, depth: int, *, window: int | None = None, d: int = 4
) -> tuple[Tensor, list[int]]:
    """Whether an output's gradient reaches an input through ``depth`` layers: bool [outputs, n].

    A gradient counts as none if it is exactly 0; float64, so that it does not underflow.

    Returns:
        The table, and the outputs that have a row: all, or the first and the last of more than 64.
    """
    torch.manual_seed(0)
    stack = make_stack(layer, d, depth, window=window).double()
    outputs = list(range(n)) if n <= _ALL_OUTPUTS else [0, n - 1]
    # A copy of the sequence for each output: one backward pass serves all.
    inputs_BND = torch.randn(1, n, d, dtype=torch.float64).repeat(len(outputs), 1, 1)
    inputs_BND.requires_grad_()
    result_BND = stack(inputs_BND)
    seen = result_BND[torch.arange(len(outputs)), torch.tensor(outputs)].sum()
    (gradient,) = torch.autograd.grad(seen, inputs_BND)
    reached: Tensor = (gradient != 0).any(-1)
    return reached, outputs


def reach_of_recurrence(cell: type[nn.RNNCellBase], n: int, steps: int, *, d: int = 4) -> int:
    """How many inputs the last output's gradient reaches if only ``steps`` last cells pass it."""
    torch.manual_seed(0)
    unit: Any = cell(d, d).double()  # type: ignore[call-arg]
    inputs_ND = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    state: Any = None
    for place in range(n):
        if place == n - steps and state is not None:
            state = tuple(x.detach() for x in state) if _is_pair(state) else state.detach()
        state = unit(inputs_ND[place][None], state)
    output = state[0] if _is_pair(state) else state
    (gradient,) = torch.autograd.grad(output.sum(), inputs_ND)
    return int((gradient != 0).any(-1).sum())


def _is_pair(state: object) -> bool:
    return isinstance(state, tuple)


def reckoned_path(layer: Layer, n: int, *, window: int | None = None) -> int:
    """The same by formula: n, 1, (n - 1) / (k - 1), log_k n, or 2 (n - 1) / (r - 1), rounded up.

    A neighbourhood is centred, so that a layer reaches half of it further on either side.
    """
    if layer.cell is not None:
        return n
    width = window or layer.window
    if width is None:
        return 1
    if not layer.dilated:
        return -(-(n - 1) // (width - 1 if layer.forward else (width - 1) // 2))
    depth = 1
    while width**depth < n:
        depth += 1
    return depth


# --- strength of the gradient along the path ------------------------------------------------------

_PROBES = 16


def strengths(build: Callable[[], nn.Module], n: int, d: int, *, seeds: int) -> list[float]:
    """How strongly the last output depends on the input at each distance, 0 to n - 1.

    The root mean square, over initialisations, inputs from a normal distribution, and random
    directions v of length 1, of the norm of ``v · ∂ output / ∂ input``; float64.
    """
    squares = torch.zeros(n, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = build().double()
        inputs_BND = torch.randn(1, n, d, dtype=torch.float64).repeat(_PROBES, 1, 1)
        inputs_BND.requires_grad_()
        direction_BD = torch.randn(_PROBES, d, dtype=torch.float64)
        direction_BD /= direction_BD.norm(dim=-1, keepdim=True)
        (gradient,) = torch.autograd.grad(
            (module(inputs_BND)[:, -1] * direction_BD).sum(), inputs_BND
        )
        squares += gradient.pow(2).sum(-1).mean(0).flip(0)
    return [math.sqrt(value) for value in (squares / seeds).tolist()]
