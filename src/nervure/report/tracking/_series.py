"""The numbers of records as named series with whole steps, which is what trackers take."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from nervure.spec import Record

_STRANGE = re.compile(r"[^A-Za-z0-9_. -]")
_LONGEST = 60


def plain_names(texts: Iterable[str]) -> dict[str, str]:
    """Return a name without strange characters for every text, no two alike.

    Args:
        texts: The texts.

    Returns:
        Text -> name of letters, digits, spaces, ``_``, ``.`` and ``-``, at most 60 characters; what was changed
        beyond recognition or would be like another gets a few digits of its hash.

    Examples:
        >>> plain_names(["a/b", "a b", "..", "é"])
        {'a/b': 'a_b', 'a b': 'a b', '..': '_-5ec1f7', 'é': '_-4a9955'}
    """
    named = {text: _STRANGE.sub("_", text).strip(". ") for text in dict.fromkeys(texts)}
    # Some file systems take capital letters for small ones.
    alike = Counter(name.casefold() for name in named.values())
    unchanged = Counter(name.casefold() for text, name in named.items() if name == text)
    found = {}
    for text, name in named.items():
        alone = alike[name.casefold()] == 1 or (name == text and unchanged[name.casefold()] == 1)
        clear = alone and bool(name.strip("_")) and len(name) <= _LONGEST
        digits = hashlib.sha256(text.encode()).hexdigest()[:6]
        found[text] = name if clear else f"{name[: _LONGEST - 7].strip('. _') or '_'}-{digits}"
    return found


def series(record: Record) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return the curves of a record.

    Args:
        record: The record.

    Returns:
        (arm, metric) -> points of step and value; where a curve has steps between whole numbers, its points are
        counted instead.
    """
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in record.measurements:
        if point.step is not None:
            curves.setdefault((point.arm, point.metric), []).append((point.step, point.value))
    return {
        name: [(int(step), value) for step, value in points]
        if all(step == int(step) for step, _ in points)
        else [(place, value) for place, (_, value) in enumerate(points)]
        for name, points in curves.items()
    }


def by_case(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    """Return records by the case of their jobs; the key is empty where there is one case only."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.job.case, []).append(record)
    return found if len(found) > 1 else {"": list(records)}


def seconds(record: Record) -> float:
    """Return when a record began, in seconds since 1970; 0 where it does not say."""
    if not record.started:
        return 0.0
    began = datetime.fromisoformat(record.started)
    return (began if began.tzinfo else began.replace(tzinfo=UTC)).timestamp()
