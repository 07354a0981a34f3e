"""Label-smoothed cross-entropy straight from the decoder's states, without the logits of a batch.

Shapes: N targets, D d_model, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.rows import MULTIPLE

PAD_ID = 0

# Probabilities of so many targets are kept until the gradients are made of them, in elements: one
# matrix product for all of Multi30k's 2,000 targets a batch and 8,000 pieces.
_CPU_CHUNK_ELEMENTS = 1 << 24
_CHUNK_ELEMENTS = 1 << 27

# On a CPU logits are held for fewer rows still, so that the softmax finds them in the caches; in
# elements for every unit of the model's width, as narrow matrix products want fewer rows than wide
# ones (measured for D 128 and 512, V 8000, in bfloat16).
_CPU_BLOCK_ELEMENTS = 1 << 13

# On a CPU rows come in multiples of this, as the layers' do: see there.
_CPU_ROWS = MULTIPLE

# Below this the logarithm of a probability is no longer exact in float32 or bfloat16.
_SMALLEST_PROBABILITY = 1e-30


class _FusedProjectionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        with torch.autocast(device, enabled=False):
            return _forward(
                ctx, hidden_ND, weight_VD, targets_N, smoothing, wants_hidden, wants_weight
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(weight_dtype)
        return grad_hidden, grad_weight, None, None


def _forward(
    ctx: Any,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    smoothing: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    # With p = softmax(logits) and q the smoothed reference, the loss is -sum_v q_v log p_v and its
    # gradient p - q. The even part of q is the same for all rows and classes, so what it adds is
    # made from sums over the weights and over the states, never by a pass over [C, V].
    is_cpu = hidden_ND.device.type == "cpu"
    num_given = hidden_ND.size(0)
    if is_cpu and hidden_ND.dtype == torch.bfloat16 and num_given % _CPU_ROWS:
        more = -num_given % _CPU_ROWS
        hidden_ND = functional.pad(hidden_ND, (0, 0, 0, more))
        targets_N = functional.pad(targets_N, (0, more), value=PAD_ID)
    (num_targets, width), vocab_size = hidden_ND.shape, weight_VD.size(0)
    uniform = smoothing / vocab_size
    sum_weight_D = weight_VD.sum(0, dtype=torch.float32)
    real_N1 = (targets_N != PAD_ID)[:, None]
    # Asking a GPU whether anything is padded would make the host wait for it.
    padded = not is_cpu or not bool(real_N1.all())
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    nll_sum = loss_sum.clone()
    grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_weight = torch.zeros_like(weight_VD) if wants_weight else None
    num_rows = block = max(1, _CHUNK_ELEMENTS // vocab_size)
    if is_cpu:
        num_rows = _whole(_CPU_CHUNK_ELEMENTS // vocab_size)
        block = _whole(_CPU_BLOCK_ELEMENTS * width // vocab_size)
    num_rows = min(num_rows, num_targets)
    # These serve every chunk: fresh ones would be paged in anew each time.
    logits_buffer = hidden_ND.new_empty(min(block, num_rows), vocab_size)
    probs_buffer = hidden_ND.new_empty(num_rows, vocab_size)
    for start in range(0, num_targets, max(1, num_rows)):
        rows = slice(start, start + num_rows)
        hidden_CD, targets_C1, real_C1 = hidden_ND[rows], targets_N[rows, None], real_N1[rows]
        probs_CV = probs_buffer[: hidden_CD.size(0)]
        reference_C1 = _probabilities(
            hidden_CD, weight_VD, targets_C1, logits_buffer, out=probs_CV
        ).float()
        probability_C1 = probs_CV.gather(1, targets_C1)
        if is_cpu:
            normaliser_C1 = _log_normaliser(hidden_CD, weight_VD, reference_C1, probability_C1)
        else:
            logits_CV = logits_buffer[: hidden_CD.size(0)]
            normaliser_C1 = logits_CV.float().logsumexp(1, keepdim=True)
        mean_C1 = (hidden_CD.float() @ sum_weight_D)[:, None] / vocab_size
        nll_C1 = normaliser_C1 - reference_C1
        loss_C1 = normaliser_C1 - (1 - smoothing) * reference_C1 - smoothing * mean_C1
        loss_sum += (loss_C1 * real_C1).sum()
        nll_sum += (nll_C1 * real_C1).sum()
        if grad_hidden is None and grad_weight is None:
            continue

        # (scatter_ would copy the whole of a bfloat16 matrix to float32 and back.)
        grad_CV = probs_CV
        grad_CV[torch.arange(grad_CV.size(0), device=targets_N.device), targets_C1[:, 0]] = (
            probability_C1[:, 0] - (1 - smoothing)
        )
        # The even part comes in as the products' bias. Padding counts nothing: on the narrow
        # sides of the products that is cheaper to see to than in [C, V].
        if grad_hidden is not None:
            even_D = (sum_weight_D * -uniform).to(grad_CV.dtype)
            out_CD = torch.addmm(even_D, grad_CV, weight_VD, out=grad_hidden[rows])
            if padded:
                out_CD.mul_(real_C1)
        if grad_weight is not None:
            real_CD = hidden_CD * real_C1 if padded else hidden_CD
            even_D = (real_CD.sum(0, dtype=torch.float32) * -uniform).to(grad_CV.dtype)
            part_VD = torch.addmm(even_D, grad_CV.T, real_CD)
            # Several parts are added up in float32.
            grad_weight = part_VD if num_rows >= num_targets else grad_weight.float().add_(part_VD)
    ctx.save_for_backward(None if grad_hidden is None else grad_hidden[:num_given], grad_weight)
    ctx.mark_non_differentiable(nll_sum)
    return loss_sum, nll_sum


def _whole(rows: int) -> int:
    return max(_CPU_ROWS, rows // _CPU_ROWS * _CPU_ROWS)


def _probabilities(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C1: Tensor, logits_buffer: Tensor, *, out: Tensor
) -> Tensor:
    """Softmax of the logits into ``out``, block by block; the references' logits [C, 1]."""
    references = []
    for start in range(0, hidden_CD.size(0), logits_buffer.size(0)):
        rows = slice(start, start + logits_buffer.size(0))
        block_BD = hidden_CD[rows]
        logits_BV = torch.mm(block_BD, weight_VD.T, out=logits_buffer[: block_BD.size(0)])
        torch.softmax(logits_BV, 1, out=out[rows])
        references.append(logits_BV.gather(1, targets_C1[rows]))
    return torch.cat(references)


def _log_normaliser(
    hidden_CD: Tensor, weight_VD: Tensor, reference_C1: Tensor, probability_C1: Tensor
) -> Tensor:
    """``logsumexp`` of every row of logits, from the softmax that is there where that is exact."""
    normaliser_C1 = reference_C1 - probability_C1.float().log()
    lost_C = probability_C1[:, 0] < _SMALLEST_PROBABILITY
    if bool(lost_C.any()):
        logits_LV = torch.mm(hidden_CD[lost_C], weight_VD.T)
        normaliser_C1[lost_C] = logits_LV.float().logsumexp(1, keepdim=True)
    return normaliser_C1


def fused_projection_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Summed smoothed loss and summed negative log-likelihood of ``softmax(hidden weight^T)``.

    Args:
        hidden_ND: decoder states, any float dtype.
        weight_VD: the softmax matrix.
        targets_N: int64 ids in [0, V); those equal to PAD_ID count nothing.
        smoothing: probability mass taken from the reference and spread evenly over all V, [0, 1).

    Returns:
        ``(loss_sum, nll_sum)`` in nats, float32 scalars; only the first has gradients.

    Source: Vaswani et al. 2017, section 5.4; Szegedy et al. 2016.
    """
    if not torch.is_grad_enabled():
        # A function of one's own is told that gradients are wanted even where none will be.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _FusedProjectionLoss.apply(hidden_ND, weight_VD, targets_N, smoothing)  # type: ignore[no-any-return, no-untyped-call]
