import numpy as np
import pytest

from nervure.stats import decide
from nervure.stats.simulate import DISTRIBUTIONS, bootstrap_rate, holds_rate, tables, until_decided

CLAIMS = 10_000


def test_codes_follow_the_interval():
    rows = [[1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.1]]
    assert decide(rows).code.tolist() == [1, -1, 0]
    assert decide(rows, [2.0, -3.0, 0.0]).code.tolist() == [-1, 1, 0]


def test_a_point_interval_on_the_margin_holds():
    assert decide([0.5, 0.5, 0.5], 0.5).code == 1


@pytest.mark.parametrize(
    ("differences", "code"),
    [([1, 1, 1, 1], 0), ([1, 1, 1, 1, 0], 1), ([1, 1, 1, 1, -0.1], -1), ([-1], -1), ([0, 0, 0, 0, 0], 1)],
)
def test_every_seed(differences, code):
    for until in (False, True):
        assert decide(differences, rule="every-seed", until_decided=until).code == code


def test_rule_is_the_same_for_one_claim_and_for_many():
    draws = np.random.default_rng(1).normal(0.5, 1, (50, 6))
    for options in ({}, {"until_decided": True}, {"rule": "every-seed"}):
        many = decide(draws, 0.1, **options)
        one = [decide(row, 0.1, **options) for row in draws]
        assert many.code.tolist() == [int(single.code) for single in one]
        np.testing.assert_allclose(many.interval.low, [single.interval.low for single in one])


# Three standard errors of 10,000 claims at 2.5% are 0.47%: 3% is the bound that was set beforehand.
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("name", ["normal", "heavy-tailed (t, 3 dof)"])
def test_a_true_null_is_called_holds_in_at_most_3_percent(name, seeds):
    rate = holds_rate(DISTRIBUTIONS[name], seeds, claims=CLAIMS, rng=np.random.default_rng(seeds))
    assert 0.005 < rate <= 0.03


@pytest.mark.parametrize("name", ["normal", "heavy-tailed (t, 3 dof)"])
def test_looking_after_every_seed_calls_a_true_null_holds_in_at_most_5_percent(name):
    rate, first = until_decided(DISTRIBUTIONS[name], claims=CLAIMS, rng=np.random.default_rng(0))
    assert 0.001 < rate <= 0.05
    assert np.isinf(first).mean() > 0.9


def test_looking_early_with_the_fixed_interval_would_lie():
    draws = np.random.default_rng(0).standard_normal((2_000, 100))
    ever = np.zeros(2_000, bool)
    for n in range(3, 101):
        ever |= decide(draws[:, :n]).code == 1
    assert ever.mean() > 0.12


def test_a_true_effect_is_decided():
    rate, first = until_decided(DISTRIBUTIONS["normal"], claims=1_000, rng=np.random.default_rng(0), effect=2.0)
    assert rate > 0.999
    assert np.median(first) <= 8


def test_skew_is_what_the_rule_cannot_see_at_few_seeds():
    rng = np.random.default_rng(0)
    assert holds_rate(DISTRIBUTIONS["exponential, long right tail"], 5, claims=CLAIMS, rng=rng) < 0.01
    # Documented, not wished for: rare large losses that five seeds do not show.
    assert 0.08 < holds_rate(DISTRIBUTIONS["exponential, long left tail"], 5, claims=CLAIMS, rng=rng) < 0.15


def test_the_bootstrap_is_worse_at_five_seeds():
    rng = np.random.default_rng(0)
    assert bootstrap_rate(DISTRIBUTIONS["normal"], 5, method="percentile", claims=1_000, rng=rng) > 0.05


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_every_distribution_has_mean_zero(name):
    draws = DISTRIBUTIONS[name](np.random.default_rng(0), (1_000_000,))
    assert abs(draws.mean()) < 6 * draws.std() / 1_000


def test_the_tables_have_a_row_a_distribution():
    lines = list(tables(20))
    assert sum(line.startswith("| normal |") for line in lines) == 3
    assert all(line == "" or line.startswith("|") for line in lines)
