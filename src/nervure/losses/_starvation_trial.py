"""What the claims on spectral decoupling train on, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core import forward
from nervure.core.shortcut_tasks import Coloured, moon, two_colours
from nervure.spec import Ctx

Points = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def moon_pair(ctx: Ctx, *, gap: float = 0.1) -> tuple[Points, Points]:
    """Return 300 training points with the gap, and 2,000 that overlap by 0.3."""
    return (
        moon(300, gap=gap, noise=0.1, seed=ctx.seed_for("train")),
        moon(2000, gap=-0.3, noise=0.1, seed=ctx.seed_for("test")),
    )


def plain(odds: Tensor, y: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of log-odds, shape (N, 1)."""
    return F.binary_cross_entropy_with_logits(odds[:, 0], y.float() * (1 - smoothing) + smoothing / 2)


def fitted(
    ctx: Ctx,
    points: Points,
    *,
    steps: int,
    loss: Loss = plain,
    decay: float = 0.0,
    patience: int | None = None,
) -> nn.Module:
    """Train a ReLU network 2-500-1 by full-batch SGD.

    With patience a fifth of the points is held out, and the network of its least cross-entropy returned once so many
    steps did not lower that.
    """
    model = ctx.model("mlp", features=2, hidden=(500,), classes=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=decay)
    held = len(points[0]) // 5 if patience else 0
    order = torch.randperm(len(points[0]), generator=ctx.generator("held out"))
    (x_held, y_held), (x, y) = ((points[0][part], points[1][part]) for part in (order[:held], order[held:]))
    best, since, kept = float("inf"), 0, model
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if patience:
            with torch.no_grad():
                found = float(plain(model(x_held), y_held))
            best, since, kept = (found, 0, copy.deepcopy(model)) if found < best else (best, since + 1, kept)
            if since > patience:
                break
    return kept


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers of log-odds."""
    return float(((forward.predict(model, x).squeeze(1) > 0).long() == y).double().mean())


def coloured(ctx: Ctx) -> tuple[Coloured, Coloured]:
    """Return two-colour images whose colours agree with the label in 85% of all cases, and test images with 10%."""
    data = ctx.data("fashion-mnist", train=6000, test=2000)
    made = [
        two_colours(x[..., ::2, ::2], (y >= 5).long(), agreement=(chance,), seed=ctx.seed_for("colours", chance))
        for x, y, chance in ((data.train_x, data.train_y, 0.85), (data.test_x, data.test_y, 0.1))
    ]
    return made[0], made[1]
