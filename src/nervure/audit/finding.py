"""What a check says: a measured number with its interval, its meaning, and a way on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest

Level = Literal["ok", "note", "warning", "problem", "cannot tell"]
Certainty = Literal["exact", "high", "medium", "low"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "problem")


@dataclass(frozen=True)
class Remedy:
    """Name a method that addresses a finding.

    Args:
        card: The paper's id in the catalogue; empty where no paper is needed.
        advice: What to do, in a sentence.
        command: The command that does it or shows how; empty where it is done by hand.
    """

    card: str
    advice: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Hold what one check found.

    Args:
        check: Name of the check.
        level: ``"ok"``, ``"note"``, ``"warning"``, ``"problem"``, or ``"cannot tell"``.
        measured: What was measured, on how much data, with its interval.
        meaning: What that means for the network.
        certainty: How sure the meaning is: ``"exact"`` follows from the numbers, ``"low"`` is a rule of thumb.
        remedy: The method that would address it, if any.
        values: The numbers, by name.
        layers: Module -> number, where the check looks at every layer.
        unit: What the numbers of the layers are.
    """

    check: str
    level: Level
    measured: str
    meaning: str
    certainty: Certainty = "high"
    remedy: Remedy | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""


@dataclass(frozen=True)
class Audit:
    """Hold all findings on one network.

    Args:
        model: The network's name.
        data: The data's name; empty without.
        findings: In the order of the checks.
        notes: What a reader must know of how it was looked at.
        seconds: How long each check took.
    """

    model: str
    data: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    def at_least(self, level: Level) -> tuple[Finding, ...]:
        """Return the findings at or above a level; "cannot tell" is below all.

        Args:
            level: ``"note"``, ``"warning"`` or ``"problem"``.

        Returns:
            The findings.
        """
        rank = {name: place for place, name in enumerate(LEVELS)}
        return tuple(one for one in self.findings if rank.get(one.level, -1) >= rank[level])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Audit:
        """Rebuild an audit from `to_json`; a number that was not finite is NaN.

        Args:
            value: What `to_json` returned, as it came back from a file.

        Returns:
            The audit.
        """
        return cls(
            model=value["model"],
            data=value["data"],
            findings=tuple(_finding(one) for one in value["findings"]),
            notes=tuple(value["notes"]),
            seconds=_numbers(value["seconds"]),
        )


def _finding(value: Mapping[str, Any]) -> Finding:
    remedy = Remedy(**value["remedy"]) if value["remedy"] is not None else None
    numbers = {name: _numbers(value[name]) for name in ("values", "layers")}
    return Finding(**{**value, "remedy": remedy, **numbers})


def _numbers(value: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if number is None else number for name, number in value.items()}


def share(right: int, total: int) -> tuple[float, float, float]:
    """Return a share and its 95% interval of Clopper and Pearson.

    Args:
        right: How many.
        total: Out of how many, at least 1.

    Returns:
        Share, low, high.

    Examples:
        >>> [round(x, 2) for x in share(8, 10)]
        [0.8, 0.44, 0.97]
    """
    interval = binomtest(right, total).proportion_ci(0.95)
    return right / total, float(interval.low), float(interval.high)


def spread(values: Any, *, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """Return a mean and its 95% percentile bootstrap interval.

    Args:
        values: Numbers of independent samples.
        seed: Draws the resamples.
        draws: How many.

    Returns:
        Mean, low, high; NaN where there are no numbers.
    """
    given = np.asarray(values, dtype=float)
    if not len(given):
        return math.nan, math.nan, math.nan
    source = np.random.default_rng(seed)
    means = [given[source.integers(len(given), size=len(given))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(given.mean()), float(low), float(high)
