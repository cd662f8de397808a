"""Units that may change places, and tensors with them in another order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure._kit import BadModel
from nervure.core.channels.copies import every

Orders = dict[tuple[str, int], Tensor]
"""(tensor, axis) -> from which index each index comes; absent axes are in their own order."""


@dataclass(frozen=True)
class Place:
    """Hold where the units of a group lie along one axis of one tensor.

    Args:
        tensor: Qualified name of the parameter or buffer.
        axis: The axis.
        index: Shape (units, m): the indices of each unit, the k-th of one in the place of the k-th of another.
        produces: Whether the units' values are made here, rather than read.
    """

    tensor: str
    axis: int
    index: Tensor
    produces: bool

    def order(self, permutation: Tensor, length: int) -> Tensor:
        """Return from which index of the axis each index comes.

        Args:
            permutation: From which unit each unit comes.
            length: The length of the axis.

        Returns:
            int64, shape (length,).
        """
        order = torch.arange(length)
        order[self.index.flatten()] = self.index[permutation].flatten()
        return order


@dataclass(frozen=True)
class Units:
    """Hold units that may change places with each other.

    Args:
        name: The first tensor that produces them; the cell of the axis is added where only one is meant.
        size: Number of units.
        places: Where they lie.
    """

    name: str
    size: int
    places: tuple[Place, ...]


def compose(orders: Orders, group: Units, permutation: Tensor, lengths: Mapping[tuple[str, int], int]) -> None:
    """Permute the units of a group after what was permuted before, in place.

    Args:
        orders: (tensor, axis) -> from which index each index comes; absent axes are in their own order.
        group: The group.
        permutation: From which unit each unit comes.
        lengths: (tensor, axis) -> length.
    """
    for place in group.places:
        key = (place.tensor, place.axis)
        step = place.order(permutation, lengths[key])
        orders[key] = orders[key][step] if key in orders else step


@torch.no_grad()
def reorder_(model: nn.Module, orders: Orders) -> None:
    """Put the indices of tensors in another order, in place.

    Args:
        model: The network.
        orders: (tensor, axis) -> from which index each index comes.

    Raises:
        BadModel: If the network does not have such tensors.
    """
    held = dict(every(model))
    for (name, axis), order in orders.items():
        if name not in held or held[name].ndim <= axis or held[name].shape[axis] != len(order):
            found = tuple(held[name].shape) if name in held else "no such tensor"
            raise BadModel(f"{name} is not as the permutation graph saw it", found=found)
        held[name].copy_(held[name].index_select(axis, order.to(held[name].device)))
