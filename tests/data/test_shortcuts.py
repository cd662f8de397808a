"""Shortcut data against the laws they are drawn from, and classifiers written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from nervure._kit import BadData, UsageError
from nervure.data.shortcuts import moons, rotation, slab_edges, slabs, stacked

# |x| of each class with margin 0.1 and width 1: ranges and their shares, worked out by hand.
LAWS = {
    3: {0: [(0.0, 4 / 15, 1.0)], 1: [(7 / 15, 1.0, 1.0)]},
    5: {0: [(0.0, 0.12, 0.75), (0.76, 1.0, 0.25)], 1: [(0.32, 0.56, 1.0)]},
    7: {
        0: [(0.0, 2 / 35, 0.5), (4 / 7, 24 / 35, 0.5)],
        1: [(9 / 35, 13 / 35, 0.875), (31 / 35, 1.0, 0.125)],
    },
}


def _law(parts):
    """The distribution function of x, symmetric about 0."""

    def cdf(x):
        x = np.asarray(x)
        inside = sum(share * np.clip((abs(x) - low) / (high - low), 0, 1) for low, high, share in parts)
        return 0.5 + np.sign(x) * inside / 2

    return cdf


@pytest.mark.parametrize("kind", [3, 5, 7])
def test_slabs_follow_their_law_and_each_tells_the_class(kind):
    data = slabs(6000, test=1000, coordinates=(1, kind, kind), seed=kind)
    x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    assert abs(float(y.double().mean()) - 0.5) < 0.03
    assert torch.equal((x[:, 0] > 0).long(), y)
    for cls, sign in ((0, -1), (1, 1)):
        assert kstest(x[y == cls, 0].numpy() * sign, lambda v: np.clip((v - 0.1) / 0.9, 0, 1)).pvalue > 1e-3
        for column in (1, 2):
            assert kstest(x[y == cls, column].numpy(), _law(LAWS[kind][cls])).pvalue > 1e-3
    for column in (1, 2):  # by hand: which ring a point lies in tells its class
        edges = torch.tensor([low for low, _ in slab_edges(kind)][1:]) - 0.1
        assert torch.equal(torch.bucketize(x[:, column].abs(), edges) % 2, y)
    gap = x[y == 1, 1].abs().min() - x[(y == 0) & (x[:, 1].abs() < x[y == 1, 1].abs().min()), 1].abs().max()
    assert 0.2 <= float(gap) < 0.21
    inside = np.corrcoef(x[y == 0].abs().numpy().T)
    assert np.abs(inside - np.eye(3)).max() < 0.06


def test_wrong_signs_width_and_rotation():
    plain = slabs(400, test=100, wrong=0.1, width=3.0, coordinates=(1, 5), seed=1)
    x, y = torch.cat([plain.train_x, plain.test_x]), torch.cat([plain.train_y, plain.test_y])
    assert int(((x[:, 0] > 0).long() != y).sum()) == 50
    assert 2.9 < float(x.abs().max()) <= 3.0
    turn = rotation(2, seed=2)
    assert torch.allclose(turn @ turn.T, torch.eye(2), atol=1e-6)
    turned = slabs(400, test=100, wrong=0.1, width=3.0, coordinates=(1, 5), seed=1, rotation=turn)
    assert torch.allclose(turned.train_x @ turn.T, plain.train_x, atol=1e-5)
    assert torch.equal(slabs(50, test=5, seed=3).train_x, slabs(50, test=5, seed=3).train_x)
    assert not torch.equal(slabs(50, test=5, seed=3).train_x, slabs(50, test=5, seed=4).train_x)


def test_slabs_that_do_not_exist():
    with pytest.raises(UsageError, match="slab coordinate"):
        slabs(10, coordinates=(4,))
    with pytest.raises(UsageError, match="slab coordinate"):
        slab_edges(7, margin=0.2)
    with pytest.raises(UsageError, match="no such data"):
        slabs(0)


def test_moons_part_by_a_line_and_overlap_in_the_test():
    data = moons(300, test=2000, noise=0.0, seed=1)
    assert torch.equal((data.train_x[:, 0] < 0).long(), data.train_y)
    assert float(data.train_x[:, 0].abs().min()) >= 0.1
    assert 0.05 < float(((data.test_x[:, 0] < 0).long() != data.test_y).double().mean()) < 0.9
    # By hand: on half circles of radius 1, the height off the axis is gap + 0.05 + sin t.
    sine = data.train_x[:, 0].abs().double() - 0.15
    along = data.train_x[:, 1].double() + 0.5
    cosine = torch.where(data.train_y == 0, along, 1 - along)
    assert torch.allclose(sine**2 + cosine**2, torch.ones(300, dtype=torch.float64), atol=1e-5)
    noisy = moons(300, test=10, seed=1)
    assert float(noisy.train_x[:, 0].abs().min()) >= 0.1
    assert not torch.equal(noisy.train_x, moons(300, test=10, seed=2).train_x)


def test_stacked_pairs_share_a_class():
    easy = torch.arange(10) % 2
    hard = torch.tensor([0, 0, 0, 1, 1, 2])

    def images(classes):
        return classes.view(-1, 1, 1, 1).expand(-1, 1, 2, 3).float()

    x, y = stacked((images(easy), easy), (images(hard) + 10, hard))
    assert y.bincount().tolist() == [3, 2]
    assert torch.equal(x[:, 0, 0, 0].long(), y)
    assert torch.equal(x[:, 0, 2, 0].long() - 10, y)
    with pytest.raises(BadData, match="share no class"):
        stacked((images(easy), easy), (images(hard), hard + 5))
    with pytest.raises(BadData, match="shape"):
        stacked((images(easy), easy), (torch.zeros(6, 3, 2, 3), hard))
