"""One vector a piece: embeddings and softmax.

Shapes: V vocabulary, D d_model, N targets.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.loss import fused_projection_loss


class VocabularyMatrix(nn.Module):
    """A matrix [V, D] of one vector a piece: embeds ids, or projects states onto the vocabulary.

    Source: Vaswani et al. 2017, section 3.4.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.projection_loss = fused_projection_loss  # may be replaced by one that is equal
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(
        self,
        inputs: Tensor,
        operation: Literal["embed", "project", "loss"],
        targets_N: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Use the matrix.

        Args:
            inputs: ids of any shape for "embed", else states [..., D].
            operation: "embed" gives vectors [..., D]; "project" gives logits [..., V]; "loss"
                gives ``(loss_sum, nll_sum)`` of states [N, D], see ``fused_projection_loss``.
            targets_N: the references, for "loss".
            smoothing: label smoothing, for "loss".
        """
        if operation == "embed":
            return functional.embedding(inputs, self.weight)
        if operation == "project":
            return functional.linear(inputs, self.weight)
        assert targets_N is not None, "operation 'loss' needs targets"
        return self.projection_loss(inputs, self.weight, targets_N, smoothing)
