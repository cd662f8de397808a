"""How much each weight matters: magnitude, sensitivity of the loss, chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nervure.core import forward, rng

Loss = Callable[[nn.Module, Any], Tensor]


def magnitude(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return |w|.

    Args:
        weights: Name -> weight.

    Returns:
        Name -> score of the same shape.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}


def chance(weights: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Return uniform random scores that depend on the seed and the names only.

    Args:
        weights: Name -> weight.
        seed: The seed.

    Returns:
        Name -> score of the same shape.
    """
    return {
        name: torch.rand(weight.shape, generator=rng.generator("chance", seed, name)).to(weight.device)
        for name, weight in weights.items()
    }


def sensitivity(
    model: nn.Module, loss: Loss, batches: Iterable[Any], weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the connection sensitivity |w * dL/dw|, the gradient averaged over batches.

    This is |dL/dc| at c = 1 where every weight is gated by c * w. The model runs in train mode, as it will when
    it is trained; buffers, modes and gradients are given back as they were.

    Args:
        model: The model.
        loss: From (model, batch) to a scalar.
        batches: Batches with a common weight.
        weights: Name -> parameter of the model.

    Returns:
        Name -> score of the same shape; zero for a parameter the loss does not reach.
    """
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    with kept_buffers(model), forward.mode(model, train=True), torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), list(weights.values()), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
            count += 1
    return {name: (weights[name].detach() * total[name] / max(1, count)).abs() for name in total}


class kept_buffers:  # noqa: N801 - a context manager reads like a verb
    """Give a model's buffers (running statistics) back as they were, also after an exception.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for buffer, value in self.before:
                buffer.copy_(value)
