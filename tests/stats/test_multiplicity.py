from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from nervure.stats import holm, sign_test


def closed_testing(p):
    """Bonferroni tests of every subset of the hypotheses: a hypothesis' adjusted p is the largest of its subsets'."""
    m = len(p)
    adjusted = np.zeros(m)
    for size in range(1, m + 1):
        for subset in combinations(range(m), size):
            value = min(1.0, size * min(p[i] for i in subset))
            for i in subset:
                adjusted[i] = max(adjusted[i], value)
    return adjusted


@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_holm_is_the_closure_of_bonferroni(m):
    rng = np.random.default_rng(m)
    for p in (rng.uniform(size=m), rng.uniform(size=m) ** 4, np.full(m, 0.02)):
        np.testing.assert_allclose(holm(p), closed_testing(p), rtol=1e-12)


def test_holm_of_nothing():
    assert holm([]).tolist() == []


@pytest.mark.parametrize("n", [1, 5, 12, 40])
def test_sign_test_is_the_binomial_test(n):
    draws = np.random.default_rng(n).normal(0.2, 1, (6, n))
    expected = [stats.binomtest(int((row > 0.1).sum()), n, alternative="greater").pvalue for row in draws]
    np.testing.assert_allclose(sign_test(draws, 0.1), expected, rtol=1e-12)


def test_sign_test_leaves_ties_out():
    assert sign_test([0.0, 0.0, 1.0]) == 0.5
    assert sign_test([0.0, 0.0]) == 1.0
