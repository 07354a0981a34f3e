"""Expressions that several panels share.

What holds for a whole run is served by the machine of its first rank, phases and ranks by every
machine, and the first rank may move: so everything is aggregated over the machines, and a query
never names one. The ``run`` label is matched against Grafana's variable ``$run``.
"""

from __future__ import annotations

RUN = 'run=~"$run"'
# Ray's targets and ours lie on different ports of a machine: the variable holds the host alone.
INSTANCE = 'instance=~"$instance(:[0-9]+)?"'
# Grafana's: at least four scrapes, wider when the picture is.
WINDOW = "$__rate_interval"


def babelray(name: str, *matchers: str) -> str:
    """A selector of one of our metrics, of the chosen runs."""
    return f"babelray_{name}{{{','.join((RUN, *matchers))}}}"


def newest(name: str, *matchers: str) -> str:
    """A run's gauge, from whichever machine serves it."""
    return f"max by (run) ({babelray(name, *matchers)})"


def rate(name: str, *matchers: str, by: str = "run", window: str = WINDOW) -> str:
    """A counter's growth a second, over all machines."""
    return f"sum by ({by}) (rate({babelray(name, *matchers)}[{window}]))"


def increase(name: str, *matchers: str, by: str = "run", window: str) -> str:
    """A counter's growth in the window, over all machines."""
    return f"sum by ({by}) (increase({babelray(name, *matchers)}[{window}]))"


def mean(name: str, *matchers: str, by: str = "run", window: str = WINDOW) -> str:
    """Mean of what a histogram observed in the window."""
    total, count = (
        rate(f"{name}_{part}", *matchers, by=by, window=window) for part in ("sum", "count")
    )
    return f"{total} / {count}"


def quantile(share: float, name: str, *matchers: str, by: str = "run", window: str = WINDOW) -> str:
    """Quantile of what a histogram observed in the window."""
    buckets = rate(f"{name}_bucket", *matchers, by=f"{by}, le", window=window)
    return f"histogram_quantile({share}, {buckets})"


def since(name: str) -> str:
    """Seconds since a time of the run, or since its command began if that is later.

    Before the first event its time is 0 or not there, and after a resume it may be an old one: then
    the beginning is what counts. A machine that is lost takes the time along: so six hours back.
    """
    began = newest("run_started_timestamp_seconds")
    last = f"max by (run) (max_over_time({babelray(name)}[6h]))"
    return f"time() - (({last} > {began}) or {began})"


def of_latest(name: str, time: str) -> str:
    """A gauge that outlives its rank, of the machine where ``time``, which does too, is latest."""
    when = babelray(time)
    latest = f"{when} == on (run) group_left () max by (run) ({when})"
    return f"max by (run) ({babelray(name)} and on (run, instance) ({latest}))"


def share_of_step(phase: str, by: str = "run", window: str = WINDOW) -> str:
    """Part of the ranks' time that went into a phase, 0 to 1."""
    part = rate("step_phase_seconds_sum", f'phase="{phase}"', by=by, window=window)
    whole = rate("step_phase_seconds_sum", by=by, window=window)
    return f"{part} / {whole}"


SINCE_STEP = since("last_step_timestamp_seconds")
SINCE_CHECKPOINT = since("last_checkpoint_timestamp_seconds")

# Steps that a failure now would cost, and the same in intervals between checkpoints.
STEPS_AT_RISK = f"({newest('position_steps')} - {newest('last_checkpoint_step')})"
INTERVALS_AT_RISK = f"{STEPS_AT_RISK} / {newest('checkpoint_interval_steps')}"

# The worst that holds, as a number: what HEALTH_STATES says. The same limits as in alerts.yaml.
_LOSS = babelray("loss_nats")
_VALIDATES = f"({newest('validating')} == 1)"
_STANDS = f"(({SINCE_STEP} > 600 unless on (run) {_VALIDATES}) or {SINCE_STEP} > 3600)"
HEALTH = (
    f"(({newest('run_lost')} unless on (run) {newest('run_started_timestamp_seconds')}) * 0 + 5)"
    f" or on (run) ({_STANDS} * 0 + 3)"
    f" or on (run) (count by (run) (({_LOSS} != {_LOSS}) or (abs({_LOSS}) == +Inf)) * 0 + 2)"
    f" or on (run) ((({INTERVALS_AT_RISK} > 2) and on (run) ({SINCE_CHECKPOINT} > 900)) * 0 + 1)"
    f" or on (run) ({_VALIDATES} * 0 + 4)"
    f" or on (run) ({SINCE_STEP}) * 0"
)
HEALTH_STATES = (
    (0, "healthy", "green"),
    (1, "checkpoint late", "orange"),
    (2, "loss not finite", "red"),
    (3, "no step", "red"),
    (4, "validating", "blue"),
    (5, "lost", "red"),
)
