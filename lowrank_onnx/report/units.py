"""Numbers and names as people read them; every function takes null (None, NaN, infinity) as a dash."""

import math
from collections.abc import Iterable
from typing import Any

DASH = "–"
NBSP = "\N{NO-BREAK SPACE}"


def finite(value: Any) -> float | None:
    """Return a number as float, or None for null, NaN, infinity and what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def significant(value: Any, digits: int = 3) -> str:
    """Return a number with so many significant digits: 1,235, 41.2, 0.0031, 2.1e-07."""
    number = finite(value)
    if number is None:
        return DASH
    if number == 0:
        return "0"
    if abs(number) < 1e-4 or abs(number) >= 1e7:
        return _minus(f"{number:.{digits - 1}e}")
    exponent = int(f"{number:.{digits - 1}e}".partition("e")[2])  # of the rounded number: 0.9996 is 1.00
    decimals = max(0, digits - 1 - exponent)
    return _minus(f"{number:,.{decimals}f}")


def count(value: Any, digits: int = 3) -> str:
    """Return a count with a decimal suffix: 812, 590k, 85.1M, 11.2G."""
    return _scaled(value, ("", "k", "M", "G", "T", "P"), digits, "")


def size(value: Any, digits: int = 4) -> str:
    """Return bytes in decimal units: 812 B, 438.0 MB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"), digits, NBSP)


def ratio(value: Any) -> str:
    """Return a ratio: two decimals, more below 0.1."""
    number = finite(value)
    if number is None:
        return DASH
    return f"{number:.2f}" if number >= 0.1 or number == 0 else significant(number, 2)


def percent(value: Any, digits: int = 2) -> str:
    """Return a share or relative error, 0.041, as 4.1 %."""
    number = finite(value)
    return DASH if number is None else f"{significant(100 * number, digits)}{NBSP}%"


def change(relative_drop: Any) -> str:
    """Return a relative drop (positive is worse) as a signed change: 0.004 is −0.40 %."""
    drop = finite(relative_drop)
    if drop is None:
        return DASH
    gained = -100 * drop
    if abs(gained) < 0.005:
        return "unchanged"
    return f"{'+' if gained > 0 else '−'}{abs(gained):.{1 if abs(gained) >= 10 else 2}f}{NBSP}%"


def duration(seconds: Any) -> str:
    """Return a time span: 0.31 s, 12.3 s, 3 min 12 s, 1 h 04 min."""
    number = finite(seconds)
    if number is None:
        return DASH
    if number < 60:
        return f"{significant(number, 3 if number >= 1 else 2)}{NBSP}s"
    minutes, rest = divmod(round(number), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def latency(state: Any) -> str:
    """Return a latency object of the report, in ms: the median and, in brackets, the interquartile range."""
    if not state or finite(state.get("median")) is None:
        return DASH
    spread = finite(state.get("iqr"))
    median = f"{significant(state['median'])}{NBSP}ms"
    return median if spread is None else f"{median} (IQR{NBSP}{significant(spread, 2)})"


def shape(dimensions: Iterable[Any] | None) -> str:
    """Return (768, 3072) as 768×3072."""
    return "×".join(str(size) for size in dimensions or ()) or DASH


def ranks(values: Iterable[Any] | None) -> str:
    """Return ranks as a list: 64, 96."""
    return ", ".join(str(value) for value in values or ()) or DASH


def plural(number: int, noun: str) -> str:
    """Return 1 layer, 2 layers."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def plain(text: Any) -> str:
    """Return text without what moves a cursor, turns the writing direction or cannot be shown.

    Model files name their nodes freely: escape sequences, line ends and bidirectional controls become U+FFFD.
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in str(text))


def _scaled(value: Any, suffixes: tuple[str, ...], digits: int, gap: str) -> str:
    number = finite(value)
    if number is None:
        return DASH
    if abs(number) < 1000:
        return _minus(f"{number:.0f}{gap}{suffixes[0]}".rstrip())
    # 999,600 is 1.00M, not 1000k.
    step = next((step for step in range(1, len(suffixes)) if abs(number) / 1000**step < 999.5), len(suffixes) - 1)
    return f"{significant(number / 1000**step, digits)}{gap}{suffixes[step]}"


def _minus(text: str) -> str:
    # Only the sign: the exponent of 2.1e-07 keeps its hyphen, as one types it.
    return "−" + text[1:] if text.startswith("-") else text
