"""The permutation graph: which units of a network may change places without changing what it computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core import rng
from nervure.core.channels import Group, Pinned
from nervure.core.channels import groups as tables
from nervure.core.channels.copies import every
from nervure.core.channels.labels import Array
from nervure.core.channels.watch import run
from nervure.core.permutation.rules import RULES
from nervure.core.permutation.trial import Trial, refinements
from nervure.core.permutation.units import Orders, Place, Units, compose, reorder_

Permutations = Mapping[int, Tensor]
"""Group -> from which unit each unit comes; groups that are not named stay."""


@dataclass(frozen=True)
class PermutationGraph:
    """Hold the groups of interchangeable units of a network.

    The groups are read from one traced forward pass, so that residual sums, depthwise and grouped convolutions, norms,
    attention heads, recurrent gates, ties and concatenations need no rule by hand. Every group is then tried: a copy
    with disturbed weights must compute the same with the units in random order, or the group is pinned. Where an axis
    is a product, as heads times features, whole heads change places, and features within each head by themselves where
    that too leaves the outputs as they are.

    Permutations are applied in the order of the groups. Not every symmetry is found: features of queries, keys and
    values that leave one packed layer move alike.

    Args:
        groups: The groups.
        pinned: The axes that have to stay as they are, with the reasons.
        lengths: (tensor, axis) -> length of the axis.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = PermutationGraph.of(net, torch.ones(2, 3))
        >>> [(one.tensor, one.axis) for one in graph.groups[0].places]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
        >>> other = permuted(net, graph, graph.random(seed=0))
        >>> torch.equal(net[0].weight, other[0].weight)
        False
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(net(x), other(x), atol=1e-6)
        True
    """

    groups: tuple[Units, ...]
    pinned: tuple[Pinned, ...]
    lengths: Mapping[tuple[str, int], int]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> PermutationGraph:
        """Trace a model and try its symmetries.

        Args:
            model: The model; left as it is.
            inputs: A batch's inputs.

        Returns:
            The graph; without groups where every axis is pinned.

        Raises:
            Unsupported: If the model cannot be copied or traced.
        """
        trace = run(model, inputs, RULES)
        table, reasons = tables.tabulate(trace, {name: (name,) for name, _ in every(model)})
        lengths = {(name, axis): n for name, value in every(model) for axis, n in enumerate(value.shape)}
        found = [_units(group) for group in table.groups()]
        graph = cls(tuple(one for one in found if one is not None), reasons.pinned(), lengths)
        return _tried(graph, model, inputs)

    def random(self, *, seed: int) -> dict[int, Tensor]:
        """Draw a permutation for every group.

        Args:
            seed: The seed.

        Returns:
            Group -> from which unit each unit comes.
        """
        draw = rng.generator("permutation", seed)
        return {place: torch.randperm(one.size, generator=draw) for place, one in enumerate(self.groups)}

    def orders(self, permutations: Permutations) -> Orders:
        """Return from which index each index of each axis comes.

        Args:
            permutations: Group -> from which unit each unit comes; groups that are not named stay.

        Returns:
            (tensor, axis) -> int64, for the axes that change.

        Raises:
            UsageError: If there is no such group, or it is not a permutation of its units.
        """
        made: Orders = {}
        for number in sorted(permutations):
            if not 0 <= number < len(self.groups):
                raise UsageError("there is no such group", expected=f"0 to {len(self.groups) - 1}", found=number)
            group, permutation = self.groups[number], permutations[number]
            if not torch.equal(permutation.sort().values, torch.arange(group.size)):
                raise UsageError("this is no permutation", expected=f"each of 0 to {group.size - 1} once",
                                 found=permutation.tolist()[:5])  # fmt: skip
            compose(made, group, permutation, self.lengths)
        return made

    def read(self, orders: Orders) -> dict[int, Tensor]:
        """Return the permutations behind orders; the inverse of `orders`.

        Args:
            orders: (tensor, axis) -> from which index each index comes.

        Returns:
            Group -> from which unit each unit comes, for every group.
        """
        left = dict(orders)
        found = {}
        for number, group in enumerate(self.groups):
            place = group.places[0]
            order = left.get((place.tensor, place.axis), torch.arange(self.lengths[place.tensor, place.axis]))
            unit = torch.full_like(order, -1)
            unit[place.index.flatten()] = torch.arange(group.size).repeat_interleave(place.index.shape[1])
            found[number] = unit[order[place.index[:, 0]]]
            undone: Orders = {}
            compose(undone, group, found[number].argsort(), self.lengths)
            for key, inverse in undone.items():
                left[key] = inverse[left.get(key, torch.arange(len(inverse)))]
        return found


def permuted(model: nn.Module, graph: PermutationGraph, permutations: Permutations) -> nn.Module:
    """Return a copy of a network with its units in another order; it computes the same.

    Args:
        model: The network the graph was made of, or of the same shape; left as it is.
        graph: Its graph.
        permutations: Group -> from which unit each unit comes; groups that are not named stay.

    Returns:
        The copy.
    """
    made = copy.deepcopy(model)
    reorder_(made, graph.orders(permutations))
    return made


def _units(group: Group) -> Units | None:
    """Return a group's units, or None where they do not have equally many indices in every axis."""
    places = []
    for one in group.slices:
        channel = one.channel.numpy()
        inside = np.flatnonzero(channel >= 0)
        counts = np.bincount(channel[inside], minlength=group.size)
        if counts.min() != counts.max():
            return None
        index: Array = inside[np.argsort(channel[inside], kind="stable")].reshape(group.size, -1)
        places.append(Place(one.parameter, one.axis, torch.from_numpy(index), one.produces))
    return Units(group.name, group.size, tuple(places))


def _tried(graph: PermutationGraph, model: nn.Module, inputs: Any) -> PermutationGraph:
    """Refine what can be refined, and pin the groups that change the outputs."""
    trial = Trial(model, inputs, graph.lengths)
    split = refinements(graph.groups)
    if not trial.holds([*graph.groups, *(cell for cells in split.values() for cell in cells)]):
        fine = [trial.holds([one]) for one in graph.groups]
        why = "the outputs change with the order of its units"
        lost = [one for one, holds in zip(graph.groups, fine, strict=True) if not holds]
        pins = tuple(Pinned(place.tensor, place.axis, why) for one in lost for place in one.places)
        kept = tuple(one for one, holds in zip(graph.groups, fine, strict=True) if holds)
        graph = replace(graph, groups=kept, pinned=graph.pinned + pins)
        split = {number: cells for number, cells in refinements(kept).items() if trial.holds(cells)}
    whole = [one for number, one in enumerate(graph.groups) if number not in split]
    return replace(graph, groups=(*whole, *(cell for cells in split.values() for cell in cells)))
