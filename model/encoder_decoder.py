"""What every kind of model has in common: how it is trained, projected and decoded.

Shapes: B batch, S source length, T target length, D d_model, V vocabulary, N targets or hypotheses,
H heads, J hypotheses of a sentence.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from model.config import ModelConfig
from model.decoding import DecoderState
from model.packed import Packing
from model.vocabulary_matrix import VocabularyMatrix


class EncoderDecoder(nn.Module):
    """Reads a source, writes a target; embeddings and softmax share one matrix unless untied.

    A kind says how states are made of a batch (``states``), how one position follows another
    (``start``, ``step``) and what was attended to (``attention_maps``). Training, search,
    checkpoints, export and reports know no more of a model than this class.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        roles = ("shared",) if config.tie_embeddings else ("source", "target", "softmax")
        self.matrices = nn.ModuleDict(
            {role: VocabularyMatrix(vocab_size, config.d_model) for role in roles}
        )

    def matrix(self, role: str, *arguments: Any) -> Any:
        """Call the vocabulary's matrix in its role: source, target or softmax."""
        return self.matrices[role if role in self.matrices else "shared"](*arguments)

    def forward(
        self,
        source_BS: Tensor,
        target_in_BT: Tensor,
        target_out_BT: Tensor | None = None,
        smoothing: float = 0.0,
        packing: Packing | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Final decoder states [B, T, D]; or, given the references, the loss.

        The loss is reached through ``forward`` so that what wraps the module (DeepSpeed's engine)
        can call it.

        Args:
            source_BS: source ids, padded on the right with PAD_ID.
            target_in_BT: decoder input: BOS and the target, padded on the right.
            target_out_BT: the references: the target and EOS, padded on the right.
            smoothing: label smoothing of the loss.
            packing: where sequences that are laid end to end begin; ids and states then have one
                dimension fewer.

        Returns:
            ``hidden_BTD``, or ``(loss_sum, nll_sum)``: nats summed over the targets that are not
            padding, float32 scalars; only ``loss_sum`` has gradients.
        """
        if packing is None:
            hidden_BTD = self.states(source_BS, target_in_BT)
        else:
            hidden_BTD = self.packed_states(source_BS, target_in_BT, packing)
        if target_out_BT is None:
            return hidden_BTD
        hidden_ND, targets_N = hidden_BTD.flatten(0, -2), target_out_BT.flatten()
        if hidden_ND.device.type == "cpu":
            # On other devices counting the rows would make the host wait; the loss skips them.
            rows_N = targets_N.nonzero()[:, 0]
            if rows_N.numel() < targets_N.numel():
                hidden_ND, targets_N = hidden_ND.index_select(0, rows_N), targets_N[rows_N]
        return self.matrix("softmax", hidden_ND, "loss", targets_N, smoothing)  # type: ignore[no-any-return]

    def training_loss(
        self, source_BS: Tensor, target_in_BT: Tensor, target_out_BT: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """``(loss_sum, nll_sum)``; see ``forward``."""
        return self(source_BS, target_in_BT, target_out_BT, smoothing)  # type: ignore[no-any-return]

    def project(self, hidden: Tensor) -> Tensor:
        """States [..., D] to logits [..., V]."""
        return self.matrix("softmax", hidden, "project")  # type: ignore[no-any-return]

    @abstractmethod
    def states(self, source_BS: Tensor, target_in_BT: Tensor) -> Tensor:
        """Final decoder states [B, T, D], to project: of position t given the targets up to t.

        A pair's do not depend on the padding or on the other pairs.
        """

    def packed_states(self, source_M: Tensor, target_in_N: Tensor, packing: Packing) -> Tensor:
        """``states`` over sequences laid end to end, [N, D].

        Raises:
            NotImplementedError: this kind has none; ``model.packed_check.why_not`` knows.
        """
        raise NotImplementedError(f"{type(self).__name__} computes on padded batches")

    @abstractmethod
    def attention_maps(self, source_BS: Tensor, target_in_BT: Tensor) -> dict[str, Tensor]:
        """Every attention weight of one pass, float32, without gradients.

        Returns:
            "cross" [layers, B, H, T, S]; of models with self-attention also "encoder"
            [layers, B, H, S, S] and "decoder" [layers, B, H, T, T].
        """

    @abstractmethod
    def start(self, source_BS: Tensor, width: int) -> DecoderState:
        """Encode, and make ready for ``width`` hypotheses a sentence; no gradients."""

    @abstractmethod
    def step(self, ids_N: Tensor, state: Any, record: list[Tensor] | None = None) -> Tensor:
        """Final states [N, D], to project, of ``ids_N``, the newest piece of every hypothesis.

        ``state``, of this model's ``start``, takes the position in. Rows are sentences' hypotheses,
        one sentence after the other; no gradients. ``record`` takes the last layer's
        cross-attention, [B, H, J, S].
        """
