"""Fully connected models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Stack linear layers with one activation between them.

    Args:
        features: Inputs per sample after flattening.
        hidden: Widths of the hidden layers.
        classes: Number of outputs.
        activation: Applied after every hidden layer.
        dropout: Probability of dropping a hidden unit, in [0, 1).
    """

    def __init__(
        self,
        features: int = 64,
        hidden: Sequence[int] = (64, 32),
        classes: int = 10,
        *,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [features, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.drop = nn.Dropout(dropout) if dropout else None
        self.head = nn.Linear(widths[-1], classes)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = self.activation(layer(x))
            x = self.drop(x) if self.drop is not None else x
        return self.head(x)


class LeNet300(nn.Module):
    """LeNet-300-100: the fully connected network of the pruning literature.

    Args:
        features: Inputs per sample after flattening.
        classes: Number of outputs.
        hidden: Widths of the two hidden layers.
    """

    def __init__(self, features: int = 784, classes: int = 10, *, hidden: tuple[int, int] = (300, 100)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.head = nn.Linear(hidden[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.head(F.relu(self.fc2(x)))


class TwiceUsed(nn.Module):
    """Use one module at two places, so that hooks fire twice and its gradient is a sum.

    Args:
        features: Inputs per sample.
        classes: Number of outputs.
    """

    def __init__(self, features: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(features, 24)
        self.shared = nn.Linear(24, 24)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(self.shared(x)))


class RawParameter(nn.Module):
    """Scale and shift by bare parameters that no module owns, broadcast over the batch.

    Args:
        features: Inputs per sample.
        classes: Number of outputs.
    """

    def __init__(self, features: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 24)
        self.scale = nn.Parameter(torch.ones(24))
        self.shift = nn.Parameter(torch.zeros(1, 24))
        self.weight = nn.Parameter(torch.randn(classes, 24) / math.sqrt(24))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x)) * self.scale + self.shift
        return F.linear(x, self.weight)


class DictInTupleOut(nn.Module):
    """Take keyword inputs and return a tuple whose first entry is the logits.

    Args:
        left: Features of the first input.
        right: Features of the second input.
        classes: Number of outputs.
    """

    def __init__(self, left: int = 12, right: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.left = nn.Linear(left, 20)
        self.right = nn.Linear(right, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, classes)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(F.relu(self.left(left)) + F.relu(self.right(right)))
        return self.head(hidden), hidden


class GraphNet(nn.Module):
    """Classify graphs given as node features and a dense adjacency matrix.

    Args:
        features: Features per node.
        classes: Number of outputs.
    """

    def __init__(self, features: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Linear(features, 16)
        self.conv2 = nn.Linear(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        loops = adjacency + torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
        spread = loops / loops.sum(-1, keepdim=True)
        nodes = F.relu(self.conv1(spread @ nodes))
        nodes = F.relu(self.conv2(spread @ nodes))
        return self.head(nodes.mean(1))
