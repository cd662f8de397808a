"""What the claims on low-rank starts train, and how far it moved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.core.forward import outputs
from nervure.core.layerwise import tangent_kernel
from nervure.core.taps import tap
from nervure.spec import Ctx


@dataclass(frozen=True)
class Moved:
    """Hold how far training moved a network; all three are near 0 for a lazy one.

    Args:
        weight: |W - W_0| / |W_0| of one weight.
        kernel: 1 less the cosine between the tangent kernels.
        features: 1 less the cosine between the Gram matrices of the hidden layer.
        model: The network at the end.
    """

    weight: float
    kernel: float
    features: float
    model: nn.Module

    def loss(self, batch: tuple[Tensor, Tensor]) -> float:
        """Return the mean squared error on a batch."""
        with torch.no_grad():
            return float(F.mse_loss(outputs(self.model, batch[0]), batch[1]))


def mean(found: Sequence[Moved]) -> dict[str, float]:
    """Average the changes of several networks."""
    return {name: sum(getattr(one, name) for one in found) / len(found) for name in ("weight", "kernel", "features")}


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()))


def _hidden(model: nn.Module, inputs: Tensor, name: str) -> Tensor:
    with torch.no_grad(), tap(model, [name]) as seen:
        model(inputs)
    return seen[name][0].flatten(1)


def moved(model: nn.Module, start: nn.Module, inputs: Tensor, weight: str, *, hidden: str) -> Moved:
    """Compare a network with its start: one weight, the tangent kernel and the outputs of one layer."""
    now, before = model.get_parameter(weight).detach(), start.get_parameter(weight).detach()
    kernels = [tangent_kernel(each, inputs) for each in (model, start)]
    features = [_hidden(each, inputs, hidden) for each in (model, start)]
    return Moved(
        weight=float((now - before).norm() / before.norm()),
        kernel=1 - _cosine(*kernels),
        features=1 - _cosine(*(each @ each.T for each in features)),
        model=model,
    )


def settle(model: nn.Module, batch: tuple[Tensor, Tensor], *, rate: float, goal: float, most: int) -> nn.Module:
    """Train in place by full-batch gradient descent until the mean squared error is `goal`; return the start."""
    start = copy.deepcopy(model)
    values: list[Tensor] = list(model.parameters())
    for _ in range(most):
        loss = F.mse_loss(outputs(model, batch[0]), batch[1])
        if loss.item() <= goal:
            break
        gradients = torch.autograd.grad(loss, values)
        with torch.no_grad():
            torch._foreach_add_(values, gradients, alpha=-rate)
    return start


Arm = tuple[nn.Module, tuple[Tensor, Tensor], Tensor]


def linear_arms(ctx: Ctx, low_rank_: Callable[..., Tensor], number: int) -> dict[str, Arm]:
    """Return two-layer linear students, their samples of one teacher, and inputs to measure on."""
    draw = ctx.generator("teacher", number)
    teacher = torch.randn(1, 32, generator=draw, dtype=torch.float64)
    teacher /= teacher.norm()
    x, probe = (torch.randn(count, 32, generator=draw, dtype=torch.float64) for count in (400, 40))
    readout = torch.randn(1, 64, generator=draw, dtype=torch.float64) / 8

    def student(rank: int, *, again: str = "first", **options: Any) -> Arm:
        layers = nn.Linear(32, 64, bias=False), nn.Linear(64, 1, bias=False)
        net = nn.Sequential(*layers).double()
        with torch.no_grad():
            first = torch.randn(64, 32, generator=ctx.generator("first layer", number), dtype=torch.float64)
            layers[0].weight.copy_(first / 32**0.5)
            layers[1].weight.copy_(readout)
        low_rank_(layers[0].weight, rank, generator=ctx.generator(again, rank, number), **options)
        return net, (x, x @ teacher.T), probe

    return {
        "full rank": student(32),
        "rank 8": student(8),
        "rank 2": student(2),
        "full rank again": student(32, again="second"),
        "half the scale": student(32, gain=0.5),
        "full rank, equal spectral norm": student(32, norm="spectral"),
        "rank 2, equal spectral norm": student(2, norm="spectral"),
        "aligned": student(1, directions=teacher),
        "unaligned": student(1),
        "unaligned again": student(1, again="second"),
    }


class Recurrent(nn.Module):
    """Sixty-four tanh units and a linear readout of the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(4, 64, batch_first=True)
        self.readout = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the readout at the end, shape (N, 1)."""
        return self.readout(self.cell(x)[0][:, -1])


def recurrent(draw: torch.Generator) -> Recurrent:
    """Draw every weight with variance 1 / fan-in, biases zero."""
    net = Recurrent()
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim == 1:
                value.zero_()
            else:
                value.copy_(torch.randn(value.shape, generator=draw) * value.shape[1] ** -0.5)
    return net


def streams(draw: torch.Generator, count: int) -> tuple[Tensor, Any]:
    """Draw two noisy streams of 15 steps and a context that says of which one the sign is asked."""
    means = torch.rand(count, 2, generator=draw) * 2 - 1
    noisy = means[:, None] + 0.5 * torch.randn(count, 15, 2, generator=draw)
    asked = torch.randint(2, (count,), generator=draw)
    context = F.one_hot(asked, 2).float()[:, None].expand(-1, 15, -1)
    return torch.cat([noisy, context], 2), means.gather(1, asked[:, None]).sign()
