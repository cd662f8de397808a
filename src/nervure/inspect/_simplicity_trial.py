"""What the claim on simplicity bias trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nervure.core import forward
from nervure.data import Splits
from nervure.spec import Ctx


def trained(ctx: Ctx, inputs: Tensor, labels: Tensor, *, hidden: Sequence[int], steps: int) -> nn.Module:
    """Train a ReLU network by SGD of rate 0.1 in batches of 64."""
    model = ctx.model("mlp", features=inputs.shape[1], hidden=tuple(hidden), classes=2)
    none = inputs[:0]
    data = Splits("points", 2, inputs, labels, none, labels[:0], none, labels[:0])
    return ctx.train(model, data, steps=steps, batch_size=64, optimizer=_sgd)


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Mean(nn.Module):
    """Answer by the mean of several networks' outputs.

    Args:
        members: The networks.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean output."""
        return torch.stack([forward.outputs(member, x) for member in self.members]).mean(0)
