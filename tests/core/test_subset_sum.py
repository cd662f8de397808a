"""Subset sums against enumeration of all subsets."""

import itertools

import numpy as np
import pytest
import torch

from nervure._kit import UsageError
from nervure.core.subset_sum import subset_sum


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 12])
def test_no_subset_is_closer(n):
    draw = np.random.default_rng(n)
    values, goals = draw.normal(size=(6, n)), draw.normal(size=6) * 2
    found = subset_sum(torch.from_numpy(values), torch.from_numpy(goals)).numpy()
    every = np.array(list(itertools.product([0, 1], repeat=n)), dtype=float).reshape(2**n, n)
    best = np.abs(values @ every.T - goals[:, None]).min(1)
    np.testing.assert_allclose(np.abs((values * found).sum(1) - goals), best, atol=1e-12)


def test_shapes_types_and_chunks(monkeypatch):
    values, goals = torch.randn(3, 5, 10), torch.randn(3, 5)
    whole = subset_sum(values, goals)
    assert whole.shape == values.shape
    assert whole.dtype == torch.bool
    monkeypatch.setattr("nervure.core.subset_sum._CELLS", 64)
    assert torch.equal(subset_sum(values, goals), whole)
    assert subset_sum(torch.ones(0, 3), torch.ones(0)).shape == (0, 3)


def test_targets_outside_the_range_take_all_of_one_sign():
    values = torch.tensor([1.0, -2.0, 3.0, -4.0])
    assert subset_sum(values, torch.tensor(99.0)).tolist() == [True, False, True, False]
    assert subset_sum(values, torch.tensor(-99.0)).tolist() == [False, True, False, True]


def test_errors_fall_by_more_than_the_root_of_two_a_candidate():
    """For uniform candidates in [-1, 1] and targets in [-0.5, 0.5] the median error falls by 2^(n/2) at least."""
    draw = torch.Generator().manual_seed(0)
    medians = {}
    for n in (4, 12, 20):
        values = torch.rand(200, n, generator=draw, dtype=torch.float64) * 2 - 1
        goals = torch.rand(200, generator=draw, dtype=torch.float64) - 0.5
        medians[n] = float(((values * subset_sum(values, goals)).sum(1) - goals).abs().median())
    assert medians[4] / medians[12] > 2**4
    assert medians[12] / medians[20] > 2**4


def test_bad_shapes():
    with pytest.raises(UsageError, match="no such subset"):
        subset_sum(torch.ones(41), torch.ones(()))
    with pytest.raises(UsageError, match="no such subset"):
        subset_sum(torch.ones(2, 3), torch.ones(3))
