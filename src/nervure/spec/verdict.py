"""The verdict: a view over Records, never stored as truth."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nervure.spec.claim import Check


class Outcome(enum.StrEnum):
    """Say what a check or a claim came to."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    INCONCLUSIVE = "inconclusive"
    VOID = "void"

    @property
    def exit_code(self) -> int:
        """Return 0 for *holds*, 1 for everything that was not shown to hold."""
        return 0 if self is Outcome.HOLDS else 1


class Reading(NamedTuple):
    """Hold a check's numbers for display.

    Args:
        mean: Mean value or difference.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        asked: What is asked of it, such as ``"at most 1.5"``.
        bound: The number in it.
        seeds: The values by seed.
    """

    mean: float
    low: float
    high: float
    asked: str
    bound: float
    seeds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """Hold one check's paired interval.

    Args:
        check: The check.
        outcome: What it came to.
        n: Number of seeds that gave a difference.
        mean: Mean paired difference, signed so that positive speaks for the method.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        differences: The paired differences by seed.
        reason: Why it is inconclusive, where that is not the interval alone.
    """

    check: Check
    outcome: Outcome
    n: int
    mean: float
    low: float
    high: float
    differences: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def reading(self) -> Reading:
        """Return the numbers as a reader expects them: a bound on a value in the value's own sign."""
        if self.check.control is None and self.check.better == "lower":
            mean, low, high, bound = (0.0 - value for value in (self.mean, self.high, self.low, self.check.margin))
            seeds = tuple(0.0 - value for value in self.differences.values())
            return Reading(mean, low, high, f"at most {bound:g}", bound, seeds)
        seeds = tuple(self.differences.values())
        return Reading(self.mean, self.low, self.high, f"at least {self.check.margin:g}", self.check.margin, seeds)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Hold the verdict on one claim.

    Args:
        claim_id: ``card-id/claim-name``.
        statement: What was claimed.
        outcome: The joint outcome: all checks must hold; a passing sabotage voids the claim.
        checks: The checks' results.
        sabotage: For each sabotaged arm, the outcome with it in the method's place.
        seeds: The seeds used.
        quick: Whether the run was scaled down, so that the verdict is only a rehearsal.
        notes: Sentences a reader must know: failed seeds, scaled-down budgets.
    """

    claim_id: str
    statement: str
    outcome: Outcome
    checks: tuple[CheckResult, ...]
    sabotage: Mapping[str, Outcome] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    quick: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values."""
        return {
            "claim": self.claim_id,
            "statement": self.statement,
            "outcome": str(self.outcome),
            "quick": self.quick,
            "seeds": list(self.seeds),
            "sabotage": {arm: str(outcome) for arm, outcome in self.sabotage.items()},
            "notes": list(self.notes),
            "checks": [
                {
                    "name": result.check.name,
                    "method": result.check.method,
                    "control": result.check.control,
                    "metric": result.check.metric,
                    "better": result.check.better,
                    "rule": result.check.rule,
                    "margin": result.check.margin,
                    "asked": result.reading.asked,
                    "outcome": str(result.outcome),
                    "n": result.n,
                    "mean": _finite(result.mean),
                    "low": _finite(result.low),
                    "high": _finite(result.high),
                    "differences": {str(seed): value for seed, value in result.differences.items()},
                    "reason": result.reason,
                }
                for result in self.checks
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Rebuild a verdict from `to_json`.

        Args:
            value: What `to_json` returned.

        Returns:
            The verdict.
        """
        return cls(
            claim_id=value["claim"],
            statement=value["statement"],
            outcome=Outcome(value["outcome"]),
            checks=tuple(_result(one) for one in value["checks"]),
            sabotage={arm: Outcome(outcome) for arm, outcome in value["sabotage"].items()},
            seeds=tuple(value["seeds"]),
            quick=value["quick"],
            notes=tuple(value["notes"]),
        )


def _result(value: Mapping[str, Any]) -> CheckResult:
    names = ("name", "method", "control", "metric", "better", "rule", "margin")
    numbers = {
        name: gone if value[name] is None else value[name]
        for name, gone in (("mean", math.nan), ("low", -math.inf), ("high", math.inf))
    }
    return CheckResult(
        check=Check(**{name: value[name] for name in names}),
        outcome=Outcome(value["outcome"]),
        n=value["n"],
        differences={int(seed): difference for seed, difference in value["differences"].items()},
        reason=value["reason"],
        **numbers,
    )


def _finite(value: float) -> float | None:
    """Return a number JSON has, or None."""
    return value if math.isfinite(value) else None
