"""Tables over records: what every arm measured, and leaderboards case by case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nervure.spec import Record, Status
from nervure.stats import Row, leaderboard, t_interval


@dataclass(frozen=True)
class ArmRow:
    """Hold one metric of one arm over the seeds.

    Args:
        arm: The arm.
        metric: The metric.
        n: Number of seeds with a finite value.
        mean: Their mean.
        low: Lower end of the 95% t interval of the mean; NaN below two seeds.
        high: Upper end.
        values: Value by seed.
    """

    arm: str
    metric: str
    n: int
    mean: float
    low: float
    high: float
    values: dict[int, float] = field(default_factory=dict)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, low and high of the 95% t interval; NaN ends below two values.

    Args:
        values: Finite values.

    Returns:
        Mean, low, high.
    """
    mean = sum(values) / len(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    found = t_interval(list(values))
    return mean, float(found.low), float(found.high)


def arm_rows(records: Sequence[Record]) -> list[ArmRow]:
    """Return every final metric of every arm, in the order they were first measured.

    Args:
        records: Records of one claim or case.

    Returns:
        The rows.
    """
    collected: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        for arm, metrics in record.values().items():
            for metric, value in metrics.items():
                collected.setdefault((arm, metric), {})[record.job.seed] = value
    rows = []
    for (arm, metric), values in collected.items():
        finite = [value for value in values.values() if math.isfinite(value)]
        rows.append(ArmRow(arm, metric, len(finite), *interval(finite), values))
    return rows


@dataclass(frozen=True)
class CaseTable:
    """Hold the leaderboard of one case.

    Args:
        case: The case's name.
        unit: What is counted: density, macs, params or bytes.
        share: The share of it that stays.
        rows: The arms, best first.
        spread: Arm -> (mean, low, high) of the metric itself.
        problems: Arm -> first error text of its failed seeds.
    """

    case: str
    unit: str
    share: float
    rows: list[Row]
    spread: dict[str, tuple[float, float, float]]
    problems: dict[str, str]


def case_tables(records: Sequence[Record], *, metric: str, baseline: str) -> list[CaseTable]:
    """Return one leaderboard a share; the dense network's record stands in every one of them.

    Args:
        records: Records of one comparison.
        metric: What is compared; higher is better.
        baseline: The arm the others are compared with.

    Returns:
        The tables, the largest share first.
    """
    dense = [record for record in records if record.job.arm == "dense"]
    cases: dict[str, list[Record]] = {}
    for record in records:
        if record.job.arm != "dense":
            cases.setdefault(record.job.case, []).append(record)
    tables = []
    for case, found in cases.items():
        problems = {
            record.job.arm: (record.error or str(record.status)).splitlines()[0]
            for record in found
            if record.status is not Status.DONE
        }
        # The dense network has no share of its own: its records stand in every case.
        alike = [record.replace(job=replace(record.job, case=case)) for record in dense]
        together = [*alike, *found]
        unsupported = {arm for arm, text in problems.items() if text.startswith("Unsupported")}
        ranked = [record for record in together if record.job.arm not in unsupported]
        arms = {record.job.arm for record in ranked if record.values()}
        against = baseline if baseline in arms else min(arms, default=baseline)
        rows = leaderboard(ranked, metric=metric, better="higher", baseline=against) if arms else []
        spread = {row.arm: (row.mean, row.low, row.high) for row in arm_rows(ranked) if row.metric == metric}
        unit = str(found[0].job.params.get("unit", "density"))
        share = float(found[0].job.params["density" if unit == "density" else "share"])
        tables.append(CaseTable(case, unit, share, rows, spread, problems))
    return sorted(tables, key=lambda table: -table.share)
