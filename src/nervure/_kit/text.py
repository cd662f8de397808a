"""Text for people: sizes, durations and spelling suggestions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


def seconds_text(seconds: float) -> str:
    """Write a duration the way people say it.

    Args:
        seconds: The duration, at least 0.

    Returns:
        For example ``'0.3 s'``, ``'42 s'``, ``'3 min 05 s'``.

    Examples:
        >>> seconds_text(185)
        '3 min 05 s'
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(count: float) -> str:
    """Write a number of bytes with a unit.

    Args:
        count: The number of bytes.

    Returns:
        For example ``'1.1 MB'``.

    Examples:
        >>> bytes_text(1_064_960)
        '1.1 MB'
    """
    if abs(count) < 1000:
        return f"{count:.0f} B"
    power = min(3, int(math.log10(abs(count))) // 3)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def did_you_mean(word: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """Return the known words nearest to a misspelt one.

    Args:
        word: What was asked for.
        known: The words that exist.
        most: How many suggestions at most.

    Returns:
        The nearest known words, best first; empty when none is near.

    Examples:
        >>> did_you_mean("lotery-tiket", ["lottery-ticket", "ewc"])
        ['lottery-ticket']
    """
    names = list(known)
    starts = [name for name in names if word and name.startswith(word)]
    near = difflib.get_close_matches(word, names, n=most, cutoff=0.55)
    return list(dict.fromkeys(starts + near))[:most]
