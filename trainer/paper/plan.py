"""What a training takes, reckoned before there is data: batches, memory, operations, hours, money.

A dry run of a configuration: nothing is downloaded, built or trained, and PyTorch is not needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from data_shards.archived_corpora import ARCHIVED
from data_shards.errors import UserError
from model.cost import Work, training_flops
from model.size import num_parameters
from trainer.config import RunConfig
from trainer.paper.hardware import UTILISATION, Hardware, Rate, rate_of
from trainer.paper.lengths import CorpusSize
from trainer.paper.memory import Memory, checkpoint_bytes, memory, tokens_in_a_pass

# Of a lane's forward and backward pass, what the CPU alone takes whatever its width: measured on
# the paper's twelve layers (docs/scaling.md), so shared out by layer.
_LAUNCH_S_PER_LAYER = 8.3e-3 / 12
# Adam on a GPU is bound by memory: bytes read and written for each parameter (docs/scaling.md).
_ADAM_BYTES = 32
_DEVICES_PER_MACHINE = 8
_STAGES = (0, 1, 2, 3)
_SEQUENTIAL = frozenset({"rnn", "lstm", "gru"})


@dataclass(frozen=True)
class Batches:
    """How the corpus is dealt.

    Attributes:
        source_tokens, target_tokens: of a mean step, end signs included, padding not.
        not_padding: share of what is computed on that is text, of both sides together.
        epochs: of the run.
    """

    pairs_per_step: float
    source_tokens: float
    target_tokens: float
    tokens_per_lane: int
    not_padding: float
    steps_per_epoch: float
    epochs: float


@dataclass(frozen=True)
class Times:
    """Seconds of a step by what they go into, and the run.

    Attributes:
        compute: operations over rate and utilisation; None where that share is not known, and so
            with all that follows from it.
        launch: the least that the CPU needs to start the lanes' kernels, beside ``compute``; None
            for another kind than the Transformer, of which it was not measured.
        optimizer: Adam; 0 where the memory's bandwidth is not known.
        reduction: gradients and weights between the devices of one machine; None: not reckoned.
        hours, device_hours, price: of ``num_steps``; price is None where none was given.
    """

    compute: float | None
    launch: float | None
    optimizer: float
    reduction: float | None
    step: float | None
    num_steps: float
    hours: float | None
    device_hours: float | None
    price: float | None


@dataclass(frozen=True)
class Dry:
    """The plan of a run.

    Attributes:
        rate: of one device; memory and reductions are of its precision as well.
        utilisation: share of that rate; None: not known for this kind of model.
    """

    config: RunConfig
    hardware: Hardware
    corpus: CorpusSize
    num_parameters: int
    batches: Batches
    flops_per_step: float
    flops: float
    rate: Rate
    utilisation: float | None
    times: Times
    memory: tuple[Memory, ...]
    checkpoint_bytes: int
    checkpoints_bytes: int
    download_bytes: int | None
    prepared_bytes: float
    currency: str
    notes: tuple[str, ...]


def reckon(
    config: RunConfig,
    hardware: Hardware,
    corpus: CorpusSize,
    *,
    utilisation: float | None = None,
    sustained_flops: float | None = None,
    price: float | None = None,
    currency: str = "USD",
) -> Dry:
    """The plan of a configuration on devices.

    Args:
        utilisation: share of the peak that training reaches; by default ``UTILISATION`` for the
            Transformer, and for another kind not known: its plan has no hours.
        sustained_flops: of one device, instead of peak and utilisation.
        price: of a device-hour.

    Raises:
        UserError: more devices than lanes, a number out of range, or one that is not known.
    """
    data = config.data
    _check(config, hardware, utilisation, sustained_flops, price)
    share = utilisation or (UTILISATION if config.model.kind == "transformer" else None)
    if sustained_flops is not None:
        share = 1.0
        rate = Rate(sustained_flops, config.trainer.precision, "given on the command line")
    else:
        rate = rate_of(hardware.device, config.trainer.precision)
    # A device without the configured precision trains in the one that it has, if at all.
    trainer = config.trainer.model_copy(update={"precision": rate.precision})
    parameters = num_parameters(config.model, corpus.vocab_size)
    plan = corpus.plan(data, trainer.seed)
    steps_per_epoch = plan.steps_per_epoch * corpus.scale
    pairs_per_step = corpus.num_pairs / steps_per_epoch
    mean = corpus.mean_work
    work = Work(*(pairs_per_step * value for value in asdict(mean).values()))
    flops_per_step = training_flops(config.model, work, vocab_size=corpus.vocab_size)
    step = _step_seconds(config, hardware, parameters, flops_per_step, rate, share)
    num_steps = _num_steps(config, step["step"])
    hours = None if step["step"] is None else num_steps * step["step"] / 3600
    device_hours = None if hours is None else hours * hardware.num_devices
    saved = checkpoint_bytes(trainer, parameters)
    efficiency = plan.padding_efficiency()
    return Dry(
        config=config,
        hardware=hardware,
        corpus=corpus,
        num_parameters=parameters,
        batches=Batches(
            pairs_per_step=pairs_per_step,
            source_tokens=work.source,
            target_tokens=work.target,
            tokens_per_lane=plan.tokens_per_batch,
            not_padding=sum(efficiency) / 2,
            steps_per_epoch=steps_per_epoch,
            epochs=num_steps / steps_per_epoch,
        ),
        flops_per_step=flops_per_step,
        flops=flops_per_step * num_steps,
        rate=rate,
        utilisation=share,
        times=Times(
            **step,
            num_steps=num_steps,
            hours=hours,
            device_hours=device_hours,
            price=None if price is None or device_hours is None else price * device_hours,
        ),
        memory=tuple(
            memory(
                config.model,
                trainer,
                stage=stage,
                num_parameters=parameters,
                num_devices=hardware.num_devices,
                vocab_size=corpus.vocab_size,
                tokens_per_lane=tokens_in_a_pass(config, hardware.num_devices),
            )
            for stage in _STAGES
        ),
        checkpoint_bytes=saved,
        # The best is kept besides, and the next is there before the oldest goes.
        checkpoints_bytes=saved * (trainer.keep_checkpoints + 2),
        download_bytes=_download_bytes(data.corpus),
        prepared_bytes=_prepared_bytes(corpus, mean),
        currency=currency,
        notes=tuple(_notes(config, hardware, corpus, rate, step)),
    )


def _check(
    config: RunConfig,
    hardware: Hardware,
    utilisation: float | None,
    sustained_flops: float | None,
    price: float | None,
) -> None:
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: give a share of the peak, such as 0.345")
    if sustained_flops is not None and not 0 < sustained_flops < float("inf"):
        raise UserError("--sustained: give operations a second of one device, in TFLOPS")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price {price:g}: give the price of a device-hour, such as 2.5")
    if hardware.num_devices > config.data.lanes:
        raise UserError(
            f"{hardware}: {hardware.num_devices - config.data.lanes} of them would have no lane: "
            f"data.lanes is {config.data.lanes}. Set data.lanes={hardware.num_devices} (which "
            "deals other batches) or take fewer devices"
        )


def _step_seconds(
    config: RunConfig,
    hardware: Hardware,
    parameters: int,
    flops: float,
    rate: Rate,
    utilisation: float | None,
) -> dict[str, Any]:
    device, num = hardware.device, hardware.num_devices
    trainer, model = config.trainer, config.model
    # Ranks wait for the one with most lanes.
    most_lanes = ceil(config.data.lanes / num)
    compute = launch = None
    if utilisation is not None:
        compute = flops * most_lanes / config.data.lanes / (rate.flops * utilisation)
    if model.kind == "transformer":
        launch = most_lanes * _LAUNCH_S_PER_LAYER * (model.encoder_layers + model.decoder_layers)
    own = parameters / (num if trainer.zero_stage else 1)
    optimizer = own * _ADAM_BYTES / (device.memory_gb_s * 1e9) if device.memory_gb_s else 0.0
    reduction: float | None = None
    if num == 1:
        reduction = 0.0
    elif device.bus_gb_s and num <= _DEVICES_PER_MACHINE:
        item = 4 if rate.precision == "fp32" else 2
        # docs/scaling.md, "What is sent": all-reduces, and gathering from stage 1 on.
        times = {0: 2, 1: 3, 2: 2 * most_lanes + 1, 3: 3 * most_lanes}[trainer.zero_stage]
        sent = times * (num - 1) / num * parameters * item
        reduction = sent / (device.bus_gb_s * 1e9)
    step = None
    if compute is not None:
        step = max(compute, launch or 0.0) + optimizer + (reduction or 0.0)
    return {
        "compute": compute,
        "launch": launch,
        "optimizer": optimizer,
        "reduction": reduction,
        "step": step,
    }


def _num_steps(config: RunConfig, step_s: float | None) -> float:
    """Of the run: as many as configured, or as fit into its time."""
    trainer = config.trainer
    if step_s is None and trainer.max_steps is None:
        raise UserError(
            f"how many steps a run of kind {config.model.kind} makes in trainer.max_minutes is not "
            "known: set trainer.max_steps, or give --utilisation SHARE or --sustained TFLOPS"
        )
    num_steps = float("inf") if trainer.max_steps is None else float(trainer.max_steps)
    if trainer.max_minutes is not None and step_s is not None:
        num_steps = min(num_steps, trainer.max_minutes * 60 / step_s)
    return num_steps


def _download_bytes(corpus: str) -> int | None:
    """Of the raw files; those whose size nobody has published are left out."""
    entry = ARCHIVED.get(corpus)
    if entry is None:
        return None
    return sum(archive.expected.num_bytes or 0 for archive in entry.archives)


def _prepared_bytes(corpus: CorpusSize, mean: Work) -> float:
    """Shards (two bytes a piece, four in a vocabulary beyond 65,536) and lengths."""
    item = 2 if corpus.vocab_size <= 1 << 16 else 4
    return corpus.num_pairs * (item * (mean.source + mean.target) + 4)


def _notes(
    config: RunConfig,
    hardware: Hardware,
    corpus: CorpusSize,
    rate: Rate,
    step: dict[str, Any],
) -> list[str]:
    """What the numbers leave out, or take otherwise than configured."""
    notes = []
    wanted = config.trainer.precision
    if rate.precision != wanted:
        notes.append(
            f"a {hardware.device.name} is reckoned in {rate.precision}: it has no {wanted}. To "
            f"train on it, set trainer.precision={rate.precision}"
        )
    if step["reduction"] is None:
        where = (
            "between machines"
            if hardware.num_devices > _DEVICES_PER_MACHINE
            else f"between {hardware.device.name}s"
        )
        notes.append(f"the time of reductions {where} is not in it (docs/scaling.md)")
    if None not in (step["launch"], step["compute"]) and step["launch"] > step["compute"]:
        notes.append(
            "the CPU's starting of kernels, not the arithmetic, holds a step up: fewer devices, "
            "or larger batches, use them better"
        )
    if config.data.lanes % hardware.num_devices:
        notes.append(
            f"data.lanes {config.data.lanes} do not share out evenly over "
            f"{hardware.num_devices} devices: some wait"
        )
    if not corpus.is_prepared:
        notes.append(
            "the corpus is not prepared: lengths are drawn after its means, so batches and steps "
            "an epoch are about right, no more"
        )
    return notes + _notes_of_kind(config, step)


def _notes_of_kind(config: RunConfig, step: dict[str, Any]) -> list[str]:
    """What is known of the Transformer alone."""
    kind = config.model.kind
    if kind == "transformer":
        return []
    notes = [f"what autograd keeps is not reckoned for kind {kind}"]
    if step["step"] is None:
        notes.append(
            f"no hours: what share of the peak a model of kind {kind} reaches is not known (0.345 "
            "is the Transformer's). Give --utilisation SHARE or --sustained TFLOPS"
        )
        if config.trainer.max_minutes is not None:
            notes.append("whether trainer.max_minutes ends the run before its steps is not known")
        return notes
    missing = "the CPU's starting of kernels is not in the time of a step"
    if kind in _SEQUENTIAL:
        missing += (
            ", nor is the wait of each position for the one before it, whatever the operations: "
            "the hours are a floor"
        )
    return [*notes, missing]
