"""A tiny task for examples and contracts: it trains any classifier on random data in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure import data
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
        self,
        model: nn.Module,
        *,
        steps: int,
        part: int = 0,
        after_step: Callable[[int], None] | None = None,
        optimizer: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer] | None = None,
    ) -> None:
        """Train in place by Adam at 0.01."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=0.01)
        if optimizer is not None:
            made = optimizer(model, made)
        hook = type("Hook", (), {"after_step": staticmethod(after_step)})() if after_step else object()
        samples = (self.inputs, self.targets)
        Loop(model, made, samples, loss=self.loss_function, batch_size=8, hooks=[hook], seed=part).run(steps)

    def parts(self, count: int, *, by: Literal["class", "chance"], seed: int) -> list[ToyTask]:
        """Return tasks on disjoint parts of the data; targets that are no class numbers are cut by chance."""
        y = self.targets if self.targets.ndim == 1 else torch.arange(len(self.targets))
        return [
            ToyTask(forward.take(self.inputs, place), self.targets[place], loss=self.loss_function)
            for place in data.parts(y, count, by=by, seed=seed)
        ]


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
