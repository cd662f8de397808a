"""What the claim on rich features trains on, and the robust head it reads them by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from nervure.core import forward, rng
from nervure.core.shortcut_tasks import Coloured, two_colours
from nervure.losses.environments import vrex
from nervure.spec import Ctx


def coloured(ctx: Ctx, *, agreement: Sequence[float] = (0.9, 0.8), reverse: float = 0.1) -> tuple[Coloured, Coloured]:
    """Return training environments of 3,000 two-colour images each, and 2,000 test images of another agreement."""
    data = ctx.data("fashion-mnist", train=3000 * len(agreement), test=2000)
    made = [
        two_colours(x[..., ::2, ::2], (y >= 5).long(), agreement=chances, seed=ctx.seed_for("colours", part))
        for part, x, y, chances in (
            ("train", data.train_x, data.train_y, tuple(agreement)),
            ("test", data.test_x, data.test_y, (reverse,)),
        )
    ]
    return made[0], made[1]


def score(model: nn.Module, data: Coloured) -> float:
    """Return the share of right answers."""
    return float((forward.predict(model, data.x).argmax(1) == data.y).double().mean())


def robust_head(ctx: Ctx, extractor: nn.Module, train: Coloured, test: Coloured) -> float:
    """Train a linear head on frozen features by V-REx, and return its accuracy on the test images.

    500 steps of full-batch Adam of rate 0.01; the variance counts once for 100 steps and then a thousandfold, the loss
    divided by as much.
    """
    features = forward.predict(extractor, train.x).flatten(1)
    with rng.scope("head", ctx.seed_for("head")):
        head = nn.Linear(features.shape[1], 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for step in range(ctx.scaled(500, 200)):
        strength = 1.0 if step < 100 else 1000.0
        optimizer.zero_grad()
        losses = F.cross_entropy(head(features), train.y, reduction="none")
        (vrex(losses, train.environment, strength=strength) / strength).backward()
        optimizer.step()
    scores = forward.predict(head, forward.predict(extractor, test.x).flatten(1))
    return float((scores.argmax(1) == test.y).double().mean())
