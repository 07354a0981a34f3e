"""The loss over the vocabulary by Liger's Triton kernels: for a GPU, and only if it is installed.

Liger's kernel makes a chunk's gradient in one pass over its logits, where PyTorch's own operations
make several. It counts the targets that are not padding on the host, so the host waits once a pass.

Shapes: N targets, D d_model, V vocabulary.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from model.loss import PAD_ID


def is_installed() -> bool:
    """Whether the package liger-kernel is there."""
    return find_spec("liger_kernel") is not None


def liger_projection_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """As ``loss.fused_projection_loss``, the weight's gradient summed in float32."""
    # (By name: it is no dependency, and type checkers need not find it.)
    kernel = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        ignore_index=PAD_ID,
        label_smoothing=smoothing,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    loss_sum = kernel(weight_VD, hidden_ND, targets_N)
    with torch.no_grad():
        # A target's loss is z - (1 - s) r - s m with the logits' logsumexp z, mean m and the
        # reference's logit r; its negative log-likelihood is z - r.
        real_N = (targets_N != PAD_ID).float()
        reference_N = (hidden_ND * weight_VD[targets_N]).sum(1, dtype=torch.float32)
        mean_N = hidden_ND.float() @ weight_VD.mean(0, dtype=torch.float32)
        nll_sum = loss_sum.float() + smoothing * ((mean_N - reference_N) * real_N).sum()
    return loss_sum.float(), nll_sum
