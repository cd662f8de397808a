"""Trying symmetries: which groups leave the outputs as they are, and which may be refined."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import Unsupported
from nervure.core import forward, rng
from nervure.core.channels.copies import every, tensors, twin
from nervure.core.permutation.units import Orders, Place, Units, compose

_METHOD = "permutation graph"


def refinements(groups: Sequence[Units]) -> dict[int, list[Units]]:
    """Find groups that may be able to move within each unit of another group by itself.

    Args:
        groups: The groups.

    Returns:
        Group -> a group for each unit of the other, in its order.
    """
    found = {}
    for number, inner in enumerate(groups):
        for outer in groups:
            cells = _cells(outer, inner) if outer is not inner and _slow(outer, inner) else []
            if cells:
                found[number] = cells
                break
    return found


def _cells(outer: Units, inner: Units) -> list[Units]:
    """Cut a group by the units of another; nothing where not every unit has an equal part in each."""
    cells = []
    for cell in range(outer.size):
        spots = {(one.tensor, one.axis): one.index[cell] for one in outer.places}
        places = [_within(one, spots[one.tensor, one.axis]) for one in inner.places]
        whole = tuple(one for one in places if one is not None)
        if len(whole) < len(places):
            return []
        cells.append(Units(f"{inner.name}, {cell}", inner.size, whole))
    return cells


def _slow(outer: Units, inner: Units) -> bool:
    """Tell whether the units of one group are stretches of each axis within which the others lie."""
    spots = {(one.tensor, one.axis): one.index for one in outer.places}
    first = inner.places[0]
    index = spots.get((first.tensor, first.axis))
    if index is None or any((one.tensor, one.axis) not in spots for one in inner.places):
        return False
    if len(spots) > len({(one.tensor, one.axis) for one in inner.places}):
        return True
    return bool(index[0].sort().values.diff().min() < first.index[0].sort().values.diff().min())


def _within(place: Place, spot: Tensor) -> Place | None:
    """Return the part of a place inside some indices, or None where not every unit has an equal part."""
    inside = torch.isin(place.index, spot)
    counts = inside.sum(1)
    if not counts[0] or (counts != counts[0]).any():
        return None
    return replace(place, index=place.index[inside].view(len(place.index), -1))


class Trial:
    """Compare outputs before and after random permutations, on a copy whose weights are disturbed."""

    def __init__(self, model: nn.Module, inputs: Any, lengths: Mapping[tuple[str, int], int]) -> None:
        self.lengths = lengths
        for dtype in (torch.float64, None):  # a forward that writes down a precision runs in its own alone
            self.model, self.inputs = copy.deepcopy(model), inputs
            if dtype is not None:
                self.model.to(dtype)
                self.inputs = forward.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
            self._disturb()
            self.tolerance = 100 * torch.finfo(dtype or torch.get_default_dtype()).eps ** 0.75
            try:
                self.before = self._outputs(self.model)
                return
            except (RuntimeError, TypeError, ValueError) as error:
                reason = error
        raise Unsupported(_METHOD, model, why=f"it does not run ({reason})")

    @torch.no_grad()
    def _disturb(self) -> None:
        """Tell apart what starts alike, such as scales of norms; variances stay positive."""
        draw = rng.generator("disturb")
        for _, value in every(self.model):
            if value.is_floating_point():
                factor, shift = (torch.rand(value.shape, generator=draw) for _ in range(2))
                value.mul_((1 + 0.2 * factor).to(value)).add_((0.05 * shift).to(value))

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with forward.mode(model, train=False), rng.scope("permutation"), torch.no_grad():
            return [one.to(torch.float64, copy=True) for one in tensors(forward.call(model, self.inputs))]

    def holds(self, chosen: Sequence[Units]) -> bool:
        """Tell whether the outputs stay when the units of groups change places: all in a ring, and two of each."""
        draw = rng.generator("trial")
        for count in (None, 2):
            orders: Orders = {}
            for group in chosen:
                permutation, ring = torch.arange(group.size), torch.randperm(group.size, generator=draw)[:count]
                permutation[ring] = ring.roll(1)
                compose(orders, group, permutation, self.lengths)
            if not all(map(self._alike, self.before, self._outputs(self._moved(orders)))):
                return False
        return True

    def _moved(self, orders: Orders) -> nn.Module:
        """Return the model with some tensors in another order; it shares the others."""
        held = dict(every(self.model))
        moved: dict[str, Tensor] = {}
        for (name, axis), order in orders.items():
            value = moved.get(name, held[name].detach())
            moved[name] = value.index_select(axis, order.to(value.device))
        replaced: dict[int, Tensor] = {}
        for name, value in moved.items():
            kept = isinstance(held[name], nn.Parameter)
            replaced[id(held[name])] = nn.Parameter(value, requires_grad=False) if kept else value
        return twin(self.model, replaced)

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape:
            return False
        apart = torch.where(one == other, 0.0, (one - other).abs())
        scale = float(one[one.isfinite()].abs().sum().clamp_min(1e-30)) / max(1, one.numel())
        return bool((apart <= self.tolerance * scale).all())
