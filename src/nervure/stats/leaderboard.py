"""The rank table of many methods against one baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from nervure._kit import UsageError
from nervure.spec import Outcome, Record, Status
from nervure.stats.intervals import LEVEL, t_interval
from nervure.stats.multiplicity import holm
from nervure.stats.table import newest, tabulate


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold one arm's place in a leaderboard.

    Args:
        rank: 1 for the best mean; equal means share a rank.
        arm: The arm.
        n: Number of seeds.
        failed: The seeds without a finite value; they count as the worst value any arm had.
        mean: Mean of the metric.
        difference: Mean paired difference against the baseline, signed so that positive is better.
        low: Lower end of its unadjusted 95% interval.
        high: Upper end.
        p: Holm-adjusted two-sided p value.
        outcome: *holds* if the arm is better than the baseline after Holm's correction, *does not hold* if it is
            worse, else *inconclusive*, as is every arm with a failed seed.
    """

    rank: int
    arm: str
    n: int
    failed: tuple[int, ...]
    mean: float
    difference: float
    low: float
    high: float
    p: float
    outcome: Outcome


def leaderboard(
    records: Sequence[Record], *, metric: str, better: Literal["higher", "lower"], baseline: str
) -> list[Row]:
    """Rank the arms by their mean and compare each with the baseline, paired by seed.

    Args:
        records: Records of one target and case, oldest first.
        metric: The metric to rank by.
        better: Whether higher or lower is better.
        baseline: The arm every other is compared with.

    Returns:
        The rows, best first; the baseline's own row has no difference (0, with p = 1).

    Raises:
        UsageError: If the baseline, or the metric, was never measured.
    """
    kept = newest(records)
    table = tabulate(kept)
    columns = {arm: column for (arm, name), column in table.items() if name == metric}
    for record in kept:
        if record.status is not Status.DONE and record.job.arm != "*":
            columns.setdefault(record.job.arm, {})
    if baseline not in columns:
        raise UsageError(f"the baseline {baseline!r} has no {metric!r}", expected=f"one of {sorted(columns)}")
    arms, seeds = sorted(columns), sorted({record.job.seed for record in kept})
    sign = 1.0 if better == "higher" else -1.0
    values = np.array([[sign * columns[arm].get(seed, np.nan) for seed in seeds] for arm in arms])
    there = np.isfinite(values)
    if not there.any():
        raise UsageError(f"no arm has a finite {metric!r}", try_="look at the records' errors")
    values = np.where(there, values, values[there].min())
    return _rows(arms, seeds, values, sign, arms.index(baseline), [[*map(bool, row)] for row in there])


def _rows(
    arms: list[str], seeds: list[int], values: np.ndarray, sign: float, base: int, there: list[list[bool]]
) -> list[Row]:
    mean = values.mean(-1)
    interval = t_interval(values - values[base])
    compared = [i for i in range(len(arms)) if i != base]
    complete = np.array([all(row) for row in there]) & all(there[base])
    raw = np.where(complete, _two_sided(values - values[base]), 1.0)
    p = np.ones(len(arms))
    p[compared] = holm(raw[compared])
    clear = p < 1 - LEVEL
    rows = []
    for i in np.argsort(-mean, kind="stable"):
        outcome = Outcome.INCONCLUSIVE
        if clear[i]:
            outcome = Outcome.HOLDS if interval.mean[i] > 0 else Outcome.DOES_NOT_HOLD
        rows.append(
            Row(
                rank=1 + int((mean > mean[i]).sum()),
                arm=arms[i],
                n=len(seeds),
                failed=tuple(seed for seed, here in zip(seeds, there[i], strict=True) if not here),
                mean=sign * float(mean[i]),
                difference=float(interval.mean[i]) if i != base else 0.0,
                low=float(interval.low[i]) if i != base else 0.0,
                high=float(interval.high[i]) if i != base else 0.0,
                p=float(p[i]),
                outcome=outcome,
            )
        )
    return rows


def _two_sided(differences: np.ndarray) -> np.ndarray:
    """Return the paired t test's two-sided p; equal differences give 0, or 1 where they are zero."""
    n = differences.shape[-1]
    if n < 2:
        return np.ones(differences.shape[:-1])
    mean, low, _ = t_interval(differences)
    error = (mean - low) / special.stdtrit(n - 1, (1 + LEVEL) / 2)
    t = np.divide(np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    return np.asarray(2 * special.stdtr(n - 1, -t))
