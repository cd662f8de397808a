"""The straight line between two networks: losses along it, barriers, linear mode connectivity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import BadModel, UsageError
from nervure.core.renorm import reestimate_

Statistics = Literal["kept", "interpolated", "recomputed"]
"""Running statistics between networks: those of the first, mixed like the weights, or estimated anew at each point."""


@torch.no_grad()
def interpolated(
    first: nn.Module,
    second: nn.Module,
    share: float,
    *,
    parameters: Iterable[str] | None = None,
    buffers: bool = True,
) -> nn.Module:
    """Return a network between two of one shape: (1 - share) times the first plus share times the second.

    Parameters and real buffers are mixed; other buffers are those of the first.

    Args:
        first: A network, left as it is.
        second: Another of the same shape.
        share: From 0 to 1 between them; beyond, on the same line.
        parameters: Names of parameters, or prefixes that end at a dot, of a layer or block to mix, with its buffers;
            the rest is that of the first. None mixes everything.
        buffers: Whether real buffers are mixed too.

    Returns:
        The network.

    Raises:
        BadModel: If the networks do not have the same tensors.
        UsageError: If a name matches nothing.

    Examples:
        >>> ends = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for end, value in zip(ends, (1.0, 3.0)):
        ...     _ = nn.init.constant_(end.weight, value)
        >>> interpolated(*ends, 0.25).weight.item()
        1.5
    """
    made = copy.deepcopy(first)
    mine, theirs = _tensors(made), _tensors(second)
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        odd = sorted(mine.keys() ^ theirs.keys()) or [n for n in mine if mine[n].shape != theirs[n].shape]
        raise BadModel("there is no line between networks of two shapes", found=", ".join(odd[:3]))
    held = dict(made.named_parameters())
    for name in _named(mine, made, parameters):
        if mine[name].is_floating_point() and (buffers or name in held):
            mine[name].lerp_(theirs[name].to(mine[name]), share)
    return made


def _named(tensors: dict[str, Tensor], model: nn.Module, names: Iterable[str] | None) -> list[str]:
    """Return the tensors that names or prefixes mean; a tied one under any of its names.

    Raises:
        UsageError: If a name matches nothing.
    """
    if names is None:
        return list(tensors)
    every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    wanted: set[int] = set()
    for name in names:
        hits = {id(value) for key, value in every.items() if key == name or key.startswith(f"{name}.")}
        if not hits:
            raise UsageError("no parameter has this name", expected=f"one of {', '.join(every)}", found=name)
        wanted |= hits
    return [key for key, value in tensors.items() if id(value) in wanted]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def segment(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[[nn.Module], Tensor | float],
    *,
    points: int = 21,
    batches: Sequence[Any] | Iterable[Any] = (),
) -> Tensor:
    """Return the loss at evenly spaced points of the line from one network to another.

    Args:
        first: A network, left as it is.
        second: Another of the same shape.
        loss: From a network to its loss.
        points: Number of points, ends included, at least 2.
        batches: Inputs on which batch norms are estimated anew between the ends, where mixed statistics fit nothing.

    Returns:
        Shape (points,), float64.
    """
    inputs, losses = list(batches), []
    for place, share in enumerate(torch.linspace(0, 1, points, dtype=torch.float64).tolist()):
        model = first if place == 0 else second if place == points - 1 else interpolated(first, second, share)
        if inputs and 0 < place < points - 1:
            reestimate_(model, inputs)
        with torch.no_grad():
            losses.append(float(loss(model)))
    return torch.tensor(losses, dtype=torch.float64)


@dataclass(frozen=True)
class Line:
    """Hold losses along a straight line between networks.

    Args:
        shares: Where on the line: 0 is the first network, 1 the second.
        losses: Shape (points,), float64.
        statistics: What the running statistics of batch norms were between the networks.
    """

    shares: Tensor
    losses: Tensor
    statistics: Statistics

    @property
    def gaps(self) -> Tensor:
        """The losses less the chord between those of the two networks."""
        ends = [self.losses[int((self.shares - end).abs().argmin())] for end in (0.0, 1.0)]
        return self.losses - ends[0] - (ends[1] - ends[0]) * self.shares

    @property
    def barrier(self) -> float:
        """The highest gap between the two networks, at least 0."""
        inside = (self.shares >= 0) & (self.shares <= 1)
        return max(0.0, float(self.gaps[inside].max()))

    @property
    def bumpiness(self) -> float:
        """The sum of all rises relative to the drop from the first network to the second; see `bumpiness`."""
        inside = (self.shares >= 0) & (self.shares <= 1)
        return bumpiness(self.losses[inside])


def line(
    first: nn.Module,
    second: nn.Module,
    loss: Callable[[nn.Module], Tensor | float],
    *,
    shares: Sequence[float] | int = 21,
    parameters: Iterable[str] | None = None,
    statistics: Statistics = "interpolated",
    batches: Sequence[Any] | Iterable[Any] = (),
) -> Line:
    """Measure the loss on the line through two networks, or where one layer or block alone moves.

    At 0, and at 1 where everything moves, the networks themselves are measured.

    Args:
        first: A network, left as it is.
        second: Another of the same shape.
        loss: From a network to its loss; it puts the network into the mode it wants.
        shares: Places on the line with 0 and 1 among them, or a number of evenly spaced ones from 0 to 1.
        parameters: Names or prefixes of what moves, the rest stays at the first network; None moves everything.
        statistics: What becomes of the running statistics of batch norms on the way. Where they are recomputed that is
            so at the second end of a layer's line too, which is no network that was trained.
        batches: Inputs for ``"recomputed"``.

    Returns:
        The line.

    Raises:
        UsageError: If 0 or 1 is not among the places, or there are no batches to recompute statistics on.

    Examples:
        >>> ends = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for end, value in zip(ends, (-1.0, 1.0)):
        ...     _ = nn.init.constant_(end.weight, value)
        >>> line(*ends, lambda net: 1 - net.weight.detach().square(), shares=3).barrier
        1.0
    """
    places = torch.linspace(0, 1, shares).tolist() if isinstance(shares, int) else [float(one) for one in shares]
    if not {0.0, 1.0} <= set(places):
        raise UsageError("the line does not pass through both networks", expected="0 and 1 among the shares",
                         found=places[:5])  # fmt: skip
    inputs = list(batches) if statistics == "recomputed" else []
    if statistics == "recomputed" and not inputs:
        raise UsageError("there is nothing to recompute statistics on", try_="batches=[inputs]")
    named = None if parameters is None else list(parameters)
    losses = []
    for share in places:
        if share == 0 or (share == 1 and named is None):
            model = second if share else first
        else:
            mixed = statistics == "interpolated"
            model = interpolated(first, second, share, parameters=named, buffers=mixed)
            if inputs:
                reestimate_(model, inputs)
        with torch.no_grad():
            losses.append(float(loss(model)))
    return Line(torch.tensor(places, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64), statistics)


def bumpiness(curve: Tensor) -> float:
    """Return the sum of all rises of a curve of losses over its drop from the first point to the last.

    Args:
        curve: Losses in order.

    Returns:
        0 where it never rises; infinite where it rises and does not drop in all.
    """
    rises = float(curve.diff().clamp_min(0).sum())
    drop = float(curve[0] - curve[-1])
    return rises / drop if drop > 0 else 0.0 if rises == 0 else float("inf")


def barrier(curve: Tensor) -> float:
    """Return how far a curve of losses rises above the chord of its ends, at least 0.

    Args:
        curve: As `segment` returns it.

    Returns:
        The height.
    """
    chord = torch.lerp(curve[0], curve[-1], torch.linspace(0, 1, len(curve), dtype=curve.dtype))
    return max(0.0, float((curve - chord).max()))


def mode_connectivity(curve: Tensor) -> float:
    """Return the mean loss of the ends less the worst loss between them.

    Args:
        curve: As `segment` returns it.

    Returns:
        Far below 0: the ends are not connected. At 0: nothing between them is worse than they are.
    """
    return float((curve[0] + curve[-1]) / 2 - curve.max())
