import math

import numpy as np
import pytest
from scipy import stats

from nervure._kit import UsageError
from nervure.spec import Job, Measurement, Outcome, Record, Status
from nervure.stats import holm, leaderboard

RNG = np.random.default_rng(0)
BASE = RNG.normal(0.8, 0.02, 6)
ARMS = {
    "plain": BASE,
    "good": BASE + RNG.normal(0.08, 0.01, 6),
    "bad": BASE - RNG.normal(0.08, 0.01, 6),
    "same": BASE + RNG.normal(0, 0.02, 6),
}


def record(arm, seed, value, status=Status.DONE):
    measured = () if value is None else (Measurement(arm=arm, metric="accuracy", value=value),)
    job = Job(target="arena:prune", arm=arm, case="lenet", seed=seed, params={"of": arm})
    return Record(job=job, status=status, measurements=measured)


def records(arms=ARMS):
    return [record(arm, seed, float(value)) for arm, values in arms.items() for seed, value in enumerate(values)]


def test_rows_against_scipy():
    rows = {row.arm: row for row in leaderboard(records(), metric="accuracy", better="higher", baseline="plain")}
    tests = {arm: stats.ttest_rel(ARMS[arm], BASE) for arm in ("good", "bad", "same")}
    adjusted = holm([test.pvalue for test in tests.values()])
    for (arm, test), p in zip(tests.items(), adjusted, strict=True):
        assert rows[arm].p == pytest.approx(p)
        assert (rows[arm].low, rows[arm].high) == pytest.approx(tuple(test.confidence_interval()))
        assert rows[arm].mean == pytest.approx(ARMS[arm].mean())
    assert [rows[arm].outcome for arm in ("good", "bad", "same", "plain")] == [
        Outcome.HOLDS,
        Outcome.DOES_NOT_HOLD,
        Outcome.INCONCLUSIVE,
        Outcome.INCONCLUSIVE,
    ]
    assert rows["good"].rank == 1
    assert rows["bad"].rank == 4


def test_lower_is_better_turns_the_order_and_the_signs():
    rows = leaderboard(records(), metric="accuracy", better="lower", baseline="plain")
    assert rows[0].arm == "bad"
    assert rows[0].difference > 0
    assert rows[0].outcome is Outcome.HOLDS
    assert rows[0].mean == pytest.approx(ARMS["bad"].mean())


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_failed_seed_counts_as_the_worst_value_and_is_marked(value):
    mine = records()
    mine[8] = record("good", 2, value, Status.FAILED if value is None else Status.DONE)
    row = next(r for r in leaderboard(mine, metric="accuracy", better="higher", baseline="plain") if r.arm == "good")
    worst = min(values.min() for values in ARMS.values())
    assert row.failed == (2,)
    assert row.mean == pytest.approx((np.delete(ARMS["good"], 2).sum() + worst) / 6)
    assert row.outcome is Outcome.INCONCLUSIVE
    assert row.p == 1.0


def test_an_arm_that_always_fails_is_last_but_there():
    mine = [*records(), *(record("gone", seed, None, Status.DIVERGED) for seed in range(6))]
    rows = leaderboard(mine, metric="accuracy", better="higher", baseline="plain")
    assert rows[-1].arm == "gone"
    assert rows[-1].failed == tuple(range(6))


def test_equal_arms_share_a_rank_and_show_no_difference():
    rows = leaderboard(
        records({"plain": BASE, "copy": BASE, "shifted": BASE + 0.5}),
        metric="accuracy",
        better="higher",
        baseline="plain",
    )
    assert [(row.arm, row.rank) for row in rows] == [("shifted", 1), ("copy", 2), ("plain", 2)]
    assert rows[1].p == 1.0


def test_one_seed_decides_nothing():
    rows = leaderboard(records({"plain": [0.1], "ours": [0.9]}), metric="accuracy", better="higher", baseline="plain")
    assert {row.outcome for row in rows} == {Outcome.INCONCLUSIVE}


def test_no_baseline_is_refused():
    with pytest.raises(UsageError, match="baseline"):
        leaderboard(records(), metric="accuracy", better="higher", baseline="other")
    with pytest.raises(UsageError, match="no arm"):
        leaderboard([record("plain", 0, math.nan)], metric="accuracy", better="higher", baseline="plain")
