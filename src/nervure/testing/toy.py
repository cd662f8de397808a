"""A tiny task for examples and contracts: it trains any classifier on random data in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core import forward, rng
from nervure.learn import Loop


class ToyTask:
    """Meet `nervure.spec.Task` with a few samples held in memory.

    Args:
        inputs: All inputs: a tensor, or a tuple or dict of tensors.
        targets: Class numbers.
        loss: From (outputs, targets) to a scalar.
    """

    def __init__(self, inputs: Any, targets: Tensor, *, loss: Callable[[Any, Any], Tensor] | None = None) -> None:
        self.inputs, self.targets = inputs, targets
        self.loss_function = loss or _cross_entropy

    def batches(self, count: int) -> Sequence[Any]:
        """Return the whole data `count` times."""
        return [(self.inputs, self.targets)] * count

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.loss_function(forward.call(model, batch[0]), batch[1])

    def train(
        self, model: nn.Module, *, steps: int, part: int = 0, after_step: Callable[[int], None] | None = None
    ) -> None:
        """Train in place by Adam at 0.01."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        hook = type("Hook", (), {"after_step": staticmethod(after_step)})() if after_step else object()
        data = (self.inputs, self.targets)
        Loop(model, optimizer, data, loss=self.loss_function, batch_size=8, hooks=[hook], seed=part).run(steps)


def _cross_entropy(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(forward.logits(output).flatten(0, -2), targets.flatten())


def toy_task(*, features: int = 8, classes: int = 3, count: int = 32) -> ToyTask:
    """Return a task of random vectors with labels a linear rule gives.

    Args:
        features: Inputs per sample.
        classes: Number of classes.
        count: Number of samples.

    Returns:
        The task.
    """
    draw = rng.generator("toy", features, classes)
    x = torch.randn(count, features, generator=draw)
    return ToyTask(x, (x @ torch.randn(features, classes, generator=draw)).argmax(1))
