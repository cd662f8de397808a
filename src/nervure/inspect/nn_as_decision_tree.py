"""A piecewise-linear network as a decision tree: its exact affine map around an input, and all of them in a box."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nervure._kit import Unsupported, UsageError
from nervure.core.cost import macs
from nervure.core.forward import take, tree_map
from nervure.inspect._affine_pieces import Pieces, deviation, run, twin
from nervure.inspect._network_tree import NetworkTree, grow
from nervure.inspect._tree_trial import (
    NETS,
    SIDE,
    convolutional,
    drawn,
    grid,
    learned,
    network,
    patterns,
    regions,
)  # fmt: skip
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="nn-as-decision-tree",
    n=160,
    title="Neural Networks are Decision Trees",
    year=2022,
    link="https://arxiv.org/abs/2210.05189",
    family="inspect",
    summary=(
        "A network of piecewise-linear units is a decision tree: each unit is an oblique split whose rule depends on "
        "the path, each leaf an affine map. Only splits with an interior on both sides are kept, so that a small "
        "network has few leaves; of a large one the single path of an input is exact too."
    ),
    tags=("decision tree", "piecewise linear", "linear regions", "ReLU", "interpretability", "verification"),
    provides=("affine_piece", "AffinePiece", "decision_tree"),
    protocol="diagnostic",
    claims=("the_tree_is_the_network",),
    needs=("data",),
    deviations=(
        "The whole tree is that of a box of inputs, or of a slice through them.",
        "Cells are cut corner by corner, which needs no linear programme; a side that reaches less than 1e-9 of the "
        "box beyond a split is dropped.",
        "A maximum of several has a path but no whole tree.",
        "Smooth activations are refused; the paper reads them as infinitely many branches.",
        "How the paper counts operations is not known here: a path costs a multiply-add for each input and split and "
        "for each entry of its leaf, and a comparison for each split; the network its multiply-adds and a comparison "
        "for each unit.",
        "A point inside each leaf joins the sampled points: in a rehearsal a grid of four million missed a sliver.",
    ),
    verified=(
        "Leaves against a linear programme for each of the 2^n patterns; Zaslavsky's count of one layer's regions.",
        "The tree of the paper's network for x^2: its four rules and five affine maps to 1e-6.",
        "Affine maps against autograd and differences, on every model of the zoo that is not refused.",
    ),
)

_METHOD = "affine_piece"


@dataclass(frozen=True)
class AffinePiece:
    """Hold the affine map a network is around one input, and the polytope on which it is.

    The network's outputs are value + weight (t - centre) wherever rules (t - centre) <= limits; t are the input's
    entries one after another, or coordinates along given directions.

    Args:
        centre: t of the input, shape (D,).
        value: The outputs there, shape (O,).
        weight: The exact linear explanation, shape (O, D).
        rules: One row of length 1 for each side of a unit's piece, shape (R, D).
        limits: Distance to where the rule fails, at least 0, shape (R,).
        units: How many numbers were split, a maximum counted once for each candidate but one.
        error: Largest deviation from the network itself, at the input and at two points half way to the boundary.
    """

    centre: Tensor
    value: Tensor
    weight: Tensor
    rules: Tensor
    limits: Tensor
    units: int
    error: float

    @property
    def bias(self) -> Tensor:
        """The outputs of the map at t = 0."""
        return self.value - self.weight @ self.centre

    @property
    def distance(self) -> float:
        """How far the input may move in any direction and stay on the piece; infinite if no unit splits."""
        return float(self.limits.min()) if len(self.limits) else math.inf

    def contains(self, t: Tensor) -> Tensor:
        """Return whether points lie on the piece.

        Args:
            t: Shape (N, D).

        Returns:
            Shape (N,).
        """
        return ((t - self.centre) @ self.rules.T <= self.limits).all(1)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the map's outputs, shape (N, O), on or off the piece."""
        return self.value + (t - self.centre) @ self.weight.T


class _Here:
    """Hold every unit on the piece it is on at the first point of the frame, and keep the rules for that."""

    def __init__(self, most: int) -> None:
        self.rules: list[Tensor] = []
        self.limits: list[Tensor] = []
        self.units, self.left = 0, most

    def pieces(self, z: Tensor, pieces: Pieces) -> Tensor:
        start, slope = z[0, 0], (z[0, 1:] - z[0, 0]).T
        piece = pieces.of(start)
        ends = torch.tensor([-math.inf, *pieces.breaks, math.inf], dtype=z.dtype, device=z.device)
        self.units += len(start) * len(pieces.breaks)
        self._keep(slope, ends[piece + 1] - start)
        self._keep(-slope, start - ends[piece])
        return piece[None]

    def largest(self, z: Tensor, valid: Tensor) -> Tensor:
        start = z[0, 0].masked_fill(~valid, -math.inf)
        best = start.argmax(-1)
        slope = z[0, 1:] - z[0, 0]
        top = slope.gather(-1, best[None, :, None].expand(len(slope), -1, 1))
        others = valid.scatter(-1, best[:, None], False)
        self.units += int(others.sum())
        self._keep((slope - top)[:, others].T, (start.amax(-1, keepdim=True) - start)[others])
        return best[None]

    def _keep(self, rules: Tensor, limits: Tensor) -> None:
        norms = rules.norm(dim=1)
        held = limits.isfinite() & (norms > 1e-12)
        self.left -= int(held.sum()) * rules.shape[1]
        if self.left < 0:
            raise Unsupported(
                _METHOD, "the network", why="its rules have too many entries", try_="`directions`, or a larger `most`"
            )
        self.rules.append(rules[held] / norms[held, None])
        self.limits.append(limits[held] / norms[held])


def affine_piece(
    model: nn.Module,
    batch: Batch,
    *,
    sample: int = 0,
    directions: Tensor | None = None,
    most: int = 2**26,
    seed: int = 0,
) -> AffinePiece:
    """Return the affine map a network is around one input, exactly, and where it holds: the path to one leaf.

    One pass in float64 over the input and a step along each of its entries, every unit held on the piece it is on at
    the input: there the network is affine. Eval mode is taken, in which batch normalisation is affine.

    Differs from the paper: no tree is built, so that networks of any size have their paths.

    Args:
        model: Made of linear maps, maxima and piecewise-linear activations, as modules or functions.
        batch: Inputs, of which the floating-point ones vary, and targets, which are not read.
        sample: Which input.
        directions: Unit steps in the space of the input's entries, shape (D, entries); None takes every entry. A few
            keep large networks cheap.
        most: Most entries of all rules together.
        seed: Draws the points of the comparison.

    Returns:
        The map.

    Raises:
        Unsupported: If an operation is not known to be piecewise linear, or there are too many rules.
        UsageError: If the directions do not fit.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
        >>> x = torch.randn(1, 2, dtype=torch.float64)
        >>> piece = affine_piece(model, (x, torch.zeros(1)))
        >>> torch.allclose(piece(x), model(x)), piece.units
        (True, 4)
    """
    inputs = tree_map(_wide, take(batch[0], slice(sample, sample + 1)))
    origin = _entries(inputs)
    if directions is not None and (directions.ndim != 2 or directions.shape[1] != origin.numel()):
        raise UsageError("the directions do not fit", expected=("D", origin.numel()), found=tuple(directions.shape))
    count = origin.numel() if directions is None else len(directions)
    if (count + 1) * origin.numel() > most:
        raise Unsupported(_METHOD, model, why="its inputs have too many entries", try_="`directions`")
    steps = torch.eye(count).to(origin) if directions is None else directions.to(origin)
    copied, here = twin(model), _Here(most)
    frame = _place(inputs, origin + torch.cat([torch.zeros_like(steps[:1]), steps]))
    found = run(copied, frame, frames=1, points=count + 1, chooser=here, method=_METHOD)[0]
    centre = origin if directions is None else torch.zeros(count).to(origin)
    rules = torch.cat([torch.zeros(0, count).to(origin), *here.rules])
    limits = torch.cat([torch.zeros(0).to(origin), *here.limits])
    draw = torch.Generator().manual_seed(seed)
    moves = torch.cat([torch.zeros(1, count, dtype=torch.float64), torch.randn(2, count, generator=draw).double()])
    moves = nn.functional.normalize(moves).to(origin)
    # Half of the way to the first boundary that is met.
    reach = (limits / (moves @ rules.T).clamp_min(1e-300)).amin(1).clamp(max=2.0) if len(limits) else torch.ones(3)
    moves = moves * (reach.to(origin) / 2)[:, None]
    piece = AffinePiece(centre, found[0], (found[1:] - found[0]).T, rules, limits, here.units, 0.0)
    error = deviation(copied, _place(inputs, origin + moves @ steps), piece(centre + moves), _METHOD)
    return AffinePiece(centre, found[0], piece.weight, rules, limits, here.units, error)


def _wide(value: Tensor) -> Tensor:
    return value.detach().double() if value.is_floating_point() else value


def _entries(inputs: Any) -> Tensor:
    """Return all floating-point entries of one sample as one vector."""
    found = [one.flatten() for one in tree_leaves(inputs) if isinstance(one, Tensor) and one.is_floating_point()]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _place(inputs: Any, rows: Tensor) -> Any:
    """Return inputs of one sample for each row of entries."""
    after = [0]

    def part(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.expand(len(rows), *value.shape[1:])
        after[0] += value.numel()
        return rows[:, after[0] - value.numel() : after[0]].reshape(len(rows), *value.shape[1:]).clone()

    return tree_map(part, inputs)


def decision_tree(
    model: nn.Module,
    low: Tensor,
    high: Tensor,
    *,
    plane: tuple[Tensor, Tensor] | None = None,
    most: int = 20_000,
) -> NetworkTree:
    """Build the decision tree that a network is on a box of inputs.

    Layer by layer every cell is split by the units that change their piece inside it, which its corners tell;
    a side that reaches less than 1e-9 of the box's least width beyond a split is dropped.

    Args:
        model: A network of one floating-point input, made of linear maps and piecewise-linear activations.
        low: Lower corner, shape of one input; with a plane, of its coordinates.
        high: Upper corner.
        plane: An input and directions, shape (D, entries): the tree is that of input + t directions.
        most: Most leaves; about ten inputs and thirty units are within reach.

    Returns:
        The tree.

    Raises:
        Unsupported: If an operation is not piecewise linear, is a maximum of several, or there are too many leaves or
            inputs.
        UsageError: If the box is empty.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double()
        >>> tree = decision_tree(model, -torch.ones(1), torch.ones(1))
        >>> x = torch.linspace(-1, 1, 50)[:, None].double()
        >>> tree.leaves <= 4, torch.allclose(tree(x), model(x))
        (True, True)
    """
    if low.shape != high.shape or not bool((low < high).all()) or not bool((high - low).isfinite().all()):
        raise UsageError(
            "the box is empty or unbounded", expected="low < high", found=(tuple(low.shape), tuple(high.shape))
        )
    if low.numel() > 14:
        raise Unsupported(
            "decision_tree", model, why=f"a box of {low.numel()} inputs has too many corners", try_="plane"
        )
    copied = twin(model)
    device = next((value.device for value in copied.parameters()), low.device)
    shape = low.shape if plane is None else plane[0].shape
    low, high = low.flatten().double().to(device), high.flatten().double().to(device)
    origin = torch.zeros_like(low) if plane is None else plane[0].flatten().to(low)
    steps = torch.eye(len(low)).to(low) if plane is None else plane[1].to(low)
    return grow(copied, low, high, lay=lambda t: (origin + t @ steps).reshape(-1, *shape), most=most)


@claim(
    CARD,
    checks=(
        Check.at_most("the tree is the network on 10,000 inputs", method="tree", metric="error", bound=1e-9),
        Check.at_most("so is the path on three convolutions", method="convolutions", metric="error", bound=1e-9),
        Check.at_most("a leaf for each pattern seen, one layer", method="2-(8)", metric="unlike", bound=0.0),
        Check.at_most("a leaf for each pattern seen, two layers", method="2-(8,8)", metric="unlike", bound=0.0),
        Check.at_least("no fewer leaves than patterns sampled", method="4-(8,8)", metric="beyond", bound=0.0),
        Check.at_most("as few as hyperplanes make", method="tree", metric="of_bound", bound=1.0),
        Check.at_most("a small network's path costs less", method="2-(8,8)", metric="cost", bound=1.0),
        Check.at_least("a convolutional one's more", method="convolutions", metric="cost", bound=1.0),
        Check(name="a learned tree of as many leaves is no match", method="tree", control="learned tree",
              metric="rmse", better="lower"),
    ),
    sabotage={"one sign inverted": "tree"},
    seeds=5,
    minutes=1.0,
    data=("digits",),
)  # fmt: skip
def the_tree_is_the_network(ctx: Ctx) -> None:
    """The tree returns the network's outputs with one leaf for each feasible pattern, few in low dimension.

    Random ReLU networks of one, two and four inputs on the box [-2, 2], and the path of ten digits through three
    convolutions. Patterns are counted on a grid of 2000 x 2000, or a million random points in four dimensions, and at
    a point inside each leaf; `unlike` is the difference in number, `beyond` that to the sampled points alone. The bound
    multiplies Zaslavsky's counts of the layers. `cost` is that of a path over the network's. The learned tree is fitted
    to 10,000 of the network's outputs; the sabotaged one exchanges the two sides of its first split. Errors are the
    largest over the networks.
    """
    worst: dict[str, list[float]] = {"error": [], "of_bound": [], "rmse": [], "learned": [], "off": [], "off_rmse": []}
    for place, (arm, (inputs, hidden)) in enumerate(NETS.items()):
        model = network(inputs, hidden, ctx.generator("weights", arm))
        side = SIDE * torch.ones(inputs)
        tree = decision_tree(model, -side, side)
        x = drawn(10_000, inputs, ctx.generator("test", arm))
        sample = drawn(ctx.scaled(1_000_000, 50_000), inputs, ctx.generator("patterns", arm))
        sampled = patterns(model, grid(ctx.scaled(2000, 200)) if inputs == 2 else sample).unique()
        seen = torch.cat([sampled, patterns(model, tree.points)]).unique()
        net_cost = macs(model, x[:1]) + sum(hidden)
        ctx.measure(
            arm, unlike=float(abs(tree.leaves - len(seen))), beyond=float(tree.leaves - len(sampled)),
            leaves=float(tree.leaves), share=tree.leaves / 2 ** sum(hidden), cost=tree.operations(x) / net_cost,
        )  # fmt: skip
        with torch.no_grad():
            y = model(x)
        turned = tree.children.clone()
        turned[:1] = turned[:1].flip(1)
        train = drawn(10_000, inputs, ctx.generator("train", arm))
        fitted = learned(train, tree(train), x, leaves=tree.leaves)
        inverted = replace(tree, children=turned)(x)
        for key, found in (("error", tree(x)), ("off", inverted)):
            worst[key].append(float((found - y).abs().max()))
        for key, found in (("rmse", tree(x)), ("learned", fitted), ("off_rmse", inverted)):
            worst[key].append(float((found - y).square().mean().sqrt() / y.std().clamp_min(1e-9)))
        worst["of_bound"].append(tree.leaves / regions(inputs, hidden))
        ctx.progress(place + 1, len(NETS) + 1, arm)
    most = {key: max(values) for key, values in worst.items()}
    ctx.measure("tree", error=most["error"], of_bound=most["of_bound"], rmse=most["rmse"])
    ctx.measure("one sign inverted", error=most["off"], of_bound=most["of_bound"], rmse=most["off_rmse"])
    ctx.measure("learned tree", rmse=most["learned"])
    convolutions = convolutional(ctx.generator("convolutions"))
    images = ctx.data("digits").test_x[:10]
    routes = [affine_piece(convolutions, (images, torch.zeros(10)), sample=number) for number in range(10)]
    paths = [(one.units + one.weight.shape[0]) * images[0].numel() + one.units for one in routes]
    net_cost = macs(convolutions, images[:1]) + routes[0].units
    ctx.measure("convolutions", error=max(one.error for one in routes), cost=sum(paths) / len(paths) / net_cost)
