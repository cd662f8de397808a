"""Functional dimension: how many directions of the parameters change the function at all."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import UsageError
from nervure.core.forward import batch_size, take, tree_map
from nervure.core.graph import Stage, as_batches
from nervure.core.jacobian import Engine, expand
from nervure.core.layerwise import units
from nervure.core.vectors import select, unflatten
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="functional-dimension",
    n=253,
    title="Hidden symmetries of ReLU networks",
    year=2023,
    link="https://arxiv.org/abs/2306.06179",
    family="inspect",
    summary=(
        "The rank of the Jacobian of a network's outputs, over many inputs, counts the parameter directions that "
        "change the function. A ReLU network loses one to the rescaling of every hidden unit; what it loses beyond "
        "that are hidden symmetries, rarer the wider and commoner the deeper it is."
    ),
    tags=("symmetry", "rank", "Jacobian", "ReLU", "redundant parameters", "identifiability", "audit"),
    provides=("local_dimension", "FunctionalDimension"),
    protocol="diagnostic",
    claims=("hidden_symmetries_come_with_depth",),
    deviations=(
        "Above a chosen number of parameters no rank is computed; parameters no output depends on are counted at any "
        "size.",
        "Weights are drawn with variance 2 / fan-in and biases with deviation 0.1: the paper's law is not known here, "
        "and the shares depend on it.",
    ),
    verified=(
        "Ranks of hand-built networks known in closed form, and exact ones in rational numbers of a 3-2-1 network.",
        "The Jacobian against autograd one output at a time, on every model of the zoo.",
    ),
)


@dataclass(frozen=True)
class FunctionalDimension:
    """Report how many directions of the parameters change the outputs on the given inputs.

    Args:
        dimension: The rank; None where the parameters are too many for it.
        half: The rank on the first half of the inputs.
        parameters: Number of parameters.
        symmetries: What was known to be lost, as given.
        rows: Outputs of all inputs: the rank cannot be larger.
        singular_values: Of the Jacobian, falling; none where the parameters are too many.
        silent: Parameter entries that no output depends on at any input, by name; only those with such.
    """

    dimension: int | None
    half: int | None
    parameters: int
    symmetries: int
    rows: int
    singular_values: Tensor
    silent: dict[str, int]

    @property
    def gap(self) -> float:
        """The least singular value that counts over the next: below 10, where the rank ends is a matter of taste."""
        values, rank = self.singular_values, self.dimension
        if not rank:
            return math.nan
        below = float(values[rank]) if rank < len(values) else 0.0
        return float(values[rank - 1]) / below if below > 0 else math.inf

    @property
    def deficit(self) -> int | None:
        """Directions lost beyond the known symmetries: parameters - symmetries - dimension."""
        return None if self.dimension is None else self.parameters - self.symmetries - self.dimension

    @property
    def verdict(self) -> str:
        """Return "ok" without a deficit, "warn" with one that more inputs do not mend, else "cannot tell"."""
        if self.silent:
            return "warn"
        if self.deficit is None:
            return "cannot tell"
        if self.deficit <= 0:
            return "ok"
        return "warn" if self.half == self.dimension and self.gap >= 10 else "cannot tell"


def local_dimension(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    parameters: Iterable[str] | None = None,
    symmetries: int = 0,
    most: int = 1500,
    seed: int = 0,
) -> FunctionalDimension:
    """Compute the rank of the Jacobian of all outputs with respect to the parameters, in float64.

    The rank on half of the inputs stands beside it: where it is smaller, more inputs may raise the rank further.

    Args:
        model: The model; batch normalisation must be in eval mode.
        batches: One batch (inputs, targets) or a sequence of batches; targets are not read.
        parameters: Names or prefixes; None takes all that require a gradient.
        symmetries: Directions known to be lost, such as one for each hidden ReLU unit, at least 0.
        most: Most parameters for which the rank is computed; time grows with their cube.
        seed: Draws the weights of the outputs, where no rank is computed.

    Returns:
        The report.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> relu = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> found = local_dimension(relu, (3 * torch.randn(200, 2), torch.zeros(200)), symmetries=3)
        >>> found.parameters, found.dimension <= 13 - 3
        (13, True)
    """
    if symmetries < 0 or most < 1:
        raise UsageError("a number is out of range", expected="symmetries >= 0, most >= 1", found=(symmetries, most))
    wide = copy.deepcopy(model).double()
    chosen = select(wide, parameters)
    every = [tree_map(_wide, inputs) for inputs, _ in as_batches(batches)]
    size = sum(value.numel() for value in chosen.values())
    if size > most:
        return _silent_only(wide, every, parameters, symmetries, seed)
    engine = Engine(wide, every[0], parameters, method="functional dimension")
    used = {name: torch.zeros(value.numel(), dtype=torch.bool) for name, value in chosen.items()}
    factors: list[Tensor] = []
    rows = 0
    for inputs in every:
        # A few samples at a time, so that a part of the Jacobian stays under 256 MB.
        count = batch_size(inputs)
        step = max(1, 2**25 // max(1, size * engine.outputs))
        for start in range(0, count, step):
            part = _jacobian(engine, take(inputs, slice(start, start + step)))
            rows += next(iter(part.values())).shape[0]
            for name, value in part.items():
                used[name] |= (value != 0).any(0).cpu()
            factors.append(torch.cat([part[name] for name in chosen], 1))
    silent = {name: int((~one).sum()) for name, one in used.items() if not bool(one.all())}
    whole = torch.cat(factors)
    dimension, values = _rank(whole)
    half = _rank(whole[: max(1, len(whole) // 2)])[0]
    return FunctionalDimension(dimension, half, size, symmetries, rows, values, silent)


def _silent_only(
    model: nn.Module,
    inputs: Sequence[Any],
    parameters: Iterable[str] | None,
    symmetries: int,
    seed: int,
) -> FunctionalDimension:
    """Count the parameters no output depends on: with random weights for all outputs their one gradient is zero."""
    draw = torch.Generator().manual_seed(seed)
    stage = Stage(
        model, [(one, torch.zeros(1)) for one in inputs], parameters=parameters, method="functional dimension"
    )
    used = torch.zeros(stage.size, dtype=torch.bool)
    rows = 0
    with stage.ready():
        for one in inputs:
            graph = stage.graph(one)
            weights = torch.randn(graph.output.shape, generator=draw, dtype=torch.float64).to(graph.output.device)
            used |= (graph.pull(graph.output, weights) != 0).cpu()
            rows += graph.output.numel()
    found = unflatten(used, stage.parameters)
    silent = {name: int((~one).sum()) for name, one in found.items() if not bool(one.all())}
    return FunctionalDimension(None, None, stage.size, symmetries, rows, torch.zeros(0), silent)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _jacobian(engine: Engine, inputs: object) -> dict[str, Tensor]:
    """Return name -> rows of the Jacobian, samples first, shape (N O, entries)."""
    with engine.trace(inputs) as trace:
        full = expand(trace.rows(units(trace.output.detach())))
    return {name: value.transpose(0, 1).flatten(0, 1).flatten(1).detach() for name, value in full.items()}


def _rank(matrix: Tensor) -> tuple[int, Tensor]:
    """Return the numerical rank and the singular values."""
    factor = torch.linalg.qr(matrix, mode="r")[1] if len(matrix) > matrix.shape[1] else matrix
    values = torch.linalg.svdvals(factor)
    return int((values > values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum()), values


_CELLS = ((5, 1), (5, 2), (5, 3), (5, 4), (20, 3))


@claim(
    CARD,
    checks=(
        Check.at_least("rarer with depth: one layer less three", method="depth", metric="fall", bound=0.0),
        Check.at_least("at every step of the depth", method="depth", metric="least_step", bound=0.0),
        Check.at_least("commoner with width at three layers", method="width", metric="rise", bound=0.0),
        Check.at_least("tanh networks have full rank", method="tanh", metric="at_cap", bound=0.95),
        Check.at_most("a twin unit loses the predicted rank", method="duplicated unit", metric="wrong", bound=0.0),
    ),
    sabotage={"one depth": "depth", "one width": "width"},
    seeds=5,
    minutes=3.0,
)  # fmt: skip
def hidden_symmetries_come_with_depth(ctx: Ctx) -> None:
    """Random ReLU networks reach the cap of parameters less hidden units rarely when deep and often when wide.

    Five inputs, one output, 20 networks a cell of width 5 and one to four layers, and of width 20 and three layers; as
    many normal inputs as eight times the parameters. The controls compare two draws of one depth and of one width.
    """
    draws = ctx.scaled(20, 3)
    shares, changed = {}, []
    for cell in _CELLS:
        found = [_at_cap(cell, ctx.generator(*cell, number)) for number in range(draws)]
        shares[cell] = sum(reached for reached, _ in found) / draws
        changed += [other for _, other in found]
        ctx.measure(f"width {cell[0]}, depth {cell[1]}", share=shares[cell])
        ctx.progress(len(shares), len(_CELLS) + 1, f"width {cell[0]}, depth {cell[1]}")
    steps = [shares[5, depth] - shares[5, depth + 1] for depth in (1, 2, 3)]
    ctx.measure("depth", fall=shares[5, 1] - shares[5, 3], least_step=min(steps))
    again = [_share((5, 1), ctx, draws, "again", part) for part in range(4)]
    least = min(before - after for before, after in itertools.pairwise(again))
    ctx.measure("one depth", fall=again[0] - again[2], least_step=least)
    ctx.measure("width", rise=shares[20, 3] - shares[5, 3])
    ctx.measure("one width", rise=_share((5, 3), ctx, draws, "twin") - shares[5, 3])
    ctx.measure("doubling", changed=float(sum(changed)))
    tanh = [_at_cap((5, 2), ctx.generator("tanh", n), activation=nn.Tanh)[0] for n in range(draws)]
    ctx.measure("tanh", at_cap=sum(tanh) / draws)
    ctx.measure("duplicated unit", wrong=float(sum(_wrong(ctx.generator("unit", n)) for n in range(draws))))


def _share(cell: tuple[int, int], ctx: Ctx, draws: int, *tags: object) -> float:
    return sum(_at_cap(cell, ctx.generator(*tags, number))[0] for number in range(draws)) / draws


def _network(width: int, depth: int, draw: torch.Generator, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in [(5, width)] + [(width, width)] * (depth - 1) + [(width, 1)]:
        layer = nn.Linear(inputs, outputs).double()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=draw) * (2 / inputs) ** 0.5)
            layer.bias.copy_(torch.randn(outputs, generator=draw) * 0.1)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def _at_cap(
    cell: tuple[int, int], draw: torch.Generator, *, activation: type[nn.Module] = nn.ReLU
) -> tuple[bool, bool]:
    """Return whether a drawn network reaches the cap, and whether half the inputs would give another rank."""
    width, depth = cell
    model = _network(width, depth, draw, activation)
    count = 8 * sum(value.numel() for value in model.parameters())
    x = torch.randn(count, 5, generator=draw, dtype=torch.float64)
    lost = width * depth if activation is nn.ReLU else 0
    found = local_dimension(model, (x, torch.zeros(count)), symmetries=lost)
    return found.deficit == 0, found.half != found.dimension


def _wrong(draw: torch.Generator) -> bool:
    """Return whether two equal units of one hidden layer give another rank than the closed form's."""
    model = _network(6, 1, draw, nn.Tanh)
    with torch.no_grad():
        for value in model[0].parameters():
            value[1] = value[0]
    x = torch.randn(400, 5, generator=draw, dtype=torch.float64)
    return local_dimension(model, (x, torch.zeros(400))).dimension != 5 * 7 + 1
