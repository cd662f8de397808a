"""Zero-invariant groups: what makes a channel, such that the channel is gone when all of it is zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nervure._kit import Unsupported
from nervure.core import forward, rng
from nervure.core.channels import ChannelGraph, Group

_CLOSE = 1e-4


@dataclass(frozen=True)
class Part:
    """Hold where channels lie in one axis of one parameter.

    Args:
        parameter: The parameter.
        axis: The axis.
        channel: For each index of the axis its channel among all groups; the number of channels for none.
    """

    parameter: nn.Parameter
    axis: int
    channel: Tensor


@dataclass(frozen=True)
class ZeroGroups:
    """Hold all channels of a model that vanish with the trained parameters that make them.

    Channels of all groups are numbered through.

    Args:
        parts: Where they lie.
        group: Channel -> its group in the channel graph.
        place: Channel -> its number in that group.
    """

    parts: tuple[Part, ...]
    group: Tensor
    place: Tensor

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph) -> ZeroGroups:
        """Collect the groups whose trained producers, set to zero, do what cutting does.

        That is tried on a copy with running statistics drawn by chance, because training moves these, and frozen
        parameters as they are.

        Args:
            model: The model the graph was made of.
            graph: Its channel graph.

        Returns:
            The groups.

        Raises:
            Unsupported: If there is none.
        """
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        useful = [group for group in graph.groups if group.zero_invariant and group.size > 1]
        if not _vanish(model, graph, useful):
            useful = [group for group in useful if _vanish(model, graph, [group])]
        if not useful:
            why = graph.pinned[0].why if graph.pinned and not graph.groups else "none vanishes with what makes it"
            raise Unsupported("ZeroGroups", model, why=f"no channel can be cut by zeroing it ({why})")
        sizes = [group.size for group in useful]
        parts, total, start = [], sum(sizes), 0
        for group in useful:
            for part in group.producers:
                if part.parameter in named:
                    numbers = torch.where(part.channel >= 0, part.channel + start, total)
                    parameter = named[part.parameter]
                    parts.append(Part(parameter, part.axis, numbers.to(parameter.device)))
            start += group.size
        owner = torch.repeat_interleave(torch.tensor([group.id for group in useful]), torch.tensor(sizes))
        return cls(tuple(parts), owner, torch.cat([torch.arange(size) for size in sizes]))

    def __len__(self) -> int:
        """Return the number of channels."""
        return len(self.group)

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters concerned, each once."""
        return tuple({id(part.parameter): part.parameter for part in self.parts}.values())

    @cached_property
    def entries(self) -> Tensor:
        """Channel -> number of its entries."""
        ones = [torch.ones_like(one) for one in self.parameters]
        return self.dots(ones, ones)

    def dots(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Return the inner product of every channel's entries.

        Args:
            left: One tensor for each of `parameters`.
            right: The same.

        Returns:
            Shape (channels,), double precision, on the CPU.
        """
        products = {id(p): a.detach() * b for p, a, b in zip(self.parameters, left, right, strict=True)}
        total = torch.zeros(len(self) + 1, dtype=torch.float64)
        for part in self.parts:
            axes = [axis for axis in range(part.parameter.ndim) if axis != part.axis]
            product = products[id(part.parameter)]
            sums = product.sum(axes) if axes else product
            total.index_add_(0, part.channel.cpu(), sums.cpu().double())
        return total[:-1]

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor], factor: Tensor) -> None:
        """Add a multiple of tensors to the parameters, a factor for each channel.

        Args:
            tensors: One tensor for each of `parameters`.
            factor: Shape (channels,).
        """
        held = {id(p): tensor for p, tensor in zip(self.parameters, tensors, strict=True)}
        padded = torch.cat([factor, factor.new_zeros(1)])
        for part in self.parts:
            shape = [-1 if axis == part.axis else 1 for axis in range(part.parameter.ndim)]
            factors = padded.to(part.parameter)[part.channel].view(shape)
            part.parameter.addcmul_(held[id(part.parameter)], factors)

    @torch.no_grad()
    def zero_(self, flags: Tensor) -> None:
        """Set channels to exactly zero.

        Args:
            flags: Shape (channels,), which.
        """
        padded = torch.cat([flags, flags.new_zeros(1)])
        for part in self.parts:
            gone = padded.to(part.channel.device)[part.channel].nonzero().squeeze(1)
            if len(gone):
                part.parameter.index_fill_(part.axis, gone, 0)

    def relative_sizes(self) -> Tensor:
        """Return the root mean square of each channel's entries, relative to the mean over its group.

        Returns:
            Shape (channels,).
        """
        weights = [one.detach() for one in self.parameters]
        size = (self.dots(weights, weights) / self.entries).sqrt()
        layer = torch.unique(self.group, return_inverse=True)[1]
        total = torch.zeros(int(layer.max()) + 1, dtype=size.dtype).index_add_(0, layer, size)
        return size / (total / torch.bincount(layer)).clamp_min(1e-300)[layer]

    def lowest(self, worth: Tensor, count: int) -> Tensor:
        """Choose the channels worth least, but never the last one of a group.

        Args:
            worth: Shape (channels,).
            count: How many.

        Returns:
            Flags.
        """
        guarded = worth.clone()
        for number in self.group.unique():
            mine = (self.group == number).nonzero().squeeze(1)
            guarded[mine[worth[mine].argmax()]] = torch.inf
        chosen = guarded.argsort(stable=True)[:count]
        return torch.zeros(len(self), dtype=torch.bool).index_fill_(0, chosen, True)

    def each(self, values: Tensor) -> dict[int, Tensor]:
        """Cut a vector over all channels into the groups.

        Args:
            values: Shape (channels,).

        Returns:
            Group -> the values of its channels.
        """
        return {int(number): values[self.group == number] for number in self.group.unique()}

    def keep(self, gone: Tensor) -> dict[int, Tensor]:
        """Say which channels stay, as `ChannelGraph.cut` takes it.

        Args:
            gone: Shape (channels,), flags.

        Returns:
            Group -> flags of the channels that stay.
        """
        return self.each(~gone)


def _vanish(model: nn.Module, graph: ChannelGraph, groups: Sequence[Group]) -> bool:
    """Try whether zeroing every second channel's trained producers does what cutting them does."""
    if not groups:
        return False
    twin = copy.deepcopy(model)
    _shake(twin)
    keep = {group.id: torch.arange(group.size) % 2 == 0 for group in groups}
    cut = forward.predict(graph.cut(twin, keep), graph.inputs)
    _zero(twin, groups, keep)
    error = (forward.predict(twin, graph.inputs) - cut).abs().max()
    return bool(error <= _CLOSE * cut.abs().max().clamp_min(1e-12))


@torch.no_grad()
def _zero(model: nn.Module, groups: Sequence[Group], keep: Mapping[int, Tensor]) -> None:
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for group in groups:
        for part in group.producers:
            if part.parameter in named:
                stays = torch.cat([keep[group.id], torch.ones(1, dtype=torch.bool)])[part.channel]
                named[part.parameter].index_fill_(
                    part.axis, (~stays).nonzero().squeeze(1).to(named[part.parameter].device), 0
                )


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Draw running statistics by chance."""
    draw = rng.generator("running statistics")
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.copy_(torch.randn(mean.shape, generator=draw))
            variance.copy_(0.5 + torch.rand(variance.shape, generator=draw))
