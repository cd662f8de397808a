"""What the claims of knapsack pruning share: a trained network, and the loss of distilled logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from nervure.compress._otov2_trial import halved
from nervure.data import Splits
from nervure.spec import Ctx


def instances(seed: int) -> Iterator[tuple[Any, Any, int, float, float]]:
    """Draw 50 knapsacks of 8 to 18 items.

    Yields:
        Values, weights, capacity, the value of the best of all subsets, and of the most valuable items that fit.
    """
    draw = np.random.default_rng(seed)
    for _ in range(50):
        count = int(draw.integers(8, 19))
        values, weights = draw.random(count), draw.integers(1, 40, count) * int(draw.integers(1, 500))
        capacity = int(draw.uniform(0.2, 0.8) * weights.sum())
        subsets = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        best = float((subsets @ values)[subsets @ weights <= capacity].max())
        order = np.argsort(-values)
        fitting = np.searchsorted(weights[order].cumsum(), capacity, side="right")
        yield values, weights, capacity, best, float(values[order[:fitting]].sum())


def prepared(ctx: Ctx, steps: int) -> tuple[nn.Module, Splits]:
    """Return a residual network of widths 16, 32, 64 trained on images of 14 x 14."""
    data = halved(ctx.data("fashion-mnist", train=20_000, test=5_000))
    parent = ctx.model("residual-conv", widths=(16, 32, 64))
    return ctx.train(parent, data, steps=steps), data


def labels_and_logits(output: Tensor, targets: Tensor, temperature: float = 4.0) -> Tensor:
    """Return cross-entropy of the labels plus T^2 times the divergence from the softened logits beside them."""
    soft = nn.functional.kl_div(
        (output / temperature).log_softmax(1),
        (targets[:, 1:] / temperature).log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    return nn.functional.cross_entropy(output, targets[:, 0].long()) + temperature**2 * soft
