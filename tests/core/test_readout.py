"""Readouts against formulas, and few-shot episodes against what chance and separation give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nervure._kit import BadData, UsageError
from nervure.core.readout import KINDS, PENALTIES, Readout, few_shot


def _classes(n, gap, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(2).repeat(n // 2)
    x = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    x[:, 0] += gap * (2 * y - 1)
    return x, y


@pytest.mark.parametrize("kind", KINDS)
def test_two_gaussians_are_told_apart_as_well_as_theory_says(kind):
    x, y = _classes(4000, 1.0)
    test_x, test_y = _classes(4000, 1.0, seed=1)
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    found = Readout(x, y, kind=kind).accuracy(test_x, test_y)
    assert found <= best + 0.02
    assert found >= best - (0.06 if kind == "nearest-neighbours" else 0.02)


def test_ridge_is_the_closed_form_with_the_penalty_that_leaves_one_out_best():
    x, y = _classes(60, 0.5)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    target = 2.0 * y.numpy() - 1

    def left_out(penalty):
        centred = target - target.mean()
        hat = z @ np.linalg.solve(z.T @ z + penalty * np.eye(3), z.T) + 1 / len(z)
        return float((((centred - z @ np.linalg.solve(z.T @ z + penalty * np.eye(3), z.T @ centred))
                       / (1 - np.diag(hat))) ** 2).mean())  # fmt: skip

    best = min(PENALTIES, key=left_out)
    weight = np.linalg.solve(z.T @ z + best * np.eye(3), z.T @ (target - target.mean()))
    truth = torch.from_numpy((z @ weight + target.mean() > 0).astype(np.int64))
    assert torch.equal(Readout(x, y).predict(x), truth)


def test_a_constant_feature_and_scale_do_no_harm():
    x, y = _classes(200, 2.0)
    odd = torch.cat([x * torch.tensor([1e6, 1, 1e-6]), torch.ones(200, 1)], 1)
    assert Readout(odd, y).accuracy(odd, y) == Readout(x, y).accuracy(x, y)


def test_bad_input_is_refused():
    x, y = _classes(10, 1.0)
    with pytest.raises(UsageError, match="no such readout"):
        Readout(x, y, kind="forest")
    with pytest.raises(BadData, match="differ in number"):
        Readout(x, y[1:])
    with pytest.raises(BadData, match="not finite"):
        Readout(x * float("nan"), y)
    with pytest.raises(BadData, match="one class alone"):
        Readout(x, torch.zeros(10, dtype=torch.long))
    with pytest.raises(BadData, match="no such episodes"):
        few_shot(x, y, ways=3)
    with pytest.raises(BadData, match="no such episodes"):
        few_shot(x, y, shots=5)


def test_few_shot_accuracy_is_chance_without_and_near_one_with_separation_and_theory_between():
    noise, y = _classes(400, 0.0)
    assert abs(float(few_shot(noise, y, episodes=300).mean()) - 0.5) < 0.02
    far, _ = _classes(400, 20.0)
    assert float(few_shot(far, y, episodes=50).min()) == 1.0
    # With many shots the class means are exact: half a gap of one standard deviation.
    x, y = _classes(8000, 1.0)
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert abs(float(few_shot(x, y, shots=2000, episodes=10).mean()) - truth) < 0.01
    assert torch.equal(few_shot(x, y, episodes=3, seed=4), few_shot(x, y, episodes=3, seed=4))
