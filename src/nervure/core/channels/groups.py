"""The table of every prunable axis, and the groups of channels read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nervure._kit import UsageError
from nervure.core.channels.labels import Array, Event, Labels, kept
from nervure.core.channels.trace import Trace

Keep = Mapping[int, Tensor | Sequence[int] | Sequence[bool]]
_FIXED = "it is tied to an input, a constant or a single channel"


@dataclass(frozen=True)
class Slice:
    """Hold where the channels of a group lie in one axis of one parameter or buffer.

    Args:
        parameter: Qualified name.
        axis: The axis.
        channel: For each index of the axis, the group's channel it belongs to; -1 for none.
        produces: Whether the channel's values are made here, rather than read.
    """

    parameter: str
    axis: int
    channel: Tensor
    produces: bool

    def index(self, channel: int) -> Tensor:
        """Return the indices of one channel.

        Args:
            channel: Its number.

        Returns:
            int64 indices along the axis.
        """
        return (self.channel == channel).nonzero().squeeze(1)


@dataclass(frozen=True)
class Group:
    """Hold channels of one kind: each can be cut alone, and cuts all its slices.

    Args:
        id: The group's number, the same after every cut.
        name: The first parameter that produces it.
        size: Number of channels.
        slices: Where they lie.
        exact: Whether a network with zeroed slices computes what the cut network computes.
        why: If not exact, the reason.
        zero_invariant: Whether zeroing the producing slices alone does the same as zeroing all.
    """

    id: int
    name: str
    size: int
    slices: tuple[Slice, ...]
    exact: bool
    why: str
    zero_invariant: bool

    @property
    def producers(self) -> tuple[Slice, ...]:
        """The slices that make the channels' values: rows of weights, biases, scales of norms.

        All slices where none does, as between two factors of one matrix.
        """
        return tuple(one for one in self.slices if one.produces) or self.slices


@dataclass(frozen=True)
class Pinned:
    """Hold an axis that is never cut.

    Args:
        parameter: Qualified name.
        axis: The axis.
        why: The reason.
    """

    parameter: str
    axis: int
    why: str


@dataclass(frozen=True)
class Segment:
    """Hold what a stretch of the table stands for.

    Args:
        owner: Name of a parameter, buffer or module.
        axis: The axis of a tensor, or the place in an attribute's tuple.
        attribute: The attribute that counts the stretch; empty for a tensor.
        produces: As in `Slice`.
    """

    owner: str
    axis: int
    attribute: str = ""
    produces: bool = False


@dataclass(frozen=True)
class Table:
    """Hold, for every index of every axis, the atoms any of which cuts it.

    Args:
        segments: What the stretches stand for, tensors first.
        bounds: Where the stretches begin; one more at the end.
        atoms: Shape (layers, indices); 0 is no atom.
        group: Atom -> group, -1 for none.
        channel: Atom -> number within its group.
        order: The atoms by group and channel.
        uneven: Atom -> why cutting differs from zeroing, empty where it does not.
        live: Atom -> whether zeroed producers leave values that are read.
        aliases: First name of a tensor -> all its names.
    """

    segments: tuple[Segment, ...]
    bounds: Array
    atoms: Array
    group: Array
    channel: Array
    order: Array
    uneven: tuple[str, ...]
    live: NDArray[np.bool_]
    aliases: Mapping[str, tuple[str, ...]]

    @cached_property
    def sizes(self) -> Array:
        """Group -> number of channels."""
        return np.bincount(self.group[self.group >= 0])

    @cached_property
    def attributes(self) -> dict[tuple[str, str], list[int]]:
        """(module, attribute) -> its stretches, one for each number of a tuple."""
        found: dict[tuple[str, str], dict[int, int]] = {}
        for place, one in enumerate(self.segments):
            if one.attribute:
                found.setdefault((one.owner, one.attribute), {})[one.axis] = place
        return {key: [places[axis] for axis in sorted(places)] for key, places in found.items()}

    def places(self, removed: NDArray[np.bool_]) -> list[int]:
        """Return the stretches that lose something.

        Args:
            removed: One flag an index.

        Returns:
            Numbers of segments.
        """
        found: list[int] = _distinct(np.searchsorted(self.bounds, np.flatnonzero(removed), side="right") - 1).tolist()
        return found

    def removed(self, keep: Keep) -> NDArray[np.bool_]:
        """Return which indices of the table go.

        Args:
            keep: Group -> the channels that stay, as a boolean vector or as numbers.

        Returns:
            One flag an index.

        Raises:
            UsageError: If a group does not exist or nothing of it would stay.
        """
        return np.logical_or.reduce(self.gone(keep)[self.atoms], axis=0)

    def gone(self, keep: Keep) -> NDArray[np.bool_]:
        """Return which atoms go.

        Args:
            keep: As in `removed`.

        Returns:
            One flag an atom.

        Raises:
            UsageError: As in `removed`.
        """
        gone = np.zeros(len(self.group), bool)
        for number, chosen in keep.items():
            if not 0 <= number < len(self.sizes):
                raise UsageError("there is no such group", expected=f"0 to {len(self.sizes) - 1}", found=number)
            stays = _flags(chosen, int(self.sizes[number]))
            mine = np.flatnonzero(self.group == number)
            gone[mine] = ~stays[self.channel[mine]]
        return gone

    def without(self, keep: Keep) -> Table:
        """Return the table of the cut network.

        Args:
            keep: As in `removed`.

        Returns:
            A table with the same groups, their channels numbered anew.

        Raises:
            UsageError: As in `removed`.
        """
        gone = self.gone(keep)
        stays = ~np.logical_or.reduce(gone[self.atoms], axis=0)
        lengths = np.add.reduceat(np.append(stays, False).astype(np.int64), self.bounds[:-1])
        lengths[self.bounds[:-1] == self.bounds[1:]] = 0
        group = np.where(gone, -1, self.group)
        left = self.order[group[self.order] >= 0]
        sizes = np.bincount(group[left], minlength=len(self.sizes))
        channel = kept(len(group))
        channel[left] = np.arange(len(left)) - np.repeat(sizes.cumsum() - sizes, sizes)
        return replace(
            self,
            bounds=np.concatenate([kept(1), lengths.cumsum()]),
            atoms=self.atoms[:, stays],
            group=group,
            channel=channel,
        )

    def groups(self) -> tuple[Group, ...]:
        """Read the groups.

        Returns:
            The groups in the order of the parameters.
        """
        slices: dict[int, list[Slice]] = {number: [] for number in range(len(self.sizes))}
        group, channel = self.group[self.atoms], self.channel[self.atoms]
        for place, segment in enumerate(self.segments):
            if segment.attribute:
                break
            stretch = slice(self.bounds[place], self.bounds[place + 1])
            for numbers, members in zip(group[:, stretch], channel[:, stretch], strict=True):
                for number in numbers[:1] if (numbers == numbers[:1]).all() else _distinct(numbers):
                    if number < 0:
                        continue
                    where = torch.from_numpy(np.where(numbers == number, members, -1))
                    slices[int(number)].append(Slice(segment.owner, segment.axis, where, segment.produces))
        return tuple(self._group(number, parts) for number, parts in slices.items())

    def _group(self, number: int, slices: list[Slice]) -> Group:
        atoms = np.flatnonzero(self.group == number)
        why = next((self.uneven[atom] for atom in atoms if self.uneven[atom]), "")
        name = next((one.parameter for one in slices if one.produces), slices[0].parameter)
        invariant = not why and not self.live[atoms].any()
        return Group(number, name, len(atoms), tuple(slices), not why, why, bool(invariant))


def _flags(chosen: Tensor | Sequence[int] | Sequence[bool], size: int) -> NDArray[np.bool_]:
    given = np.asarray(chosen.cpu() if isinstance(chosen, Tensor) else list(chosen))
    flags = np.zeros(size, bool)
    if given.dtype == bool and len(given) == size:
        flags[:] = given
    elif given.dtype != bool and given.size and given.min() >= 0 and given.max() < size:
        flags[given] = True
    elif given.size:
        raise UsageError("the channels to keep do not fit the group", expected=f"{size} flags or numbers below {size}")
    if not flags.any():
        raise UsageError("a group must keep a channel", found=f"none of {size}")
    return flags


def tabulate(trace: Trace, aliases: Mapping[str, tuple[str, ...]]) -> tuple[Table, Reasons]:
    """Solve a trace and read its groups.

    Args:
        trace: From `run`.
        aliases: First name of a tensor -> all its names.

    Returns:
        The table, and why the rest of the axes is not in a group.
    """
    solution = trace.labels.solve()
    consumed = np.zeros(trace.labels.count, bool)
    consumed[np.concatenate([kept(1), *trace.consumed])] = True
    space = np.zeros(trace.labels.count, bool)
    space[np.concatenate([kept(1), *trace.space])] = True
    axes = [(key, labels) for key, labels in trace.axes.items() if not space[labels].all()]
    segments = [Segment(name, axis, produces=not consumed[labels].any()) for (name, axis), labels in axes]
    arrays = [labels for _, labels in axes]
    for follow in trace.follows:
        for place, labels in enumerate(follow.labels):
            segments.append(Segment(follow.module, place, follow.attribute))
            arrays.append(labels)
    bounds = np.concatenate([kept(1), np.cumsum([len(one) for one in arrays], dtype=np.int64)])
    layers = solution.atoms(np.concatenate([kept(0), *arrays]))
    numbers = _distinct(np.append(layers.ravel(), 0))
    atoms = np.searchsorted(numbers, layers)
    group, channel = _classify(atoms, bounds, segments, len(numbers))

    def marked(events: list[Event]) -> list[tuple[Array, str]]:
        return [(_known(numbers, solution.atoms(event.labels).ravel()), event.why) for event in events]

    uneven = [""] * len(numbers)
    for which, why in reversed(marked(trace.uneven)):
        for atom in which:
            uneven[atom] = why
    live = np.zeros(len(numbers), bool)
    for which, _ in marked(trace.live):
        live[which] = True
    free = np.logical_and.reduce(group[atoms] < 0, axis=0)
    whole = [
        (name, axis, labels[free[start : start + len(labels)]])
        for start, ((name, axis), labels) in zip(bounds, axes, strict=False)
    ]
    reasons = Reasons(trace.labels, tuple(one for one in whole if len(one[2])))
    return Table(
        tuple(segments), bounds, atoms, group, channel, np.lexsort((channel, group)), tuple(uneven), live, aliases
    ), reasons


def _known(numbers: Array, atoms: Array) -> Array:
    places = np.searchsorted(numbers, atoms).clip(max=len(numbers) - 1)
    return places[(numbers[places] == atoms) & (atoms > 0)]


def _distinct(values: Array) -> Array:
    """Return the values once each, sorted; several times faster than `numpy.unique` on some versions."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def _classify(atoms: Array, bounds: Array, segments: list[Segment], count: int) -> tuple[Array, Array]:
    """Put atoms into one group that lie in the same axes, in the same layer of each."""
    tensors = next((place for place, one in enumerate(segments) if one.attribute), len(segments))
    end = bounds[tensors]
    where = np.repeat(np.arange(tensors), np.diff(bounds[: tensors + 1]))
    signature = np.zeros(count, np.uint64)
    first = np.full(count, end)
    draw = np.random.default_rng(0)
    for layer in atoms[:, :end]:
        marks = draw.integers(1 << 63, size=max(1, tensors), dtype=np.uint64)
        pairs = _distinct(layer * tensors + where) if tensors else kept(0)
        np.add.at(signature, pairs // max(1, tensors), marks[pairs % max(1, tensors)])
        np.minimum.at(first, layer, np.arange(end))
    real = np.flatnonzero((first < end) & (np.arange(count) > 0))
    real = real[np.argsort(first[real], kind="stable")]
    _, opening, kind, size = np.unique(signature[real], return_index=True, return_inverse=True, return_counts=True)
    rank = np.full(len(opening), -1)
    worth = np.flatnonzero(size > 1)
    rank[worth[np.argsort(opening[worth])]] = np.arange(len(worth))
    group, channel = np.full(count, -1), kept(count)
    group[real] = rank[kind]
    order = np.argsort(kind, kind="stable")
    starts = np.searchsorted(kind[order], kind[order])
    channel[real[order]] = np.arange(len(order)) - starts
    return group, channel


@dataclass(frozen=True)
class Reasons:
    """Hold what is needed to say why axes are kept whole; that is worked out when asked.

    Args:
        labels: The facts.
        whole: (parameter, axis, labels of the indices in no group).
    """

    labels: Labels
    whole: tuple[tuple[str, int, Array], ...]

    def pinned(self) -> tuple[Pinned, ...]:
        """Return the axes kept whole with the reason nearest to each."""
        closely, loosely = (self.labels.related(composed=composed) for composed in (False, True))
        near: dict[int, str] = {}
        far: dict[int, str] = {}
        for event in self.labels.pins:
            for component, reasons in ((closely, near), (loosely, far)):
                for number in np.unique(component[event.labels[event.labels > 0]]).tolist():
                    reasons.setdefault(number, event.why)
        found = []
        for name, axis, labels in self.whole:
            told = [near.get(number) for number in np.unique(closely[labels]).tolist()]
            told += [far.get(number) for number in np.unique(loosely[labels]).tolist()]
            found.append(Pinned(name, axis, next(filter(None, told), _FIXED)))
        return tuple(found)
