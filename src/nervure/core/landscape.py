"""Planes in the space of a network's parameters, and the loss on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import BadModel, UsageError
from nervure.core import rng
from nervure.core.connectivity import Statistics
from nervure.core.renorm import reestimate_
from nervure.core.vectors import flatten, select, unflatten

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Frame:
    """Hold a plane in parameter space: origin + x u + y v.

    Args:
        origin: The network at (0, 0).
        u: First direction, one entry a parameter of the origin, in its order.
        v: Second direction.
        explained: Share of the variance of the networks it was made from that lies in the plane, or None.
    """

    origin: nn.Module
    u: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    explained: float | None = None

    def coordinates(self, model: nn.Module) -> tuple[float, float, float]:
        """Return where the foot of a network on the plane lies, and how far the network is from it.

        Args:
            model: A network of the origin's shape.

        Returns:
            x, y and the distance.
        """
        apart = _vector(model, self.origin) - _vector(self.origin)
        axes = torch.stack([self.u, self.v], 1).double()
        place = torch.linalg.lstsq(axes, apart[:, None]).solution.squeeze(1)
        return float(place[0]), float(place[1]), float((apart - axes @ place).norm())


@dataclass(frozen=True)
class Plane:
    """Hold losses on a grid of a plane.

    Args:
        xs: Coordinates along the first direction.
        ys: Along the second.
        losses: Shape (len(ys), len(xs)), float64.
        networks: (x, y, distance from the plane) of each given network.
        units: Lengths of the two directions in parameter space: what one step of a coordinate is.
        statistics: What the running statistics of batch norms were off the origin.
        explained: As in `Frame`.
    """

    xs: Tensor
    ys: Tensor
    losses: Tensor
    networks: tuple[tuple[float, float, float], ...]
    units: tuple[float, float]
    statistics: Statistics
    explained: float | None


def random_plane(model: nn.Module, *, seed: int = 0) -> Frame:
    """Return the plane of two random filter-normalised directions.

    Each filter of a direction has the length of the network's own filter, so that a coordinate of 1 is a change as
    large as the weights, whatever their scale. Vectors and scalars, biases and scales of norms, do not move (Li et
    al., 2018).

    Args:
        model: The origin, left as it is.
        seed: Draws the directions.

    Returns:
        The plane.
    """
    draw = rng.generator("random plane", seed)
    held = _parameters(model)

    def direction() -> Tensor:
        parts = []
        for value in held.values():
            weight = value.detach().double().cpu()
            drawn = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            if weight.ndim < 2:
                parts.append(torch.zeros_like(weight))
                continue
            over = tuple(range(1, weight.ndim))
            lengths = torch.linalg.vector_norm(drawn, dim=over, keepdim=True).clamp_min(1e-300)
            parts.append(drawn * torch.linalg.vector_norm(weight, dim=over, keepdim=True) / lengths)
        return flatten(parts)

    return Frame(model, direction(), direction())


def plane_through(first: nn.Module, second: nn.Module, third: nn.Module) -> Frame:
    """Return the plane through three networks, with orthonormal directions.

    Args:
        first: The origin.
        second: The network on the first axis.
        third: The network that makes up the plane, above the first axis.

    Returns:
        The plane; one step of a coordinate is a distance of 1 in parameter space.

    Raises:
        UsageError: If the three lie on a line.
    """
    start = _vector(first)
    u, v = (_vector(one, first) - start for one in (second, third))
    length = float(u.norm())
    u = u / length if length > 0 else u
    beside = v - (v @ u) * u
    if length == 0 or float(beside.norm()) <= 1e-9 * float(v.norm()) or float(v.norm()) == 0:
        raise UsageError("three networks on one line span no plane", try_="random_plane(model)")
    return Frame(first, u, beside / beside.norm())


def principal_plane(trajectory: Sequence[nn.Module]) -> Frame:
    """Return the plane of the two main directions of a training run, around its last network.

    Args:
        trajectory: Networks along the run, the final one last; at least three.

    Returns:
        The plane, with orthonormal directions and the share of the variance around the last network it holds. A
        random walk has a large share too: it is no proof that a run is flat.

    Raises:
        UsageError: If there are fewer than three networks, or they do not span a plane.
    """
    if len(trajectory) < 3:
        raise UsageError("a trajectory has at least three networks", found=len(trajectory))
    last = trajectory[-1]
    end = _vector(last)
    apart = torch.stack([_vector(one, last) - end for one in trajectory[:-1]])
    _, sizes, directions = torch.linalg.svd(apart, full_matrices=False)
    if len(sizes) < 2 or sizes[1] <= 1e-9 * sizes[0]:
        raise UsageError("the trajectory does not leave a line", try_="random_plane(model)")
    return Frame(last, directions[0], directions[1], float(sizes[:2].square().sum() / sizes.square().sum()))


@torch.no_grad()
def plane(
    frame: Frame,
    loss: Callable[[nn.Module], Tensor | float],
    *,
    extent: float | tuple[float, float, float, float] = 1.0,
    points: int = 11,
    networks: Sequence[nn.Module] = (),
    statistics: Literal["kept", "recomputed"] = "kept",
    batches: Iterable[Any] = (),
    progress: Progress = lambda done, total: None,
) -> Plane:
    """Measure the loss on a grid of a plane.

    A larger extent reaches further from the origin: coordinates are never rescaled.

    Args:
        frame: The plane; see `random_plane`, `plane_through` and `principal_plane`.
        loss: From a network to its loss; it puts the network into the mode it wants.
        extent: Largest coordinate in all four ways, or (left, right, bottom, top).
        points: Points along each axis, at least 2.
        networks: Networks to place on the plane; the grid is enlarged to hold them.
        statistics: Whether batch norms keep the origin's running statistics off the origin, or estimate them anew.
        batches: Inputs for ``"recomputed"``.
        progress: Called with (points done, points in all).

    Returns:
        The losses.

    Raises:
        UsageError: If there are fewer than two points a side, or no batches to recompute statistics on.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> found = plane(random_plane(net), lambda net: net.weight.square().sum(), points=5)
        >>> tuple(found.losses.shape), bool(found.losses[2, 2] == net.weight.detach().square().sum())
        ((5, 5), True)
    """
    inputs = list(batches)
    if points < 2 or (statistics == "recomputed" and not inputs):
        found = points if points < 2 else "no batches"
        raise UsageError(
            "the plane cannot be measured", expected="2 points a side, batches to recompute on", found=found
        )
    places = tuple(frame.coordinates(one) for one in networks)
    left, right, low, high = (-extent, extent, -extent, extent) if isinstance(extent, int | float) else extent
    xs, ys = (
        torch.linspace(min([start, *others]), max([stop, *others]), points, dtype=torch.float64)
        for start, stop, others in ((left, right, [x for x, _, _ in places]), (low, high, [y for _, y, _ in places]))
    )
    model = copy.deepcopy(frame.origin)
    held = _parameters(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    start = {name: value.clone() for name, value in held.items()}
    steps = [unflatten(axis.double(), held) for axis in (frame.u, frame.v)]
    losses = torch.empty(points, points, dtype=torch.float64)
    for number in range(points * points):
        row, column = divmod(number, points)
        x, y = float(xs[column]), float(ys[row])
        for name, value in held.items():
            step = (x * steps[0][name] + y * steps[1][name]).to(value.device)
            value.copy_(start[name].double() + step if x or y else start[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if statistics == "recomputed" and (x or y):
            reestimate_(model, inputs)
        losses[row, column] = float(loss(model))
        progress(number + 1, points * points)
    lengths = (float(frame.u.norm()), float(frame.v.norm()))
    return Plane(xs, ys, losses, places, lengths, statistics, frame.explained)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    names = [name for name, value in model.named_parameters() if value.is_floating_point()]
    return select(model, names)


def _vector(model: nn.Module, like: nn.Module | None = None) -> Tensor:
    held = _parameters(model)
    if like is not None:
        expected = {name: value.shape for name, value in _parameters(like).items()}
        if {name: value.shape for name, value in held.items()} != expected:
            raise BadModel("there is no plane through networks of two shapes")
    return flatten([value.detach().double().cpu() for value in held.values()])
