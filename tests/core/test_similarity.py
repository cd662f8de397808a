import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from nervure._kit import BadData
from nervure.core.similarity import MinibatchCKA, Moments, canonical_correlations, cka, pwcca, rbf_cka, svcca

X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X @ torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


def centred(x):
    n = len(x)
    middle = torch.eye(n, dtype=torch.float64) - 1 / n
    return middle @ x @ x.T @ middle


def test_biased_is_the_alignment_of_centred_kernels():
    k, m = centred(X), centred(Y)
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert cka(X, Y) == pytest.approx(expected, rel=1e-12)


def unbiased_hsic(k, m):
    """Sum over distinct indices: E k_ij m_ij - 2 E k_ij m_iq + E k_ij m_qr."""
    n = len(k)
    two = sum(k[i, j] * m[i, j] for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    three = sum(k[i, j] * m[i, q] for i, j, q in itertools.permutations(range(n), 3)) / (n * (n - 1) * (n - 2))
    four = sum(k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(range(n), 4))
    return float(two - 2 * three + four / (n * (n - 1) * (n - 2) * (n - 3)))


def test_unbiased_is_the_sum_over_distinct_indices():
    k, m = X[:7] @ X[:7].T, Y[:7] @ Y[:7].T
    expected = unbiased_hsic(k, m) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert cka(X[:7], Y[:7], estimator="unbiased") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_rotation_scale_and_shift_change_nothing(estimator):
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert cka(X, 2 * X @ turn + 5, estimator=estimator) == pytest.approx(1)


def test_features_that_have_nothing_in_common_are_near_zero_only_without_the_bias():
    draw = torch.Generator().manual_seed(2)
    one, other = (torch.randn(40, 400, generator=draw) for _ in range(2))
    assert cka(one, other) > 0.85
    assert abs(cka(one, other, estimator="unbiased")) < 0.1


def test_bad_features_are_told():
    assert math.isnan(cka(X, torch.ones(9, 2)))
    with pytest.raises(BadData, match="as many samples"):
        cka(X, Y[:5])
    with pytest.raises(BadData, match="4 or more"):
        cka(X[:3], Y[:3], estimator="unbiased")


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_wide_and_narrow_features_take_one_formula(estimator):
    wide = torch.cat([X, torch.zeros(9, 30, dtype=torch.float64)], 1)
    assert cka(wide, Y, estimator=estimator) == pytest.approx(cka(X, Y, estimator=estimator), rel=1e-12)


def layers(n, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, 2, generator=draw) + 3
    return [x, x.relu(), torch.randn(n, 40, generator=draw)], [x.flatten(1)[:, :4], torch.ones(n, 3)]


def test_one_batch_is_the_alignment_of_all_its_samples():
    xs, ys = layers(20, 0)
    seen = MinibatchCKA()
    seen.update(xs, ys)
    for estimator in ("biased", "unbiased"):
        found = seen.matrix(estimator)
        assert found.shape == (3, 2)
        for i, x in enumerate(xs):
            assert found[i, 0].item() == pytest.approx(cka(x, ys[0], estimator=estimator), rel=1e-10)
        assert found[:, 1].isnan().all()  # it does not vary


def test_batches_average_the_estimates_of_each_of_unequal_batches():
    seen, sums = MinibatchCKA(), np.zeros(3)
    for seed, n in enumerate((6, 7)):
        xs, _ = layers(n, seed)
        seen.update(xs)
        k, m = (x.double().flatten(1) @ x.double().flatten(1).T for x in (xs[0], xs[2]))
        sums += [unbiased_hsic(k, m), unbiased_hsic(k, k), unbiased_hsic(m, m)]
    both, one, other = sums
    found = seen.matrix("unbiased")
    assert found[0, 2].item() == pytest.approx(both / math.sqrt(one * other), rel=1e-8)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))


def test_unbiased_minibatches_tend_to_all_samples_and_biased_ones_do_not():
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(2000, 30, generator=draw)
    y = x @ torch.randn(30, 30, generator=draw) + 5 * torch.randn(2000, 30, generator=draw)
    seen = MinibatchCKA()
    for start in range(0, 2000, 20):
        seen.update([x[start : start + 20]], [y[start : start + 20]])
    truth = cka(x, y, estimator="unbiased")
    assert seen.matrix("unbiased").item() == pytest.approx(truth, abs=0.02)
    assert seen.matrix("biased").item() > truth + 0.1


def test_small_batches_and_no_batches_are_told():
    with pytest.raises(BadData, match="4 or more"):
        MinibatchCKA().update([X[:2]])
    with pytest.raises(BadData, match="no batch"):
        MinibatchCKA().matrix()


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_gaussian_kernels_by_hand(estimator):
    def kernel(x):
        squares = [[float((a - b).square().sum()) for b in x] for a in x]
        apart = sorted(squares[i][j] for i in range(9) for j in range(9) if i != j)[35]
        return torch.tensor([[math.exp(-d / (2 * 0.25 * apart)) for d in row] for row in squares], dtype=torch.float64)

    k, m = kernel(X), kernel(Y)
    if estimator == "unbiased":
        hsic = unbiased_hsic
    else:
        middle = torch.eye(9, dtype=torch.float64) - 1 / 9
        hsic = lambda a, b: float((middle @ a @ middle * (middle @ b @ middle)).sum())  # noqa: E731
    expected = hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
    assert rbf_cka(X, Y, estimator=estimator) == pytest.approx(expected, rel=1e-8)
    assert rbf_cka(X, 3 * X, estimator=estimator) == pytest.approx(1)


def test_canonical_correlations_are_those_of_the_generalised_eigenproblem():
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(60, 4, generator=draw, dtype=torch.float64)
    y = torch.cat(
        [x[:, :2] + torch.randn(60, 2, generator=draw, dtype=torch.float64), torch.randn(60, 3, generator=draw)], 1
    )
    a, b = (one.numpy() - one.numpy().mean(0) for one in (x, y))
    cross = a.T @ b
    matrix = cross @ np.linalg.solve(b.T @ b, cross.T)
    expected = np.sqrt(scipy.linalg.eigh(matrix, a.T @ a, eigvals_only=True)[::-1])
    np.testing.assert_allclose(canonical_correlations(x, y).numpy(), expected, rtol=1e-9)
    turned = y @ torch.randn(5, 5, generator=draw, dtype=torch.float64) + 2
    torch.testing.assert_close(canonical_correlations(x, turned), canonical_correlations(x, y))
    assert svcca(x, y, keep=1.0) == pytest.approx(expected.mean())
    # The weighted mean, with the canonical variates written out.
    values, vectors = scipy.linalg.eigh(matrix, a.T @ a)
    variates = a @ vectors
    weights = np.abs(variates.T @ a).sum(1)
    assert pwcca(x, y) == pytest.approx(float((weights * np.sqrt(values.clip(0))).sum() / weights.sum()))


def test_principal_parts_drop_what_hardly_varies():
    draw = torch.Generator().manual_seed(8)
    shared = torch.randn(100, 2, generator=draw)
    noise = [1e-3 * torch.randn(100, 5, generator=draw) for _ in range(2)]
    x, y = (torch.cat([shared, one], 1) for one in noise)
    assert svcca(x, y) == pytest.approx(1, abs=1e-4)
    assert svcca(x, y, keep=1.0) < 0.7


def test_correlations_in_one_pass_are_those_of_numpy_at_large_means():
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(500, 4, generator=draw, dtype=torch.float64) + 1e6
    y = x[:, :3] * 2 + torch.randn(500, 3, generator=draw, dtype=torch.float64)
    seen = Moments()
    for start, stop in ((0, 7), (7, 300), (300, 301), (301, 500)):
        seen.update(x[start:stop], y[start:stop])
    expected = np.corrcoef(x.T.numpy(), y.T.numpy())[:4, 4:]
    np.testing.assert_allclose(seen.correlations().numpy(), expected, atol=1e-8)
    one, other, both = seen.covariances()
    whole = np.cov(torch.cat([x, y], 1).T.numpy())
    np.testing.assert_allclose(one.numpy(), whole[:4, :4], rtol=1e-6)
    np.testing.assert_allclose(other.numpy(), whole[4:, 4:], rtol=1e-6)
    np.testing.assert_allclose(both.numpy(), whole[:4, 4:], rtol=1e-4, atol=1e-6)


def test_units_that_do_not_fit_are_told_and_constant_ones_have_no_correlation():
    seen = Moments()
    seen.update(torch.tensor([[1.0, 5.0], [2.0, 5.0]]), torch.tensor([[3.0], [1.0]]))
    assert seen.correlations()[0, 0] == -1
    assert seen.correlations()[1, 0].isnan()
    with pytest.raises(BadData, match="do not fit"):
        seen.update(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(BadData, match="need samples"):
        Moments().covariances()
