"""One training of a ladder of sizes, and the lower envelope of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure.core import rng
from nervure.core.cost import macs
from nervure.core.forward import batch_size as count_of
from nervure.core.forward import mode, outputs, take
from nervure.spec import Batch


@dataclass(frozen=True)
class Rung:
    """Hold one training of a ladder.

    Args:
        size: What the factory was called with.
        parameters: Number of parameters without embedding tables.
        macs: Multiply-adds of a forward for one symbol.
        symbols: Symbols seen at each mark.
        losses: Mean loss on the validation samples at each mark.
    """

    size: int
    parameters: int
    macs: float
    symbols: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The last loss."""
        return self.losses[-1]

    @property
    def compute(self) -> tuple[float, ...]:
        """Operations at each mark: 6 for each multiply-add and symbol, two forward and four backward."""
        return tuple(6 * self.macs * count for count in self.symbols)


@dataclass(frozen=True)
class Frontier:
    """Hold the best size for each budget of compute, N_opt(C) proportional to C^b.

    Args:
        compute: The budgets.
        losses: The lowest loss at each.
        parameters: Parameters of the model that has it.
        exponent: b; NaN where fewer than two sizes between the smallest and largest are ever the best.
        inner: How many such sizes there are.
    """

    compute: tuple[float, ...]
    losses: tuple[float, ...]
    parameters: tuple[int, ...]
    exponent: float
    inner: int

    @property
    def verdict(self) -> str:
        """Return "ok" where three sizes or more inside the ladder are the best for some budget."""
        return "ok" if self.inner >= 3 else "cannot tell"


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all symbols."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def trained(
    model: nn.Module,
    size: int,
    samples: Batch,
    validation: Batch,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    kept: Sequence[int],
    batch_size: int,
    seed: int,
) -> Rung:
    """Train a model in place and take its losses after the kept steps."""
    values = [value for value in model.parameters() if value.requires_grad]
    made = optimizer(values) if optimizer else torch.optim.Adam(values, lr=0.003, fused=True)
    inputs, targets = samples
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
    each_sample = targets[0].numel() if targets[0].ndim else 1
    work = macs(model, take(inputs, slice(0, 1))) / each_sample
    draw, losses = rng.generator("ladder order", seed), []
    for step in range(1, kept[-1] + 1):
        index = torch.randint(count_of(inputs), (batch_size,), generator=draw)
        made.zero_grad()
        loss(outputs(model, take(inputs, index)), take(targets, index)).backward()
        made.step()
        if step in kept:
            losses.append(_validated(model, validation, loss))
    return Rung(
        size,
        sum(value.numel() for value in model.parameters() if id(value) not in tables),
        work,
        tuple(step * batch_size * each_sample for step in kept),
        tuple(losses),
    )


@torch.no_grad()
def _validated(model: nn.Module, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    total, count = 0.0, count_of(batch[0])
    with mode(model, train=False):
        for start in range(0, count, 1024):
            part = slice(start, start + 1024)
            value = float(loss(outputs(model, take(batch[0], part)), take(batch[1], part)))
            total += value * min(1024, count - start)
    return total / count
