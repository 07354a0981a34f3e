"""Label-smoothed cross-entropy straight from the decoder's states, without the logits of a batch.

Shapes: N targets, D d_model, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PAD_ID = 0

# Logits held at a time, in elements.
_CHUNK_ELEMENTS = 1 << 20


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
    vocab_size = weight_VD.size(0)
    uniform = smoothing / vocab_size
    sum_weight_D = weight_VD.sum(0, dtype=torch.float32)
    real_N = (targets_N != PAD_ID).float()
    loss_sum = hidden_ND.new_zeros((), dtype=torch.float32)
    nll_sum = loss_sum.clone()
    grad_hidden = (
        hidden_ND.new_empty(hidden_ND.shape, dtype=torch.float32) if wants_hidden else None
    )
    grad_weight = (
        weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if wants_weight else None
    )
    num_rows = max(16, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, hidden_ND.size(0), num_rows):
        rows = slice(start, start + num_rows)
        hidden_CD, targets_C1, real_C = hidden_ND[rows], targets_N[rows, None], real_N[rows]
        logits_CV = (hidden_CD @ weight_VD.T).float()
        reference_C = logits_CV.gather(1, targets_C1)[:, 0]
        log_normaliser_C = logits_CV.logsumexp(1)
        nll_C = log_normaliser_C - reference_C
        mean_C = (hidden_CD.float() @ sum_weight_D) / vocab_size
        loss_C = log_normaliser_C - (1 - smoothing) * reference_C - smoothing * mean_C
        loss_sum += (loss_C * real_C).sum()
        nll_sum += (nll_C * real_C).sum()
        if grad_hidden is None and grad_weight is None:
            continue
        grad_CV = logits_CV.sub_(log_normaliser_C[:, None]).exp_().sub_(uniform)
        grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, smoothing - 1))
        grad_CV = grad_CV.mul_(real_C[:, None]).to(hidden_CD.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = grad_CV @ weight_VD
        if grad_weight is not None:
            grad_weight += grad_CV.T @ hidden_CD
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.mark_non_differentiable(nll_sum)
    return loss_sum, nll_sum


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
    return _FusedProjectionLoss.apply(hidden_ND, weight_VD, targets_N, smoothing)  # type: ignore[no-any-return, no-untyped-call]
