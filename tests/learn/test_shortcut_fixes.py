"""Every remedy spends the steps it is given, repeats by its seed, and is what its parts are by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nervure._kit import BadBudget
from nervure.core import forward
from nervure.data.shortcuts import slabs
from nervure.learn import Loop
from nervure.learn.shortcut_fixes import FIXES, Headed, Mean, bonsai, early_stopping, ensemble, erm

DATA = slabs(600, test=300, coordinates=(1, 3), seed=0)
TRAIN = (DATA.train_x, DATA.train_y)


class Counted(nn.Sequential):
    """Count the forward passes that train."""

    passes = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            Counted.passes += 1
        return super().forward(x)


def _build():
    return Counted(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("name", FIXES)
def test_it_spends_the_steps_learns_and_repeats(name):
    fix, steps = FIXES[name], 103
    Counted.passes = 0
    state = torch.get_rng_state()
    model = fix(_build, TRAIN, steps=steps, seed=1, lr=0.02)
    assert torch.equal(state, torch.get_rng_state())
    head = {"rfc-bonsai": steps - 15 - 38 - 38, "cat-representations": 10}.get(name, 0)
    assert Counted.passes == steps - head
    scores = forward.predict(model, DATA.test_x)
    assert scores.shape == (300, 2)
    assert float((scores.argmax(1) == DATA.test_y).double().mean()) > 0.9
    assert torch.equal(scores, forward.predict(fix(_build, TRAIN, steps=steps, seed=1, lr=0.02), DATA.test_x))
    assert not torch.equal(scores, forward.predict(fix(_build, TRAIN, steps=steps, seed=2, lr=0.02), DATA.test_x))


def test_erm_is_the_loop_and_an_ensemble_the_mean_of_its_members():
    model = erm(_build, TRAIN, steps=30, seed=3)
    from nervure.core import rng

    with rng.scope("weights", 3):
        twin = _build()
    Loop(twin, torch.optim.Adam(twin.parameters(), lr=1e-3), TRAIN, seed=3).run(30)
    assert torch.equal(forward.predict(model, DATA.test_x), forward.predict(twin, DATA.test_x))
    made = ensemble(_build, TRAIN, steps=31, seed=4, members=3)
    mean = torch.stack([forward.predict(one, DATA.test_x).softmax(1) for one in made.members]).mean(0)
    torch.testing.assert_close(forward.predict(made, DATA.test_x).exp(), mean)


def test_early_stopping_returns_the_best_seen():
    noisy = torch.where(torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.4, 1 - TRAIN[1], TRAIN[1])

    def build():
        return nn.Sequential(nn.Linear(2, 200), nn.ReLU(), nn.Linear(200, 2))

    from nervure.core import rng

    order = torch.randperm(600, generator=rng.generator("held out", 5))
    held = order[:120]

    def loss(model):
        return float(F.cross_entropy(forward.predict(model, TRAIN[0][held]), noisy[held]))

    rest = order[120:]
    every = [
        loss(erm(build, (TRAIN[0][rest], noisy[rest]), steps=count, seed=5, lr=0.05)) for count in range(10, 101, 10)
    ]
    stopped = early_stopping(build, (TRAIN[0], noisy), steps=100, seed=5, lr=0.05, patience=100)
    assert loss(stopped) == pytest.approx(min(every), rel=1e-6)


def test_budgets_that_cannot_be_met():
    with pytest.raises(BadBudget, match="members"):
        ensemble(_build, TRAIN, steps=2, members=3)
    with pytest.raises(BadBudget, match="shares"):
        bonsai(_build, TRAIN, steps=20, shares=(0.5, 0.6, 0.1))
    assert Mean([nn.Linear(2, 2)])(torch.zeros(1, 2)).exp().sum().item() == pytest.approx(1)
    assert Headed(nn.Linear(2, 3), nn.Linear(3, 4))(torch.zeros(1, 2)).shape == (1, 4)
