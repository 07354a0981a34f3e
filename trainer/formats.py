"""Numbers, times and sizes as a person would say them."""

from __future__ import annotations

import time

_NOTHING = "–"


def format_number(value: float | None) -> str:
    """Three digits of a large or a broken number, all of a small whole one: 12.3k; 1,234; 0.42."""
    if value is None:
        return _NOTHING
    size = abs(value)
    # The bounds are where three digits round up to the next unit.
    for bound, scale, unit in ((9.995e8, 1e9, "B"), (9.995e5, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= bound:
            scaled = value / scale
            return f"{scaled:.3g}{unit}" if abs(scaled) < 999.5 else f"{scaled:,.0f}{unit}"
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if size >= 100 else f"{value:.3g}"


def format_power(value: float) -> str:
    """Three digits and a power of ten, as papers write operations: 3.3·10¹⁸."""
    mantissa, exponent = f"{value:.2e}".split("e")
    if abs(int(exponent)) <= 3:
        return f"{value:g}"
    return f"{float(mantissa):g}·{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """As it is typeset: 10¹⁸."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def format_score(value: float | None) -> str:
    """BLEU and its like, as papers give them: 27.30."""
    return _NOTHING if value is None else f"{value:.2f}"


def format_share(value: float | None) -> str:
    """A part of 1 in per cent: 41.7 %."""
    return _NOTHING if value is None else f"{100 * value:.1f} %"


def format_duration(seconds: float | None) -> str:
    """Seconds as two units at most: 9.4 s; 8 min 41 s; 3 h 5 min; 2 d 4 h."""
    if seconds is None:
        return _NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def format_bytes(num_bytes: float) -> str:
    """Bytes in powers of 1000."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:,.3g} {unit}"
    return f"{num_bytes:.0f} B"


def format_moment(seconds: float | None) -> str:
    """Unix seconds as a date and a time, UTC."""
    if seconds is None:
        return _NOTHING
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
