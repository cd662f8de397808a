"""Universal tickets: one mask on a random network computes a basis, and only the read-out changes from task to task."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nervure._kit import BadData, UsageError
from nervure.compress.pruning_is_all_you_need import construct
from nervure.core import masks
from nervure.core.subset_sum import subset_sum
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="universal-lottery-tickets",
    n=85,
    title="On the Existence of Universal Lottery Tickets",
    year=2021,
    link="https://arxiv.org/abs/2111.11146",
    family="compress",
    summary=(
        "A sparse sub-network of a random one that computes a basis of functions is a ticket for every task in their "
        "span: nothing is trained but the last linear layer, by least squares. Masks are found by subset sums, so the "
        "width grows with the logarithm of the precision."
    ),
    tags=("strong lottery ticket", "universal", "subset sum", "basis", "theory"),
    provides=("universal_ticket", "UniversalTicket"),
    claims=("one_mask_serves_a_basis",),
    needs=(),
    deviations=(
        "Every layer of the target takes two random layers; the paper needs one more in all.",
        "Basis functions are interpolated between shared knots by one hidden layer, not by iterated squaring.",
        "Bases are of one coordinate, and one mask serves all coordinates; products of coordinates are not formed.",
    ),
    verified=(
        "The largest difference from the functions in closed form is within eps on 10,001 points.",
        "Interpolation is exact at the knots and within the curvature's bound between them.",
    ),
)

Basis = Literal["monomials", "sines"]


@dataclass(frozen=True)
class UniversalTicket:
    """Hold a masked random network that computes a basis, and fit read-outs on it.

    Args:
        model: From numbers in [0, 1], shape (N, 1), to the basis functions, shape (N, count).
        eps: Largest difference from the basis functions on [0, 1].
        candidates: Candidates for each sign of each weight.
        density: Share of the random weights that is kept.
    """

    model: nn.Sequential
    eps: float
    candidates: int
    density: float

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return a one and the basis functions of every coordinate, each by the same masked network.

        Args:
            x: Shape (N, d), entries in [0, 1].

        Returns:
            Shape (N, 1 + d * count).

        Raises:
            BadData: If an entry is outside [0, 1].
        """
        if x.ndim != 2 or bool((x < 0).any() | (x > 1).any()):
            raise BadData("the basis lives on [0, 1]", expected="shape (N, d), entries in [0, 1]", found=tuple(x.shape))
        dtype = next(self.model.parameters()).dtype
        each = self.model(x.to(dtype).reshape(-1, 1)).reshape(len(x), -1)
        return torch.cat([each.new_ones(len(x), 1), each], 1)

    def fit(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Fit a read-out by least squares; the mask stays as it is.

        Args:
            x: Shape (N, d), entries in [0, 1].
            y: Shape (N,) or (N, outputs).

        Returns:
            From inputs to predictions.
        """
        features = self.features(x)
        solution = torch.linalg.lstsq(features, y.to(features.dtype).reshape(len(x), -1), driver="gelsd").solution
        return lambda new: (self.features(new) @ solution).reshape(len(new), *y.shape[1:])


def universal_ticket(basis: Basis, eps: float, *, count: int = 8, seed: int = 0) -> UniversalTicket:
    """Mask a random ReLU network so that it computes a basis on [0, 1] to within eps.

    The functions x, x^2 ... or sin(pi x), sin(2 pi x) ... are interpolated between knots so close that the curvature
    costs at most eps / 2, and the interpolating network is found in a random one by subset sums to within eps / 2.

    Args:
        basis: Which functions.
        eps: Largest difference, in (0, 1).
        count: How many functions, at least 1.
        seed: Draws the random network.

    Returns:
        The ticket, in double precision.

    Raises:
        UsageError: If a number is outside its range.

    Examples:
        >>> ticket = universal_ticket("monomials", 0.1, count=3)
        >>> x = torch.rand(50, 2, dtype=torch.float64)
        >>> predict = ticket.fit(x, x[:, 0] ** 2 - 3 * x[:, 1] ** 3)
        >>> predict(x).shape
        torch.Size([50])
    """
    if not 0 < eps < 1 or count < 1:
        raise UsageError("no such basis", expected="0 < eps < 1, count >= 1", found=(eps, count))
    # The box of `construct` is symmetric: the target reads z = 2 x - 1.
    found = construct(_interpolant(basis, eps / 2, count), eps / 2, seed=seed)
    model = nn.Sequential(_Centred(), *found.model)
    kept = masks.read(found.model)
    masks.detach(found.model)
    masks.attach(model, {_shifted(name): mask for name, mask in kept.items()})
    return UniversalTicket(model, eps, found.candidates, found.density)


def values(basis: Basis, x: Tensor, count: int = 8) -> Tensor:
    """Return the basis functions in closed form.

    Args:
        basis: Which functions.
        x: Shape (N,).
        count: How many.

    Returns:
        Shape (N, count).
    """
    k = torch.arange(1, count + 1, dtype=x.dtype)
    return x[:, None] ** k if basis == "monomials" else torch.sin(math.pi * k * x[:, None])


class _Centred(nn.Module):
    """Carry [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


def _shifted(name: str) -> str:
    place, _, rest = name.partition(".")
    return f"{int(place) + 1}.{rest}"


def _interpolant(basis: Basis, eps: float, count: int) -> nn.Sequential:
    """Return the network of z = 2 x - 1 that interpolates the basis between equal knots in [0, 1]."""
    bend = count * (count - 1) if basis == "monomials" else (math.pi * count) ** 2
    pieces = max(1, math.ceil(math.sqrt(bend / (8 * eps))))  # a piece of length h is off by bend h^2 / 8 at most
    knots = torch.linspace(0, 1, pieces + 1, dtype=torch.float64)
    heights = values(basis, knots, count)
    slopes = heights.diff(dim=0) * pieces
    first, last = skip_init(nn.Linear, 1, pieces).double(), skip_init(nn.Linear, pieces, count).double()
    with torch.no_grad():
        first.weight.fill_(0.5)
        first.bias.copy_(0.5 - knots[:-1])
        last.weight.copy_(torch.cat([slopes[:1], slopes.diff(dim=0)]).T)
        last.bias.copy_(heights[0])
    return nn.Sequential(first, nn.ReLU(), last)


_EPS = {"monomials": (0.1, 0.01), "sines": (0.1,)}


@claim(
    CARD,
    checks=(
        Check.at_least(
            "subset sums gain half a bit a candidate", method="subset sum", metric="bits", bound=1.0, rule="every-seed"
        ),
        Check.at_most("the basis within 3 eps", method="ticket", metric="worst_ratio", bound=3.0, rule="every-seed"),
        Check.at_most("three tasks within 3 eps", method="ticket", metric="tasks_ratio", bound=3.0, rule="every-seed"),
        Check.at_least("a random mask is ten times worse", method="random mask", metric="times_worse", bound=10.0),
        Check.at_least("another basis does not serve", method="other basis", metric="tasks_ratio", bound=3.0),
    ),
    sabotage={"other basis": "ticket"},
    seeds=5,
    minutes=2,
)
def one_mask_serves_a_basis(ctx: Ctx) -> None:
    """A masked random network computes eight monomials or sines to eps, and new read-outs on it fit unrelated tasks.

    worst_ratio is the largest difference from the closed form on 2,001 points divided by eps, over monomials at eps
    0.1 and 0.01 and sines at 0.1; tasks_ratio that of three polynomials of size 1, read out by least squares from the
    monomials' ticket at 0.01. bits is the smallest, over n = 8, 12, 16 and 20 candidates, of the fall of the median
    subset-sum error since n = 4 in bits, per half candidate. Random features of the same width stand beside it. The
    sabotage takes the sines' ticket for the monomials'.
    """
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    ratio, tickets = 0.0, {}
    bases: tuple[Basis, ...] = ("monomials", "sines")
    for done, basis in enumerate(bases):
        ctx.progress(done, 3, basis)
        for eps in _EPS[basis]:
            ticket = tickets[basis] = universal_ticket(basis, eps, seed=ctx.seed_for("random"))
            off = _sup(ticket.model, basis, grid)
            ratio = max(ratio, off / eps)
            ctx.measure("ticket", step=eps, **{f"{basis}_sup": off, f"{basis}_candidates": ticket.candidates})
    mono = tickets["monomials"]
    spoilt = _permuted(mono.model, ctx.generator("mask"))
    ctx.measure("random mask", times_worse=_sup(spoilt, "monomials", grid) / _sup(mono.model, "monomials", grid))
    ctx.measure("ticket", worst_ratio=ratio, density=mono.density)
    ctx.measure("subset sum", bits=_bits(ctx.generator("subset sums")))
    ctx.measure("other basis", worst_ratio=_sup(tickets["sines"].model, "monomials", grid) / mono.eps)
    for arm, ticket in (("ticket", mono), ("other basis", tickets["sines"])):
        ctx.measure(arm, tasks_ratio=_tasks_error(ticket.features(grid[:, None]), grid, ctx) / mono.eps)
    width = sum(part.out_features for part in mono.model if isinstance(part, nn.Linear)) - 8
    inner = torch.rand(2, width, generator=ctx.generator("features"), dtype=torch.float64) * 2 - 1
    features = (torch.stack([grid, torch.ones_like(grid)], 1) @ inner).relu()
    ctx.measure("random features", tasks_ratio=_tasks_error(features, grid, ctx) / mono.eps, width=width)


@torch.no_grad()
def _sup(model: nn.Module, basis: Basis, grid: Tensor) -> float:
    return float((model(grid[:, None]) - values(basis, grid)).abs().max())


def _tasks_error(features: Tensor, grid: Tensor, ctx: Ctx) -> float:
    """Return the largest error of least-squares read-outs of three random polynomials of size 1."""
    factors = torch.randn(8, 3, generator=ctx.generator("tasks"), dtype=torch.float64)
    wanted = values("monomials", grid) @ factors
    wanted = wanted / wanted.abs().amax(0)
    found = features @ torch.linalg.lstsq(features, wanted, driver="gelsd").solution
    return float((found - wanted).abs().max())


@torch.no_grad()
def _permuted(model: nn.Module, draw: torch.Generator) -> nn.Module:
    """Return a random network of the same shape under permuted masks."""
    other = copy.deepcopy(model)
    for name, mask in masks.read(model).items():
        weight = other.get_parameter(name)
        weight.copy_((torch.rand(weight.shape, generator=draw) * 2 - 1) * weight.abs().max())
        masks.attach(other, {name: mask.flatten()[torch.randperm(mask.numel(), generator=draw)].view_as(mask)})
    return other


def _bits(draw: torch.Generator) -> float:
    medians = {}
    for n in (4, 8, 12, 16, 20):
        numbers = torch.rand(300, n, generator=draw, dtype=torch.float64) * 2 - 1
        goals = torch.rand(300, generator=draw, dtype=torch.float64) * 2 - 1
        medians[n] = float(((numbers * subset_sum(numbers, goals)).sum(1) - goals).abs().median())
    return min(math.log2(medians[4] / medians[n]) / ((n - 4) / 2) for n in (8, 12, 16, 20))
