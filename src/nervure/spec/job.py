"""Jobs go to workers, Records come back. Verdicts and leaderboards are views computed from Records."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Status(enum.StrEnum):
    """Say how a job ended. Failure is a result too and is stored like one."""

    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    OVER_BUDGET = "over-budget"


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN.

    Args:
        value: JSON-ready values.

    Returns:
        The text.

    Examples:
        >>> canonical_json({"b": 1, "a": (0.5, "x")})
        '{"a":[0.5,"x"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Name one unit of work so completely that its id is the hash of its own description.

    Args:
        target: ``"claim:<card>/<claim>"`` or ``"arena:<family>"``.
        arm: One arm, or ``"*"`` where the arms of a claim share a seed's work.
        case: The problem: model, data, cost point.
        seed: The seed; data order, initialisation and splits depend on (case, seed) only.
        params: Everything else that changes the result, JSON-ready.
        budget: Limits, such as ``{"seconds": 600}``.
    """

    target: str
    arm: str
    case: str
    seed: int
    params: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return the first 20 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:20]

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON-ready values."""
        return {
            "target": self.target,
            "arm": self.arm,
            "case": self.case,
            "seed": self.seed,
            "params": dict(self.params),
            "budget": dict(self.budget),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        """Rebuild a job from `to_json`.

        Args:
            value: What `to_json` returned.

        Returns:
            The job.
        """
        return cls(**{name: value[name] for name in ("target", "arm", "case", "seed", "params", "budget")})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Hold one measured number.

    Args:
        arm: The arm it belongs to.
        metric: Its name.
        value: The number; NaN and infinities are allowed and mean "worst".
        step: Position on a curve, or None for a final value.
    """

    arm: str
    metric: str
    value: float
    step: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; a number that JSON lacks becomes a string."""
        value: float | str = self.value if math.isfinite(self.value) else str(self.value)
        return {"arm": self.arm, "metric": self.metric, "value": value, "step": self.step}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """Rebuild a measurement from `to_json`.

        Args:
            value: What `to_json` returned.

        Returns:
            The measurement.
        """
        return cls(arm=value["arm"], metric=value["metric"], value=float(value["value"]), step=value["step"])


@dataclass(frozen=True, kw_only=True)
class Record:
    """Hold what came of a job. Append-only: a record is never changed.

    Args:
        job: The job.
        status: How it ended.
        measurements: What was measured, also by a job that failed half-way.
        cost: What was spent: seconds, steps, forwards, backwards, peak bytes.
        warnings: Warnings raised on the way.
        error: The error's text, if it failed.
        environment: Code version, torch version, threads, CPU. Not part of the job's id.
        started: Start time, ISO 8601 in UTC.
    """

    job: Job
    status: Status
    measurements: tuple[Measurement, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    started: str = ""

    def values(self) -> dict[str, dict[str, float]]:
        """Return the final values as arm -> metric -> value; points of curves are left out."""
        table: dict[str, dict[str, float]] = {}
        for point in self.measurements:
            if point.step is None:
                table.setdefault(point.arm, {})[point.metric] = point.value
        return table

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {
            "job": self.job.to_json(),
            "job_id": self.job.id,
            "status": str(self.status),
            "measurements": [point.to_json() for point in self.measurements],
            "cost": dict(self.cost),
            "warnings": list(self.warnings),
            "error": self.error,
            "environment": dict(self.environment),
            "started": self.started,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Rebuild a record from `to_json`.

        Args:
            value: What `to_json` returned.

        Returns:
            The record.
        """
        return cls(
            job=Job.from_json(value["job"]),
            status=Status(value["status"]),
            measurements=tuple(Measurement.from_json(point) for point in value["measurements"]),
            cost=value["cost"],
            warnings=tuple(value["warnings"]),
            error=value["error"],
            environment=value["environment"],
            started=value["started"],
        )

    def replace(self, **changes: Any) -> Record:
        """Return a copy with some fields changed.

        Args:
            **changes: The new values.

        Returns:
            The copy.
        """
        return dataclasses.replace(self, **changes)


@dataclass
class Notes:
    """Collect what a job measures as it goes, so that a failure keeps what came before it.

    Args:
        measurements: The numbers so far.
        cost: What was spent.
        warnings: Sentences a reader must know.
    """

    measurements: list[Measurement] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
