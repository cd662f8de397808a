"""One pass against two passes over all samples; errors against leaving groups out and against many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nervure._kit import BadData, UsageError
from nervure.core.class_moments import ClassMoments, DealtMoments, Estimate


def _drawn(seed, count=60, width=4, classes=5, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    return torch.randn(count, width, generator=draw).double() + labels[:, None] + shift, labels


def _two_passes(x, y):
    labels = y.unique()
    means = torch.stack([x[y == c].mean(0) for c in labels])
    variances = torch.stack([(x[y == c] - mean).square().sum(1).mean() for c, mean in zip(labels, means, strict=True)])
    residuals = torch.cat([x[y == c] - mean for c, mean in zip(labels, means, strict=True)])
    return labels, means, variances, residuals.T @ residuals / len(x)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.sampled_from([0.0, 1e5]))
def test_one_pass_equals_two(seed, size, shift):
    x, y = _drawn(seed, shift=shift)
    seen = ClassMoments(covariance=True)
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        seen.update(part, labels)
    labels, means, variances, within = _two_passes(x, y)
    assert torch.equal(seen.labels, labels)
    assert torch.equal(seen.counts, y.bincount()[labels].double())
    torch.testing.assert_close(seen.means, means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen.variances, variances, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(seen.within(), within, rtol=1e-6, atol=1e-8)
    centred = means - means.mean(0)
    torch.testing.assert_close(seen.between(), centred.T @ centred / len(labels), rtol=1e-6, atol=1e-8)


def test_dealing_keeps_all_samples_and_every_class_in_many_groups():
    x, y = _drawn(3, count=101)
    seen = DealtMoments(groups=4, covariance=True)
    for part, labels in zip(x.split(7), y.split(7), strict=True):
        seen.update(part, labels)
    whole = seen.merged()
    torch.testing.assert_close(whole.within(), _two_passes(x, y)[3])
    counts = torch.stack([part.counts for part in seen.parts])
    assert counts.shape == (4, 5)
    assert float((counts.max(0).values - counts.min(0).values).max()) <= 1
    left = seen.merged(without=2)
    assert float(left.counts.sum()) == 101 - float(seen.parts[2].counts.sum())


def test_the_error_is_that_of_the_mean():
    x, y = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(50, dtype=torch.long)
    seen = DealtMoments(groups=50)
    seen.update(x, y)
    found = seen.estimates(lambda moments: [float(moments.means[0, 0])])[0]
    # Leaving out single samples gives the textbook error of a mean.
    assert found.error == pytest.approx(float(x.double().std() / math.sqrt(50)), rel=1e-9)
    low, high = found.interval
    assert low < found.value < high


def test_intervals_cover():
    inside = 0
    for seed in range(100):
        x, y = _drawn(seed, count=200, classes=2)
        seen = DealtMoments()
        seen.update(x, y)
        low, high = seen.estimates(lambda moments: [float(moments.variances.mean())])[0].interval
        inside += low <= 4.0 * (1 - 2 / 200) <= high
    assert inside >= 88  # 95% of 100, less three standard errors


def test_labels_below_zero_are_passed_over_and_misfits_refused():
    seen = ClassMoments()
    seen.update(torch.ones(3, 2), torch.tensor([-100, 1, 1]))
    seen.update(torch.ones(1, 2), torch.tensor([-1]))
    assert seen.labels.tolist() == [1]
    assert seen.counts.tolist() == [2]
    with pytest.raises(BadData, match="differ in width"):
        seen.update(torch.ones(1, 3), torch.tensor([0]))
    for labels in (torch.zeros(2, dtype=torch.long), torch.zeros(3)):
        with pytest.raises(BadData, match="do not fit"):
            seen.update(torch.ones(3, 2), labels)
    with pytest.raises(UsageError, match="no covariance"):
        seen.within()
    with pytest.raises(UsageError, match="too few groups"):
        DealtMoments(groups=1)


def test_an_unknown_error_says_so():
    seen = DealtMoments(groups=3)
    seen.update(torch.ones(1, 2), torch.tensor([0]))
    found = seen.estimates(lambda moments: [float(moments.means.sum())])[0]
    assert found == Estimate(2.0, None, 1)
    assert np.isinf(found.interval).all()
