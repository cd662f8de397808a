"""Objectives over groups against loops and autograd of the scale."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nervure._kit import UsageError
from nervure.losses.environments import group_dro, group_means, irm, vrex

DRAW = torch.Generator().manual_seed(0)
SCORES = torch.randn(12, 3, generator=DRAW, dtype=torch.float64)
TARGETS = torch.randint(3, (12,), generator=DRAW)
GROUPS = torch.tensor([5, 5, 2, 2, 2, 9, 9, 9, 9, 9, -1, -1])


def _means():
    return [F.cross_entropy(SCORES[g == GROUPS], TARGETS[g == GROUPS]) for g in (2, 5, 9)]


def test_against_loops():
    losses = F.cross_entropy(SCORES, TARGETS, reduction="none")
    truth = torch.stack(_means())
    torch.testing.assert_close(group_means(losses, GROUPS), truth)
    torch.testing.assert_close(group_dro(losses, GROUPS), truth.max())
    torch.testing.assert_close(vrex(losses, GROUPS, strength=3.0), truth.mean() + 3 * truth.var())
    alone = torch.where(GROUPS == 9, GROUPS, -1)
    torch.testing.assert_close(vrex(losses, alone, strength=3.0), truth[2])


def test_irm_is_the_gradient_of_the_scale():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    total = 0.0
    for g in (2, 5, 9):
        loss = F.cross_entropy(SCORES[g == GROUPS] * scale, TARGETS[g == GROUPS])
        (pull,) = torch.autograd.grad(loss, scale)
        total += loss.detach() + 7 * pull**2
    torch.testing.assert_close(irm(SCORES, TARGETS, GROUPS, strength=7.0), total / 3)


def test_gradients_and_errors():
    def objective(scores):
        return irm(scores, TARGETS, GROUPS) + vrex(F.cross_entropy(scores, TARGETS, reduction="none"), GROUPS)

    assert torch.autograd.gradcheck(objective, (SCORES.clone().requires_grad_(),))
    with pytest.raises(UsageError, match="do not fit"):
        group_dro(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match="do not fit"):
        group_dro(torch.zeros(3), torch.full((3,), -1))
