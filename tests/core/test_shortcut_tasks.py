"""Moons on their half circles, and colours that agree as often as they should."""

from __future__ import annotations

import pytest
import torch

from nervure._kit import BadData, UsageError
from nervure.core.shortcut_tasks import moon, two_colours


@pytest.mark.parametrize("gap", [0.1, -0.3])
def test_moons_lie_on_half_circles(gap):
    # By hand: the height off the axis is gap + 0.05 + sin t, and the other coordinate cos t.
    x, y = moon(200, gap=gap, noise=0.0, seed=3)
    sine = (1 - 2.0 * y) * x[:, 0] - gap - 0.05
    cosine = torch.where(y == 0, x[:, 1] + 0.5, 0.5 - x[:, 1])
    assert torch.allclose(sine**2 + cosine**2, torch.ones(200), atol=1e-5)
    assert float(sine.min()) > -1e-6
    assert y.bincount().tolist() == [100, 100]


def test_colours_agree_as_often_as_said():
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.rand(8000, 1, 4, 4, generator=draw) - 3, torch.randint(2, (8000,), generator=draw)
    made = two_colours(images, labels, agreement=(0.9, 0.2), noise=0.25, seed=1)
    assert made.environment.bincount().tolist() == [4000, 4000]
    for number, chance in enumerate((0.9, 0.2)):
        here = made.environment == number
        assert float((made.colour == made.y)[here].double().mean()) == pytest.approx(chance, abs=0.025)
        assert float((made.shape == made.y)[here].double().mean()) == pytest.approx(0.75, abs=0.025)
    assert torch.equal(made.shape, labels)
    rows = torch.arange(8000)
    assert torch.equal(made.x[rows, 1 - made.colour], torch.zeros(8000, 4, 4))
    grey = made.x[rows, made.colour]
    assert torch.allclose(grey, (images[:, 0] - images.min()) / (images.max() - images.min()))
    with pytest.raises(BadData, match="cannot be coloured"):
        two_colours(images, labels + 1)
    with pytest.raises(UsageError, match="colouring"):
        two_colours(images, labels, agreement=(1.2,))
