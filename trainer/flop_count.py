"""The operations of a forward pass by three counters, of which two know nothing of our formula.

- ``model.cost``: reckoned from the model's shape and the pairs' lengths.
- PyTorch's ``FlopCounterMode``: sees the matrix products that are really dispatched.
- DeepSpeed's profiler: wraps PyTorch's Python functions and looks at their arguments' shapes.

All count a multiply-add as two operations (DeepSpeed gives multiply-adds, too). What differs, and
why, is told in docs/profiling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from data_shards.config import PAD_ID
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from model.build import build
from model.config import ModelConfig
from model.cost import batch_flops
from model.encoder_decoder import EncoderDecoder
from trainer.engine import import_deepspeed

# B pairs, S source and T target length.
Shape = tuple[int, int, int]

# Of the pass that DeepSpeed's profiler watches: about a second on a core.
_DEEPSPEED_FLOPS = 2e10


@dataclass(frozen=True)
class StepCounts:
    """Operations of a step's forward and backward passes, over all lanes.

    The backward pass is two products for each of the forward's: both counts are three times that.

    Attributes:
        step: counted from 1.
        cost: by ``model.cost``, of the real tokens.
        torch: by PyTorch's counter, of the batches as they are, padded.
        padding: real tokens of those computed on.
        deepspeed_ratio: DeepSpeed's count by ours, on ``deepspeed_pairs`` of the step's pairs
            without padding, forward only.
    """

    step: int
    cost: float
    torch: float
    padding: float
    deepspeed_ratio: float
    deepspeed_pairs: int


def count_step(config: ModelConfig, manifest: Manifest, plan: Plan, step: int) -> StepCounts:
    """Count a step, numbered from 1, by all three counters; takes some seconds."""
    batches = plan.step(step - 1)
    vocab_size = manifest.vocabulary_size
    shapes = [(len(b.pair_ids), b.source_length, b.target_length) for b in batches]
    real = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    pairs, source, target = shapes[0]
    of_a_pair = counted_by_cost(config, vocab_size, [(1, source, target)])
    sample = max(1, min(pairs, int(_DEEPSPEED_FLOPS / of_a_pair))), source, target
    deepspeed, _ = counted_by_deepspeed(config, vocab_size, sample)
    return StepCounts(
        step=step,
        cost=step_cost(config, manifest, plan, step),
        torch=3.0 * counted_by_torch(config, vocab_size, shapes),
        padding=real / sum(b * (s + t) for b, s, t in shapes),
        deepspeed_ratio=deepspeed / counted_by_cost(config, vocab_size, [sample]),
        deepspeed_pairs=sample[0],
    )


def step_cost(config: ModelConfig, manifest: Manifest, plan: Plan, step: int) -> float:
    """Operations of a step's real tokens, forward and backward, by ``model.cost``."""
    lengths = manifest.lengths
    return 3.0 * sum(
        batch_flops(
            config,
            manifest.vocabulary_size,
            lengths[batch.pair_ids, 0].tolist(),
            lengths[batch.pair_ids, 1].tolist(),
        )
        for batch in plan.step(step - 1)
    )


def counted_by_cost(config: ModelConfig, vocab_size: int, shapes: Iterable[Shape]) -> float:
    """Of a forward pass over batches of these shapes without padding, by our formula."""
    return sum(batch_flops(config, vocab_size, [s] * b, [t] * b) for b, s, t in shapes)


def counted_by_torch(config: ModelConfig, vocab_size: int, shapes: Iterable[Shape]) -> int:
    """The same by PyTorch's counter, of everything that is computed, padding included.

    Nothing is computed: the tensors are of the device "meta" and have shapes only, so this takes
    as long for a large model as for a small one.
    """
    model = _on_meta(config, vocab_size)

    def forward() -> None:
        for shape in shapes:
            source_BS, target_BT = _tokens(shape, device="meta")
            logits(model, source_BS, target_BT)

    return torch_flops(forward)


def counted_by_deepspeed(config: ModelConfig, vocab_size: int, shape: Shape) -> tuple[int, int]:
    """``(operations, multiply-adds)`` of a forward pass over one batch, by DeepSpeed's profiler.

    It is computed for real, on the CPU: on "meta" PyTorch decomposes a linear layer in Python, into
    functions that DeepSpeed wraps as well, and it would be counted twice.
    """
    model = build(config, vocab_size).eval()
    source_BS, target_BT = _tokens(shape, device="cpu")
    return deepspeed_flops(model, lambda: logits(model, source_BS, target_BT))


def logits(model: EncoderDecoder, source_BS: Tensor, target_in_BT: Tensor) -> Tensor:
    """A forward pass as far as the logits [B, T, V], without gradients.

    (Not as far as the loss: that makes gradients in its forward pass, which counters count.)
    """
    with torch.no_grad():
        return model.project(model(source_BS, target_in_BT))


def torch_flops(compute: Callable[[], object]) -> int:
    """Operations of the matrix products that ``compute`` dispatches, by PyTorch's counter."""
    # PyTorch knows the fused attention of GPUs, but not the one of CPUs.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping: dict[Any, Any] = {fused: _attention, fused_backward: _attention_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        compute()
    return int(counter.get_total_flops())


def deepspeed_flops(model: nn.Module, compute: Callable[[], object]) -> tuple[int, int]:
    """``(operations, multiply-adds)`` of what ``compute`` calls in the module, by DeepSpeed.

    Forward passes only. Must not run beside a training in the same process: it replaces functions
    of PyTorch until it is done.
    """
    with _patched() as profiler_class:
        profiler = profiler_class(model)
        profiler.start_profile()
        try:
            compute()
            return int(profiler.get_total_flops()), int(profiler.get_total_macs())
        finally:
            profiler.end_profile()


@contextmanager
def _patched() -> Iterator[Any]:
    """DeepSpeed's profiler; PyTorch is as it was afterwards.

    DeepSpeed puts back its functions, but methods that ``Tensor`` inherits it leaves as copies in
    ``Tensor`` itself, and lists of counts that an error leaves open stay open for the next one.
    """
    module = import_deepspeed().profiling.flops_profiler.profiler
    own = dict(vars(Tensor))
    try:
        yield module.FlopsProfiler
    finally:
        for name in set(vars(Tensor)) - set(own):
            delattr(Tensor, name)
        module.module_flop_count.clear()
        module.module_mac_count.clear()


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    _grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Two products for each of the forward's; that it makes the scores anew is not the model's."""
    return 2 * _attention(query, key, value)


def _on_meta(config: ModelConfig, vocab_size: int) -> EncoderDecoder:
    with torch.device("meta"):
        return build(config, vocab_size).eval()


def _tokens(shape: Shape, *, device: str) -> tuple[Tensor, Tensor]:
    """Ids that are no padding; which ones makes no difference."""
    num_pairs, source_length, target_length = shape
    return (
        torch.full((num_pairs, source_length), PAD_ID + 1, device=device),
        torch.full((num_pairs, target_length), PAD_ID + 1, device=device),
    )
