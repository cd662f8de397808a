"""The last linear layer of a network: what it is, and why there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nervure._kit import BadData, Unsupported
from nervure.core.heads import head


def test_scores_are_those_of_features_and_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    found = head(net, x, method="m")
    torch.testing.assert_close(found.features @ found.weight.T + found.bias, net(x).detach())
    assert torch.equal(found.features, net[:2](x).detach())


def test_a_network_that_diverged_is_told_apart_from_one_without_a_head():
    broken = nn.Linear(3, 2)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(BadData, match="not finite"):
        head(broken, torch.ones(2, 3), method="m")
    with pytest.raises(Unsupported, match="not those of a linear layer"):
        head(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.ones(2, 3), method="m")
