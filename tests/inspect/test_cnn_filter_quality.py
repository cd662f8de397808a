"""Filter quality against numpy's SVD, random kernels and constructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nervure._kit import BadModel, Unsupported
from nervure.inspect import filter_quality, filter_shift
from nervure.inspect.cnn_filter_quality import entropy, random_above


def test_entropy_and_sparsity_against_numpy():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, 3)
    with torch.no_grad():
        layer.weight[2:4] *= 1e-4
    found = filter_quality(layer).layers[""]
    kernels = layer.weight.detach().double().numpy().reshape(60, 9)
    s = np.linalg.svd(kernels - kernels.mean(0), compute_uv=False)
    p = s**2 / (s**2).sum()
    assert found.entropy == pytest.approx(-(p * np.log10(p)).sum(), abs=1e-9)
    assert found.sparsity == pytest.approx((np.abs(kernels).max(1) < 0.01 * np.abs(kernels).max()).mean())
    assert found.kernels == 60
    rows = layer.weight.detach().double().numpy().reshape(10, -1)
    cosines = np.abs(np.corrcoef(rows) * 0 + (rows @ rows.T) / np.outer(*[np.linalg.norm(rows, axis=1)] * 2))
    assert found.orthogonality == pytest.approx(1 - (cosines.sum() - 10) / 90, abs=1e-9)


@pytest.mark.parametrize("entries", [3, 9, 25])
@pytest.mark.parametrize("kernels", [64, 512, 4096])
def test_random_kernels_are_above_the_threshold_nineteen_times_in_twenty(kernels, entries):
    draw = torch.Generator().manual_seed(7)
    found = [entropy(torch.randn(kernels, entries, generator=draw, dtype=torch.float64)) for _ in range(60)]
    above = sum(one > random_above(kernels, entries) for one in found) / 60
    assert above >= 0.85  # 95% and its spread over 60 draws
    assert max(found) <= math.log10(entries) + 1e-9


def test_kinds():
    torch.manual_seed(1)
    random = nn.Conv2d(16, 16, 3)
    assert filter_quality(random).layers[""].kind == "random"
    repeated = nn.Conv2d(16, 16, 3)
    patterns = torch.randn(1, 1, 3, 3) * torch.rand(16, 16, 1, 1)
    repeated.weight.data.copy_(patterns)
    assert filter_quality(repeated).layers[""].kind == "few patterns"
    dead = nn.Conv2d(16, 16, 3)
    dead.weight.data[:12] *= 1e-5
    assert filter_quality(dead).layers[""].kind == "dead"
    smooth = nn.Conv2d(16, 16, 3)
    basis = torch.linalg.qr(torch.randn(9, 9))[0]
    spread = torch.tensor([4.0, 2, 1, 0.5, 0.25, 0.1, 0.1, 0.1, 0.1])
    smooth.weight.data.copy_(((torch.randn(256, 9) * spread) @ basis.T).view(16, 16, 3, 3))
    assert filter_quality(smooth).layers[""].kind == "structured"
    assert filter_quality(smooth).verdict == "ok"
    few = filter_quality(nn.Conv2d(1, 8, 3))
    assert few.layers[""].kind == "too few kernels"
    assert few.verdict == "cannot tell"
    assert filter_quality(random).verdict == "warn"


def test_transposed_grouped_one_dimensional_and_shared_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.grouped = nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 8, 3, groups=2)
            self.line, self.point = nn.Conv1d(3, 5, 5), nn.Conv2d(4, 4, 1)
            self.again = self.grouped

    found = filter_quality(Net()).layers
    assert {name: (one.kernels, one.entries) for name, one in found.items()} == {
        "up": (24, 9),
        "grouped": (24, 9),
        "line": (15, 5),
    }
    with pytest.raises(Unsupported, match="no convolution"):
        filter_quality(nn.Linear(3, 3))
    broken = nn.Conv2d(2, 2, 3)
    broken.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(BadModel, match="not finite"):
        filter_quality(broken)
    assert filter_quality(nn.Conv2d(2, 2, 3).requires_grad_(False)).layers[""].kernels == 4


def test_a_layer_of_zeros_is_dead():
    layer = nn.Conv2d(8, 8, 3)
    layer.weight.data.zero_()
    found = filter_quality(layer).layers[""]
    assert (found.kind, found.entropy, found.sparsity) == ("dead", 0.0, 1.0)


def test_the_shift_of_two_gaussians_is_the_closed_form():
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 1, generator=draw, dtype=torch.float64)
    second = torch.randn(200_000, 1, generator=draw, dtype=torch.float64) + 0.5
    assert filter_shift(first, second) == pytest.approx(0.25, rel=0.05)  # (mu1 - mu2)^2 / sigma^2
    assert filter_shift(first, first) == 0
    with pytest.raises(BadModel, match="differ in size"):
        filter_shift(first, torch.randn(5, 4))
