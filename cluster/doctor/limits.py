"""What the doctor's checks share: a limit on how long to wait, and text for people."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from cluster.checks import Check

_Result = TypeVar("_Result")

# Whoever sends SIGTERM may send SIGKILL soon: Ray after three seconds.
_INTERRUPTED_S = 1.0

_INDENT = " " * 11 + "-> "


class TimedOutError(Exception):
    """It took too long; it may still be going on, in a thread that nothing waits for."""


def limited(seconds: float, call: Callable[[], _Result]) -> _Result:
    """What ``call`` returns or raises, if it does so in time.

    A storage or a name server that hangs must not hang the doctor.

    Raises:
        TimedOutError: it did not.
    """
    result: list[_Result] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            raised.append(error)
        finally:
            done.set()

    done = threading.Event()  # Python 3.11 takes a thread for ended whose join was interrupted
    threading.Thread(target=work, name="doctor", daemon=True).start()
    try:
        done.wait(seconds)
    except BaseException:  # interrupted: what it writes now should be removed, too
        done.wait(_INTERRUPTED_S)
        raise
    if not done.is_set():
        raise TimedOutError
    if raised:
        raise raised[0]
    return result[0]


def number(value: float) -> str:
    """With a decimal prefix, three digits: ``1.5 G``; a unit follows at once."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    digits = 0 if value >= 100 or (not prefix and value == int(value)) else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {prefix}"


def duration(seconds: float) -> str:
    """In the unit that suits: ``12 us``, ``3.4 ms``, ``1.2 s``, ``3 min``."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    return f"{seconds * 1e6:.0f} us"


def told(check: Check) -> str:
    """A check for a person, its name in a column."""
    mend = f"\n{_INDENT}{check.mend}" if check.mend else ""
    return f"  {check.outcome:<7}  {check.name:<19} {check.found}{mend}"


def summary(counts: Mapping[str, int]) -> str:
    """How it went, and what now."""
    ok, warnings, failed = (counts[outcome] for outcome in ("ok", "warning", "failure"))
    some = [f"{ok} ok"]
    some += [f"{warnings} warning{'s' * (warnings > 1)}"] if warnings else []
    some += [f"{failed} failure{'s' * (failed > 1)}"] if failed else []
    end = "mend what failed and run this again" if failed else "nothing stands in a run's way"
    return f"{', '.join(some)}: {end}"
