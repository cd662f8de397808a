import math
from types import SimpleNamespace

import pytest
from scipy import stats

from nervure._kit import UsageError
from nervure.spec import Check, Job, Measurement, Outcome, Record, Status
from nervure.stats import joint, verdict

BETTER = Check(name="better", method="ours", control="plain", metric="accuracy", margin=0.01)
GUARD = {"broken": "ours"}


def claim(*checks, sabotage=None):
    return SimpleNamespace(id="card/claim", statement="It helps.", checks=checks or (BETTER,), sabotage=sabotage or {})


def record(seed, status=Status.DONE, *, arm="*", params=None, case="lenet", error=None, metric="accuracy", **arms):
    return Record(
        job=Job(target="claim:card/claim", arm=arm, case=case, seed=seed, params=params or {}),
        status=status,
        measurements=tuple(Measurement(arm=name, metric=metric, value=value) for name, value in arms.items()),
        error=error,
    )


OURS, PLAIN = [0.90, 0.93, 0.91, 0.94], [0.80, 0.81, 0.80, 0.83]


def good(**more):
    return [record(seed, ours=o, plain=p, **more) for seed, (o, p) in enumerate(zip(OURS, PLAIN, strict=True))]


def test_interval_is_scipys():
    result = verdict(claim(), good())
    interval = stats.ttest_rel(OURS, PLAIN).confidence_interval(0.95)
    (check,) = result.checks
    assert (check.low, check.high) == pytest.approx((interval.low, interval.high))
    assert result.outcome is check.outcome is Outcome.HOLDS
    assert result.seeds == (0, 1, 2, 3)
    assert check.differences[1] == pytest.approx(0.12)
    assert result.notes == ()


def test_one_record_an_arm_gives_the_same_verdict():
    apart = [
        record(seed, arm=arm, **{arm: value})
        for arm, values in (("plain", PLAIN), ("ours", OURS))
        for seed, value in enumerate(values)
    ]
    assert verdict(claim(), apart).to_json() == verdict(claim(), good()).to_json()


def test_order_of_seeds_and_points_of_curves_do_not_matter():
    curve = Measurement(arm="ours", metric="accuracy", value=0.0, step=1.0)
    turned = [r.replace(measurements=(curve, *r.measurements)) for r in reversed(good())]
    assert verdict(claim(), turned).to_json() == verdict(claim(), good()).to_json()


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        (Check.at_least("a", method="ours", metric="accuracy", bound=0.85), Outcome.HOLDS),
        (Check.at_least("a", method="ours", metric="accuracy", bound=0.99), Outcome.DOES_NOT_HOLD),
        (Check.at_most("a", method="ours", metric="accuracy", bound=0.99), Outcome.HOLDS),
        (Check.at_most("a", method="ours", metric="accuracy", bound=0.85), Outcome.DOES_NOT_HOLD),
        (Check.at_most("a", method="ours", metric="accuracy", bound=0.92), Outcome.INCONCLUSIVE),
        (Check(name="a", method="plain", control="ours", metric="accuracy", better="lower"), Outcome.HOLDS),
        (Check(name="a", method="ours", control="plain", metric="accuracy", better="lower"), Outcome.DOES_NOT_HOLD),
    ],
)
def test_signs_and_absolute_bounds(check, outcome):
    assert verdict(claim(check), good()).outcome is outcome


def test_a_difference_equal_to_the_margin_but_for_rounding_reaches_it():
    check = Check(name="at most one point lost", method="ours", control="plain", metric="accuracy", margin=-0.01)
    assert 0.89 - 0.90 < -0.01
    same = [record(seed, ours=0.89, plain=0.90) for seed in range(3)]
    assert verdict(claim(check), same).outcome is Outcome.HOLDS
    clearly = [record(seed, ours=0.89 - 1e-9, plain=0.90) for seed in range(3)]
    assert verdict(claim(check), clearly).outcome is Outcome.DOES_NOT_HOLD


def test_every_seed_needs_five():
    check = Check(name="always", method="ours", control="plain", metric="accuracy", rule="every-seed")
    four = verdict(claim(check), good())
    assert four.outcome is Outcome.INCONCLUSIVE
    assert "4 of the 5" in four.notes[0]
    assert verdict(claim(check), [*good(), record(4, ours=0.9, plain=0.9)]).outcome is Outcome.HOLDS
    assert verdict(claim(check), [*good(), record(4, ours=0.8, plain=0.9)]).outcome is Outcome.DOES_NOT_HOLD


def test_one_seed_is_inconclusive_and_equal_differences_are_a_point():
    assert verdict(claim(), [record(0, ours=1.0, plain=0.0)]).outcome is Outcome.INCONCLUSIVE
    twice = [record(seed, ours=0.75, plain=0.5) for seed in range(2)]
    assert verdict(claim(), twice).checks[0].low == 0.25


@pytest.mark.parametrize("status", [Status.FAILED, Status.DIVERGED, Status.OVER_BUDGET])
def test_a_failed_seed_is_never_dropped(status):
    lost = record(9, status, ours=0.99, plain=0.1, error="RuntimeError: no.\nmore")
    result = verdict(claim(), [*good(), lost])
    assert result.outcome is Outcome.INCONCLUSIVE
    assert result.notes[0] == f"Seed 9 ended {status.value}: RuntimeError: no."
    assert "seed 9" in result.notes[1]
    assert result.checks[0].n == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arm", ["ours", "plain"])
def test_a_number_that_is_not_finite_makes_it_inconclusive(value, arm):
    broken = record(9, **{"ours": 0.9, "plain": 0.8, arm: value})
    result = verdict(claim(), [*good(), broken])
    assert result.outcome is Outcome.INCONCLUSIVE
    assert f"arm '{arm}' has no finite 'accuracy' for seed 9" in result.notes[0]


def test_missing_arms_and_no_records():
    result = verdict(claim(), [record(seed, ours=0.9) for seed in range(3)])
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "arm 'plain'" in result.checks[0].reason
    empty = verdict(claim(), [])
    assert empty.outcome is Outcome.INCONCLUSIVE
    assert "nothing was measured" in empty.notes[0]


def test_a_retried_job_counts_once_and_done_wins():
    first = record(3, Status.FAILED, error="out of memory")
    assert verdict(claim(), [*good()[:3], first, good()[3]]).to_json() == verdict(claim(), good()).to_json()
    assert verdict(claim(), [*good(), first]).to_json() == verdict(claim(), good()).to_json()


def test_all_checks_must_hold():
    never = Check(name="never", method="ours", control="plain", metric="accuracy", margin=0.5)
    unsure = Check.at_least("unsure", method="ours", metric="accuracy", bound=0.92)
    assert verdict(claim(BETTER, unsure), good()).outcome is Outcome.INCONCLUSIVE
    assert verdict(claim(BETTER, unsure, never), good()).outcome is Outcome.DOES_NOT_HOLD
    assert joint([]) is Outcome.INCONCLUSIVE


def test_a_passing_sabotage_voids_the_claim():
    caught = [record(s, ours=o, plain=p, broken=p) for s, (o, p) in enumerate(zip(OURS, PLAIN, strict=True))]
    result = verdict(claim(sabotage=GUARD), caught)
    assert result.outcome is Outcome.HOLDS
    assert result.sabotage == {"broken": Outcome.DOES_NOT_HOLD}
    passing = [record(s, ours=o, plain=p, broken=o) for s, (o, p) in enumerate(zip(OURS, PLAIN, strict=True))]
    result = verdict(claim(sabotage=GUARD), passing)
    assert result.outcome is Outcome.VOID
    assert result.checks[0].outcome is Outcome.HOLDS
    assert "broken" in result.notes[0]


def test_a_sabotage_must_hold_in_all_checks_to_void():
    second = Check.at_least("also", method="ours", metric="accuracy", bound=0.5)
    records = [record(s, ours=o, plain=p, broken=p) for s, (o, p) in enumerate(zip(OURS, PLAIN, strict=True))]
    assert verdict(claim(BETTER, second, sabotage=GUARD), records).outcome is Outcome.HOLDS


def test_an_unmeasured_sabotage_leaves_the_claim_unguarded():
    result = verdict(claim(sabotage=GUARD), good())
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "not guarded" in result.notes[0]


def test_a_sabotage_of_an_arm_no_check_has_is_refused():
    with pytest.raises(UsageError, match="method of no check"):
        verdict(claim(sabotage={"broken": "other"}), good())


def test_mixed_records_are_refused():
    with pytest.raises(UsageError, match="mixed"):
        verdict(claim(), [*good(), record(7, case="mlp", ours=1.0, plain=0.0)])
    with pytest.raises(UsageError, match="mixed"):
        verdict(claim(), [*good(), record(7, params={"lr": 1}, ours=1.0, plain=0.0)])
    with pytest.raises(UsageError, match="two jobs measured"):
        verdict(claim(), [*good(), record(0, arm="ours", ours=1.0)])


def test_quick_is_said():
    result = verdict(claim(), good(), quick=True)
    assert result.quick
    assert "rehearsal" in result.notes[-1]


def test_until_decided_asks_for_more():
    assert verdict(claim(), good()).outcome is Outcome.HOLDS
    assert verdict(claim(), good(), until_decided=True).outcome is Outcome.INCONCLUSIVE
    more = [record(seed, ours=0.9 + seed / 1000, plain=0.8) for seed in range(6)]
    assert verdict(claim(), more, until_decided=True).outcome is Outcome.HOLDS


@pytest.mark.parametrize("rule", ["interval", "every-seed"])
def test_an_arm_equal_to_its_control_in_every_seed_does_not_beat_it(rule):
    alike = [record(seed, ours=0.8 + seed / 100, plain=0.8 + seed / 100) for seed in range(5)]
    beats = Check(name="beats", method="ours", control="plain", metric="accuracy", rule=rule)
    result = verdict(claim(beats), alike)
    assert result.outcome is Outcome.INCONCLUSIVE
    assert "equals 'plain' in every seed" in result.checks[0].reason
    not_worse = Check(name="not worse", method="ours", control="plain", metric="accuracy", margin=-0.01, rule=rule)
    assert verdict(claim(not_worse), alike).outcome is Outcome.HOLDS
    exact = Check.at_most("exact", method="gap", metric="accuracy", bound=0.0, rule=rule)
    assert verdict(claim(exact), [record(seed, gap=0.0) for seed in range(5)]).outcome is Outcome.HOLDS


def test_a_sabotage_equal_to_the_control_guards_the_claim():
    beats = Check(name="beats", method="ours", control="plain", metric="accuracy")
    records = [record(seed, ours=0.9 + seed / 100, plain=0.8, broken=0.8) for seed in range(5)]
    result = verdict(claim(beats, sabotage=GUARD), records)
    assert (result.outcome, result.sabotage["broken"]) == (Outcome.HOLDS, Outcome.INCONCLUSIVE)
    assert result.notes == ()
