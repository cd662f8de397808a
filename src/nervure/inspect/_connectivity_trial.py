"""What the claims on paths between networks share: data, networks, training by plain SGD."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.spec import Ctx, Data


@dataclass(frozen=True)
class Samples:
    """Hold images as vectors."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def pooled(data: Data) -> Samples:
    """Halve the images' sides and make them vectors."""
    x, test = (F.avg_pool2d(one, 2).flatten(1) for one in (data.train_x, data.test_x))
    return Samples(x, data.train_y, test, data.test_y)


def perceptron(ctx: Ctx, start: str, hidden: Sequence[int] = (128, 128, 128)) -> nn.Module:
    """Build a perceptron on pooled images, its weights drawn by a name."""
    return ctx.model("mlp", draw=start, features=196, hidden=tuple(hidden), classes=10)


def sgd(ctx: Ctx, model: nn.Module, data: Samples, steps: int, order: str, *, momentum: float = 0.9) -> nn.Module:
    """Return a copy trained by SGD at 0.05."""
    made = copy.deepcopy(model)
    if not steps:
        return made
    return ctx.train(
        made,
        cast("Data", data),
        steps=steps,
        optimizer=lambda values: torch.optim.SGD(values, lr=0.05, momentum=momentum),
        order=order,
    )


def wrong(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the share of wrong answers."""
    return (scores.argmax(-1) != targets).double().mean()


@torch.no_grad()
def elsewhere(ctx: Ctx, first: nn.Module, second: nn.Module, tag: str) -> tuple[nn.Module, nn.Module]:
    """Return the first network and one as far from it, tensor by tensor, as the second, in a random direction."""
    draw = ctx.generator(tag)
    end = copy.deepcopy(first)
    for value, other in zip(end.parameters(), second.parameters(), strict=True):
        step = torch.randn(value.shape, generator=draw)
        value.add_(step * ((other - value).norm() / step.norm()))
    return first, end


@torch.no_grad()
def scaled(model: nn.Module, *, like: nn.Module) -> nn.Module:
    """Return a copy scaled so that all its parameters together are as long as another's."""
    made = copy.deepcopy(model)
    lengths = [torch.cat([value.flatten() for value in one.parameters()]).norm() for one in (made, like)]
    for value in made.parameters():
        value.mul_(lengths[1] / lengths[0])
    return made


@torch.no_grad()
def held_out(first: Tensor, second: Tensor, partner: Tensor) -> tuple[float, float]:
    """Return correlations on the second half of the samples: of partners, and of the best linear map of the first half.

    Args:
        first: Units of one network, shape (N, P).
        second: Units of another, shape (N, Q).
        partner: For each unit of the first its partner in the second, or -1.

    Returns:
        Mean over the partners, and mean over the units of the second that vary.
    """
    half = len(first) // 2
    paired = (partner >= 0).nonzero().squeeze(1)
    ones = torch.ones(len(first), 1, dtype=torch.float64)
    x, y = torch.cat([first.double(), ones], 1), second.double()
    guessed = x[half:] @ torch.linalg.lstsq(x[:half], y[:half], driver="gelsd").solution

    def alike(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(0), b - b.mean(0)
        return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))

    one = alike(first[half:].double()[:, paired], y[half:][:, partner[paired]])
    whole = alike(guessed, y[half:])
    return float(one[one.isfinite()].mean()), float(whole[whole.isfinite()].mean())
