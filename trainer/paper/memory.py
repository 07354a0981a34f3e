"""What a training step holds on a device, and what a checkpoint holds on disk, reckoned.

Weights, gradients and optimizer as ZeRO's paper counts them (Rajbhandari et al. 2020, section 3).
What autograd keeps for the backward pass was measured on the model as it is built, a layer more or
less and a width more or less at a time; a test holds the formula against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, why_padded
from trainer.config import RunConfig, TrainerConfig

_ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# trainer.engine: elements of DeepSpeed's buckets, one that gathers and one that reduces.
# Where ZeRO 2 overlaps its reductions, another fills while one is sent.
_BUCKET_ELEMENTS, _NUM_BUCKETS = 50_000_000, 2
# model.loss: logits held at a time on a GPU, and how many matrices of that size: in the precision
# of the run the logits and their softmax, in float32 what logsumexp makes, and in half precision
# the logits once more that it reads.
_LOGITS_ELEMENTS, _NUM_LOGITS = 1 << 27, 2
_LOGSUMEXP_BYTES = {"fp32": 4, "bf16": 8, "fp16": 8}
_MASTER_BYTES, _MOMENTS_BYTES, _AVERAGE_BYTES = 4, 8, 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at a ZeRO stage; ``activations`` is None where no formula is known.

    Attributes:
        weights, gradients: in the precision of the run.
        optimizer: float32 weights and Adam's two moments (in fp32 the weights are their own).
        activations: what autograd keeps of one pass, and what the loss works with.
        buffers: DeepSpeed's buckets; of one device below ZeRO 2 the float32 gradient.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float | None
    buffers: float

    @property
    def total(self) -> float | None:
        """All together."""
        if self.activations is None:
            return None
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def memory(
    model: ModelConfig,
    trainer: TrainerConfig,
    *,
    stage: int,
    num_parameters: int,
    num_devices: int,
    vocab_size: int,
    tokens_per_lane: float,
) -> Memory:
    """Of one device.

    Args:
        stage: 1 shares out the optimizer, 2 the gradients as well, 3 the weights as well. One
            device has nobody to share with: 0 is then 1.
        tokens_per_lane: source and as many target tokens that are in one forward pass.
    """
    item = _ITEM_BYTES[trainer.precision]
    share = 1 / num_devices
    kept = _MOMENTS_BYTES
    # In fp32 at stage 0 Adam updates the weights themselves; ZeRO keeps a copy of its share.
    if trainer.precision != "fp32" or stage > 0 or num_devices == 1:
        kept += _MASTER_BYTES
    if trainer.ema_decay is not None:
        kept += _AVERAGE_BYTES
    activations = activation_bytes(model, trainer.precision, tokens_per_lane)
    if activations is not None:
        rows = min(tokens_per_lane, _LOGITS_ELEMENTS / vocab_size)
        a_logit = _NUM_LOGITS * item + _LOGSUMEXP_BYTES[trainer.precision]
        activations += rows * vocab_size * a_logit
        # The loss has the softmax matrix' gradient before the backward pass asks for it.
        activations += 4 * vocab_size * model.d_model
    return Memory(
        stage=stage,
        weights=num_parameters * item * (share if stage >= 3 else 1),
        gradients=num_parameters * item * (share if stage >= 2 else 1),
        optimizer=num_parameters * kept * (share if stage >= 1 else 1),
        activations=activations,
        buffers=_buffers(trainer, stage, num_parameters, num_devices),
    )


def _buffers(trainer: TrainerConfig, stage: int, num_parameters: int, num_devices: int) -> float:
    if num_devices == 1 and stage < 2 and trainer.precision != "fp16":
        return _MASTER_BYTES * num_parameters  # trainer.alone
    num_buckets = _NUM_BUCKETS + (stage == 2 and num_devices > 1)
    item = _ITEM_BYTES[trainer.precision]
    return num_buckets * min(_BUCKET_ELEMENTS, num_parameters) * item


def tokens_in_a_pass(config: RunConfig, num_devices: int) -> int:
    """Source (and target) tokens that a GPU computes together at most: of a lane, or of several.

    That the device has the kernel for it is taken for granted.
    """
    data, trainer = config.data, config.trainer
    of_a_lane = data.tokens_per_step // data.lanes
    packs = trainer.batches != "padded" and trainer.precision != "fp32"
    if not packs or why_padded(config.model) is not None:
        return of_a_lane
    lanes_of_a_rank = -(-data.lanes // num_devices)
    return of_a_lane * min(lanes_of_a_rank, max(1, trainer.tokens_per_pass // of_a_lane))


def activation_bytes(model: ModelConfig, precision: str, tokens: float) -> float | None:
    """What autograd keeps of so many source and as many target tokens; None: not known.

    Attention counts as fused: it keeps no weights. Where it is not (an explicit score, a CPU in
    bf16), each attention keeps as many numbers a token as heads times the sentence's length.
    """
    if model.kind != "transformer":
        return None
    item, d, f = _ITEM_BYTES[precision], model.d_model, model.d_ff
    # Besides what is in the run's precision: dropout's masks, a byte an element.
    encoder = (9 * item + 4) * d + item * f
    decoder = (15 * item + 8) * d + item * f
    ends = 5 * item * d
    return tokens * (model.encoder_layers * encoder + model.decoder_layers * decoder + ends)


def checkpoint_bytes(trainer: TrainerConfig, num_parameters: int) -> int:
    """Of one: float32 weights, Adam's moments, and the moving average where there is one."""
    average = 0 if trainer.ema_decay is None else _AVERAGE_BYTES
    return num_parameters * (_MASTER_BYTES + _MOMENTS_BYTES + average)
