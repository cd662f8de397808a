"""Tables over records: what every arm measured, and leaderboards case by case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

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
        unit: What is counted: density, macs, params or bytes; empty where nothing is made smaller.
        share: The share of it that stays; NaN where nothing is made smaller.
        rows: The arms, best first.
        spread: Arm -> (mean, low, high) of the metric itself.
        problems: Arm -> first error text of its failed seeds.
        levels: The arms that keep everything and therefore stand in every case, such as the dense network.
        means: Arm -> metric -> mean over the seeds, of whatever else was measured.
        baseline: The arm the others are compared with.
        ends: Arm -> metric -> (low, high) of the 95% interval of that mean.
    """

    case: str
    unit: str
    share: float
    rows: list[Row]
    spread: dict[str, tuple[float, float, float]]
    problems: dict[str, str]
    levels: list[str] = field(default_factory=list)
    means: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: str = ""
    ends: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """What stands over the table."""
        return f"{self.unit} {100 * self.share:g}%" if self.unit else self.case


@dataclass(frozen=True, kw_only=True)
class Board:
    """Hold a comparison, ready to be shown.

    Args:
        name: Stem of its files.
        title: Title of the page.
        metric: What is compared.
        protocol: Rule, draws, seeds, budget and kind of interval in a sentence or two.
        command: The command that repeats it.
        tables: One leaderboard a share or case.
        records: Their records.
        columns: Metric -> heading of what else is tabulated, means over the seeds.
        layers: What the metrics of single layers begin with.
    """

    name: str
    title: str
    metric: str
    protocol: str
    command: str
    tables: Sequence[CaseTable]
    records: Sequence[Record]
    columns: Mapping[str, str] = field(default_factory=dict)
    layers: str = ""

    @property
    def shown_columns(self) -> dict[str, str]:
        """Return the columns something was measured for."""
        measured = {name for table in self.tables for found in table.means.values() for name in found}
        return {name: head for name, head in self.columns.items() if name in measured}


def _share(record: Record) -> float:
    params = record.job.params
    return float(params["share"] if "share" in params else params["density"])


def case_tables(records: Sequence[Record], *, metric: str, baseline: str) -> list[CaseTable]:
    """Return one leaderboard a share; records of arms that keep everything stand in every one of them.

    Args:
        records: Records of one comparison.
        metric: What is compared; higher is better.
        baseline: The arm the others are compared with.

    Returns:
        The tables, the largest share first.
    """
    whole = [record for record in records if _share(record) == 1]
    cases: dict[str, list[Record]] = {}
    for record in records:
        if _share(record) < 1:
            cases.setdefault(record.job.case, []).append(record)
    tables = []
    for case, found in cases.items():
        # What keeps everything has no share of its own.
        alike = [record.replace(job=replace(record.job, case=case)) for record in whole]
        together = [*alike, *found]
        table = _table(case, together, metric=metric, better="higher", baselines=(baseline,))
        levels = list(dict.fromkeys(record.job.arm for record in alike if record.job.arm in table.means))
        unit = str(found[0].job.params.get("unit", "density"))
        tables.append(replace(table, unit=unit, share=_share(found[0]), levels=levels))
    return sorted(tables, key=lambda table: -table.share)


def contest_tables(
    records: Sequence[Record], *, metric: str, better: Literal["higher", "lower"], baselines: Sequence[str]
) -> list[CaseTable]:
    """Return one leaderboard a case, in the order of the records.

    Args:
        records: Records of one contest; a job may have measured several arms.
        metric: What is compared.
        better: Whether higher or lower is better.
        baselines: The arms the others are compared with: in each case the first that took part.

    Returns:
        The tables of the cases in which anything was measured.
    """
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record.job.case, []).append(record)
    return [_table(case, found, metric=metric, better=better, baselines=baselines) for case, found in cases.items()]


def _table(
    case: str, records: Sequence[Record], *, metric: str, better: Literal["higher", "lower"], baselines: Sequence[str]
) -> CaseTable:
    problems = {
        record.job.arm: (record.error or str(record.status)).splitlines()[0]
        for record in records
        if record.status is not Status.DONE
    }
    unsupported = {arm for arm, text in problems.items() if text.startswith("Unsupported")}
    ranked = [record for record in records if record.job.arm not in unsupported]
    arms = {arm: None for record in ranked for arm in record.values()}
    against = next((arm for arm in baselines if arm in arms), min(arms, default=baselines[0]))
    rows = leaderboard(ranked, metric=metric, better=better, baseline=against) if arms else []
    measured = arm_rows(ranked)
    spread = {row.arm: (row.mean, row.low, row.high) for row in measured if row.metric == metric}
    means: dict[str, dict[str, float]] = {}
    ends: dict[str, dict[str, tuple[float, float]]] = {}
    for row in measured:
        means.setdefault(row.arm, {})[row.metric] = row.mean
        ends.setdefault(row.arm, {})[row.metric] = (row.low, row.high)
    return CaseTable(case, "", math.nan, rows, spread, problems, [], means, against, ends)


def no_faster(table: CaseTable, *, against: str = "dense", by: float = 0.05) -> list[str]:
    """Return the arms that save no time over another at batch 64.

    Args:
        table: A leaderboard.
        against: The arm they should be faster than.
        by: Share of its milliseconds that counts as saved.

    Returns:
        Their names; none where nobody measured milliseconds.

    Examples:
        >>> means = {"dense": {"ms_64": 2.0}, "masked": {"ms_64": 2.1}, "cut": {"ms_64": 1.0}}
        >>> no_faster(CaseTable("x", "macs", 0.5, [], {}, {}, [], means))
        ['masked']
    """
    whole = table.means.get(against, {}).get("ms_64", math.nan)
    timed = {arm: found["ms_64"] for arm, found in table.means.items() if arm != against and "ms_64" in found}
    return [arm for arm, took in timed.items() if took > (1 - by) * whole]
