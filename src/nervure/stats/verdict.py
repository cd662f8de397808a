"""The verdict on a claim: a pure function of its checks and the Records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from nervure._kit import UsageError
from nervure.spec import Check, CheckResult, Outcome, Record, Verdict
from nervure.stats.rule import FEWEST_FOR_EVERY_SEED, OUTCOMES, decide
from nervure.stats.table import Values, failures, newest, tabulate, usable

# Differences of decimal fractions miss a margin by rounding (0.89 - 0.9 < -0.01); this share of the values forgives it.
ROUNDING = 1e-12


class Claimed(Protocol):
    """Name what a verdict needs of a claim."""

    @property
    def id(self) -> str:
        """Return ``card-id/claim-name``."""

    @property
    def statement(self) -> str:
        """Return what is claimed, in one sentence."""

    @property
    def checks(self) -> tuple[Check, ...]:
        """Return the comparisons."""

    @property
    def sabotage(self) -> Mapping[str, str]:
        """Return sabotaged arm -> the arm it stands in for."""


def verdict(claim: Claimed, records: Sequence[Record], *, quick: bool = False, until_decided: bool = False) -> Verdict:
    """Judge a claim by the paired 95% intervals of its checks.

    All checks must hold; one that does not refutes the claim. A seed that failed, or whose numbers are missing or not
    finite, makes its checks inconclusive: it is never dropped. If the claim also holds with a sabotaged arm in the
    method's place, the verdict is void.

    Args:
        claim: The claim, or anything with its ``id``, ``statement``, ``checks`` and ``sabotage``.
        records: All records of the claim's jobs, oldest first. Of a job that ran twice the newest counts.
        quick: Whether the run was scaled down.
        until_decided: Whether seeds are added until there is a decision; the intervals then stay valid at every look.

    Returns:
        The verdict.

    Examples:
        >>> from types import SimpleNamespace
        >>> from nervure.spec import Job, Measurement, Record, Status
        >>> check = Check(name="better than nothing", method="ours", control="none", metric="accuracy")
        >>> claim = SimpleNamespace(id="a/b", statement="It helps.", checks=(check,), sabotage={})
        >>> def record(seed, ours):
        ...     values = (Measurement(arm="ours", metric="accuracy", value=ours),
        ...               Measurement(arm="none", metric="accuracy", value=0.5))
        ...     return Record(job=Job(target="claim:a/b", arm="*", case="-", seed=seed), status=Status.DONE,
        ...                   measurements=values)
        >>> str(verdict(claim, [record(0, 0.7), record(1, 0.72), record(2, 0.71)]).outcome)
        'holds'
    """
    kept = newest(records)
    table = tabulate(kept)
    seeds = sorted({record.job.seed for record in kept})
    results = tuple(_result(check, table, seeds, until_decided=until_decided) for check in claim.checks)
    outcome = joint([result.outcome for result in results])
    notes = failures(kept)
    sabotage = {}
    for arm, stands_for in claim.sabotage.items():
        swapped = _swap(claim.checks, arm, stands_for)
        attempt = [_result(check, table, seeds, until_decided=until_decided) for check in swapped]
        sabotage[arm] = joint([result.outcome for result in attempt])
        gaps = [result.reason for result in attempt if result.check.method == arm and _no_comparison(result)]
        if outcome is Outcome.HOLDS and gaps:
            outcome = Outcome.INCONCLUSIVE
            notes.append(f"The sabotaged arm {arm!r} gives no comparison, so the claim is not guarded: {gaps[0]}")
    passed = [arm for arm, came_to in sabotage.items() if came_to is Outcome.HOLDS]
    if passed:
        outcome = Outcome.VOID
        notes.append(
            f"The checks also hold with {', '.join(map(repr, passed))} in the method's place: they show nothing."
        )
    if quick:
        notes.append("This was a scaled-down rehearsal; only a full run gives a verdict.")
    return Verdict(
        claim_id=claim.id,
        statement=claim.statement,
        outcome=outcome,
        checks=results,
        sabotage=sabotage,
        seeds=tuple(seeds),
        quick=quick,
        notes=tuple(dict.fromkeys(notes + [result.reason for result in results if result.reason])),
    )


def joint(outcomes: Sequence[Outcome]) -> Outcome:
    """Join the outcomes of a claim's parts (an intersection-union test, so no correction is needed).

    Args:
        outcomes: The parts' outcomes.

    Returns:
        *does not hold* if any part does not, *holds* if there are parts and all do, else *inconclusive*.
    """
    if Outcome.DOES_NOT_HOLD in outcomes:
        return Outcome.DOES_NOT_HOLD
    return Outcome.HOLDS if outcomes and set(outcomes) == {Outcome.HOLDS} else Outcome.INCONCLUSIVE


def _swap(checks: Sequence[Check], arm: str, stands_for: str) -> list[Check]:
    if all(check.method != stands_for for check in checks):
        raise UsageError(
            f"the sabotaged arm {arm!r} stands in for {stands_for!r}, which is the method of no check",
            expected=f"one of {sorted({check.method for check in checks})}",
        )
    return [dataclasses.replace(check, method=arm) if check.method == stands_for else check for check in checks]


def _result(check: Check, table: Values, seeds: Sequence[int], *, until_decided: bool) -> CheckResult:
    differences, missing = _differences(check, table, seeds)
    n = len(differences)
    if n:
        interval, code = decide(list(differences.values()), check.margin, rule=check.rule, until_decided=until_decided)
        mean, low, high = (float(value) for value in interval)
        outcome = OUTCOMES[int(code)]
    else:
        mean, low, high, outcome = float("nan"), float("-inf"), float("inf"), Outcome.INCONCLUSIVE
    reason = ""
    if not seeds:
        reason = f"{check.name}: nothing was measured."
    elif missing:
        outcome = Outcome.INCONCLUSIVE
        reason = f"{check.name}: {'; '.join(missing)}."
    elif _alike(check, differences):
        # An arm that equals its control in every seed was not shown to beat it.
        outcome = Outcome.INCONCLUSIVE
        reason = f"{check.name}: {check.method!r} equals {check.control!r} in every seed."
    elif outcome is Outcome.INCONCLUSIVE and check.rule == "every-seed":
        reason = f"{check.name}: every seed so far, but {n} of the {FEWEST_FOR_EVERY_SEED} that are needed."
    elif n == 1 and outcome is Outcome.INCONCLUSIVE:
        reason = f"{check.name}: one seed gives no interval."
    return CheckResult(
        check=check, outcome=outcome, n=n, mean=mean, low=low, high=high, differences=differences, reason=reason
    )


def _alike(check: Check, differences: Mapping[int, float]) -> bool:
    """Return whether a method that is to beat its control equals it in every seed."""
    return check.control is not None and check.margin == 0 and not any(differences.values())


def _no_comparison(result: CheckResult) -> bool:
    """Return whether a check could not be made; arms that are alike were compared."""
    return bool(result.reason) and not (result.n and _alike(result.check, result.differences))


def _differences(check: Check, table: Values, seeds: Sequence[int]) -> tuple[dict[int, float], list[str]]:
    """Return the signed differences by seed, and sentences on what is missing."""
    arms = [check.method] if check.control is None else [check.method, check.control]
    columns = [table.get((arm, check.metric), {}) for arm in arms]
    missing = []
    for arm, column in zip(arms, columns, strict=True):
        gone = [str(seed) for seed in seeds if not usable(column, seed)]
        if gone:
            missing.append(f"arm {arm!r} has no finite {check.metric!r} for seed {', '.join(gone)}")
    paired = [seed for seed in seeds if all(usable(column, seed) for column in columns)]
    if not paired:
        return {}, missing
    values = np.array([[column[seed] for seed in paired] for column in columns])
    signed = (values[0] - (values[1] if len(values) > 1 else 0.0)) * (1 if check.better == "higher" else -1)
    slack = ROUNDING * np.maximum(np.abs(values).max(0), abs(check.margin))
    snapped = np.where(np.abs(signed - check.margin) <= slack, check.margin, signed)
    return dict(zip(paired, snapped.tolist(), strict=True)), missing
