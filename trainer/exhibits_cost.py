"""What a run cost: operations, device-hours, energy, money."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_shards.errors import UserError
from model.cost import Work, training_flops
from trainer.formats import format_duration, format_number, format_power
from trainer.report_lines import Event, last_moment, moment
from trainer.report_log import Attempt, RunLog

# Training cost in floating-point operations by the paper's own estimate.
# Source: Vaswani et al. 2017, Table 2.
PAPER_FLOPS = {"base": 3.3e18, "big": 2.3e19}

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Rate:
    """What a device costs an hour.

    Raises:
        UserError: the price is negative or no number.
    """

    price: float
    currency: str = "USD"

    def __post_init__(self) -> None:
        if not 0 <= self.price < float("inf"):
            raise UserError(f"--price {self.price:g}: give the price of a device-hour, such as 2.5")


@dataclass(frozen=True)
class Cost:
    """A run's cost over all attempts; None is not known, with the reason in ``unknown``.

    Attributes:
        counted_flops: operations of the model, real tokens only, forward and backward.
        is_reckoned: they follow from the model's shape and the tokens, instead of the log.
        paper_flops: by the paper's method: training time, times the devices, times the sustained
            rate of one (section 6.1).
        sustained_flops: what all devices together sustain in a matrix product, operations a second.
        peak_flops, peak_source: what they could do at most, and who says so.
        ratio: counted over the paper's.
        training_s: spent training, what was undone included; start-up and restarts are not.
        device_hours: of those seconds.
        held_s, held_device_hours: from an attempt's first logged line to its last, and the
            restarts between; what the devices are paid for.
        price, currency, rate: of the held device-hours.
    """

    counted_flops: float | None
    is_reckoned: bool
    paper_flops: float | None
    sustained_flops: float | None
    peak_flops: float | None
    peak_source: str | None
    ratio: float | None
    training_s: float
    device_hours: float
    held_s: float
    held_device_hours: float
    energy_joules: float | None
    energy_kwh: float | None
    price: float | None
    currency: str | None
    rate: float | None
    unknown: dict[str, str]


def cost(log: RunLog, rate: Rate | None = None) -> Cost:
    """Add up what the log tells."""
    unknown: dict[str, str] = {}
    counted, is_reckoned = _gained(log, "flops"), False
    if counted is None:
        counted, is_reckoned = _reckoned(log), True
        if counted is None:
            unknown["counted_flops"] = (
                "no step has been logged"
                if not log.steps
                else "the log has no count, and the corpus is not at hand to reckon it"
            )
    paper = _by_the_papers_method(log.attempts)
    if paper is None:
        unknown["paper_flops"] = "the sustained rate was not measured when the run started"
    energy = _gained(log, "energy_joules")
    if energy is None:
        unknown["energy_joules"] = "the log has no reading of an energy counter"
    held = _held(log)
    held_hours = sum(seconds * workers for seconds, workers in held) / 3600
    if rate is None:
        unknown["price"] = "give --price PER-DEVICE-HOUR"
    return Cost(
        counted_flops=counted,
        is_reckoned=is_reckoned and counted is not None,
        paper_flops=paper,
        sustained_flops=log.last("sustained_flops", "started", "resumed"),
        peak_flops=log.last("peak_flops", "started", "resumed"),
        peak_source=log.last("peak_source", "started", "resumed"),
        ratio=counted / paper if counted is not None and paper else None,
        training_s=sum(attempt.training_s for attempt in log.attempts),
        device_hours=sum(a.training_s * a.num_workers for a in log.attempts) / 3600,
        held_s=sum(seconds for seconds, _ in held),
        held_device_hours=held_hours,
        energy_joules=energy,
        energy_kwh=None if energy is None else energy / _JOULES_PER_KWH,
        price=None if rate is None else rate.price * held_hours,
        currency=None if rate is None else rate.currency,
        rate=None if rate is None else rate.price,
        unknown=unknown,
    )


def numbers(found: Cost) -> dict[str, Any]:
    """The same as plain values, beside the paper's."""
    return {
        **asdict(found),
        "paper_base_flops": PAPER_FLOPS["base"],
        "paper_big_flops": PAPER_FLOPS["big"],
    }


def rows(found: Cost) -> list[dict[str, str]]:
    """A table's rows: ``name``, ``value`` and ``note``."""
    listed = [
        _row(
            "Operations, counted",
            _flops(found.counted_flops) or _unknown(found, "counted_flops"),
            ("reckoned from the model's shape and the tokens that were kept" if found.is_reckoned
             else "matrix products of the model, forward and backward, real tokens only, "
                  "what was done again included")
            if found.counted_flops is not None else "",
        ),
        _row(
            "Operations, the paper's method",
            _flops(found.paper_flops) or _unknown(found, "paper_flops"),
            f"training time × devices × sustained rate: {format_duration(found.training_s)} at "
            f"{_flops(found.sustained_flops)} a second, measured with a matrix product, all "
            "devices together" if found.paper_flops else "",
        ),
    ]  # fmt: skip
    if found.ratio is not None:
        listed.append(
            _row(
                "Counted over the paper's",
                f"{100 * found.ratio:.1f} %",
                "of what the devices sustain, the part that was the model's own work",
            )
        )
    listed.append(
        _row(
            "The paper's own models",
            f"{_flops(PAPER_FLOPS['base'])} base, {_flops(PAPER_FLOPS['big'])} big",
            _beside(found) or "Vaswani et al. 2017, Table 2",
        )
    )
    if found.peak_flops:
        source = f", {found.peak_source}" if found.peak_source else ""
        listed.append(
            _row("Peak rate", f"{_flops(found.peak_flops)} a second", f"all devices{source}")
        )
    listed += [
        _row(
            "Device-hours, training",
            _hours(found.device_hours),
            "training time × workers; a device is one worker's: a GPU, or its share of a CPU",
        ),
        _row(
            "Device-hours, held",
            _hours(found.held_device_hours),
            f"{format_duration(found.held_s)} from the first logged line to the last, restarts "
            "included; neither start-up before it nor evaluations",
        ),
        _row(
            "Energy",
            f"{found.energy_kwh:.4g} kWh"
            if found.energy_kwh is not None
            else _unknown(found, "energy_joules"),
            f"{format_number(found.energy_joules)} J by the machines' counters"
            if found.energy_joules is not None
            else "",
        ),
    ]
    if found.price is not None:
        listed.append(
            _row(
                "Price",
                f"{found.price:,.2f} {found.currency}",
                f"at {found.rate:g} {found.currency} a device-hour held",
            )
        )
    return listed


def _row(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _flops(value: float | None) -> str:
    return "" if value is None else format_power(value)


def format_flops(value: float | None) -> str:
    """Operations, or a dash."""
    return _flops(value) or "–"


def _hours(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _unknown(found: Cost, key: str) -> str:
    return f"not known: {found.unknown[key]}"


def _beside(found: Cost) -> str:
    own = found.paper_flops or found.counted_flops
    if not own:
        return ""
    times = PAPER_FLOPS["base"] / own
    how = "by the same method" if found.paper_flops else "by count"
    many = f"{format_number(times)} times this run" if times >= 1 else f"{times:.2g} of this run"
    return f"Vaswani et al. 2017, Table 2; base is {many}, {how}"


def _gained(log: RunLog, key: str) -> float | None:
    """A sum over all attempts, what was undone included; None where an attempt did not log it."""
    told = [found for attempt in log.attempts if (found := attempt.has_logged(key)) is not None]
    if not told or not all(told):
        return None
    return sum(attempt.gained(key) for attempt in log.attempts)


def _by_the_papers_method(attempts: list[Attempt]) -> float | None:
    total = 0.0
    for attempt in attempts:
        rate = attempt.start.get("sustained_flops")
        if rate is None and attempt.training_s > 0:
            return None
        total += attempt.training_s * (rate or 0.0)
    return total or None


def _reckoned(log: RunLog) -> float | None:
    """Of the kept steps, for logs of versions that did not count."""
    manifest = log.manifest
    last = log.totals
    tokens = (last.get("source_tokens") or 0) + (last.get("target_tokens") or 0)
    if manifest is None or not tokens:
        return None
    source, target = np.asarray(manifest.lengths, dtype=np.float64).T
    work = Work(
        source=float(source.sum()),
        target=float(target.sum()),
        source_source=float(source @ source),
        source_target=float(source @ target),
        target_target=float(target @ target),
    )
    an_epoch = training_flops(log.config.model, work, vocab_size=manifest.vocabulary_size)
    return an_epoch * tokens / (work.source + work.target)


def _held(log: RunLog) -> list[tuple[float, int]]:
    """Seconds that devices were held, and how many; a restart belongs to what came after it.

    Where a run was given up, or its command ended, and another went on with it later, nobody held
    them between: only up to the last line before.
    """
    found: list[tuple[float, float, int]] = []  # seconds held, seconds of training, devices
    before: Attempt | None = None
    for attempt in log.attempts:
        found += [
            (seconds, 0.0, (before or attempt).num_workers)
            for seconds in _held_in_vain(attempt.given_up, before)
        ]
        found.append((_held_by(attempt, before), attempt.training_s, attempt.num_workers))
        before = attempt
    if before is not None:
        rest = _held_in_vain(log.failed_since, before)
        found += [(seconds, 0.0, before.num_workers) for seconds in rest]
    # A log that was copied together may have odd times; training time is the least.
    is_odd = sum(held for held, *_ in found) < sum(trained for _, trained, _ in found)
    return [(max(held, trained) if is_odd else held, count) for held, trained, count in found]


def _held_by(attempt: Attempt, before: Attempt | None) -> float:
    start, end = attempt.began_at, attempt.ended_at
    if start is None or end is None:
        return attempt.training_s
    if attempt.failures:
        since = before.ended_at if before and not attempt.given_up else None
        failed_at = moment(attempt.failures[0]) if since is None else since
        start = start if failed_at is None else min(start, failed_at)
    return max(0.0, end - start)


def _held_in_vain(parts: list[list[Event]], before: Attempt | None) -> list[float]:
    """Seconds of restarts that led to nothing; the first part follows the attempt ``before``."""
    found = []
    for number, part in enumerate(parts):
        end = last_moment(part)
        start = moment(part[0]) if part else None
        if number == 0 and before is not None and before.ended_at is not None:
            start = before.ended_at
        found.append(max(0.0, end - start) if end is not None and start is not None else 0.0)
    return found
