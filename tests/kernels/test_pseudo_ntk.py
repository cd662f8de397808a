"""The pseudo-NTK and its error estimate against the full kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nervure._kit import UsageError
from nervure.kernels.pseudo_ntk import _network, _relative_error, _slope, pntk, pntk_error
from nervure.kernels.torchntk import entk, jacobian_entk


def _model(outputs=4):
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, outputs)).double()


def test_is_the_full_kernel_between_normalised_sums():
    model, x = _model(), torch.randn(5, 3).double()
    truth = jacobian_entk(model, x).sum((2, 3)) / 4
    torch.testing.assert_close(pntk(model, x).full, truth, rtol=1e-12, atol=1e-12)


def test_error_is_exact_when_all_outputs_are_drawn():
    model, x = _model(), torch.randn(6, 3).double()
    truth = jacobian_entk(model, x)
    approximation = torch.einsum("nm,op->nmop", truth.sum((2, 3)) / 4, torch.eye(4).double())
    found = pntk_error(model, x, outputs_drawn=4)
    assert found.exact
    assert found.pairs == 16
    assert math.isclose(found.relative, float((truth - approximation).norm() / truth.norm()), rel_tol=1e-10)
    assert math.isclose(found.relative**2, found.diagonal**2 + found.off_diagonal**2, rel_tol=1e-10)
    assert math.isclose(_relative_error(truth, truth.sum((2, 3)) / 4), found.relative, rel_tol=1e-10)


def test_error_from_few_outputs_is_close_over_draws():
    model, x = _model(20), torch.randn(6, 3).double()
    exact = pntk_error(model, x, outputs_drawn=20).relative
    squares = [pntk_error(model, x, outputs_drawn=10, seed=seed).relative ** 2 for seed in range(40)]
    assert math.isclose(math.sqrt(sum(squares) / 40), exact, rel_tol=0.1)
    with pytest.raises(UsageError):
        pntk_error(model, x, outputs_drawn=1)


def test_a_narrow_or_correlated_readout_is_seen():
    source = torch.Generator().manual_seed(0)
    wide = _network(512, source, convolutional=False)
    x = torch.randn(16, 64)
    good = pntk_error(wide, x).relative
    assert good < 0.15
    with torch.no_grad():
        wide[-1].weight.copy_(wide[-1].weight[:1].expand(10, -1))
    assert pntk_error(wide, x).relative > 4 * good
    assert pntk_error(_network(512, source, convolutional=False, readout=4), x).relative > 4 * good


def test_slope_of_a_power_law():
    assert math.isclose(_slope([32, 64, 256], [32**-0.5, 64**-0.5, 256**-0.5]), -0.5)
    assert (
        entk(_network(8, torch.Generator().manual_seed(0), convolutional=True), torch.randn(2, 64)).full.shape[-1] == 10
    )
