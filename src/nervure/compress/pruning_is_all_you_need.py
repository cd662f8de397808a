"""The strong lottery ticket by construction: a mask on a random network of twice the depth computes a given network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nervure._kit import BadBudget, Unsupported, UsageError
from nervure.core import masks, rng
from nervure.core.subset_sum import subset_sum
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="pruning-is-all-you-need",
    n=258,
    title="Proving the Lottery Ticket Hypothesis: Pruning is All You Need",
    year=2020,
    link="https://arxiv.org/abs/2002.00585",
    family="compress",
    summary=(
        "Any ReLU network is approximated by a sub-network of a random one of twice the depth, without training: a "
        "weight w becomes a relu(b x) + a' relu(b' x) with pairs picked from many random ones. Picking one pair takes "
        "a width of order 1/eps, a subset that sums to w only of order log(1/eps); dropping whole neurons cannot do it."
    ),
    tags=("strong lottery ticket", "theory", "subset sum", "random network", "approximation"),
    provides=("construct", "Ticket"),
    claims=("masks_of_random_networks_suffice",),
    needs=(),
    deviations=(
        "Random weights are uniform within the root of twice the layer's largest weight; the paper scales the target.",
        "The pair with the best product is picked; the proof asks for both factors to be close.",
        "Targets are fully connected; convolutions are refused.",
    ),
    verified=(
        "The bound holds against the true error on 2,000 points of the box, and equals it in closed form for one "
        "linear layer.",
        "Picked pairs and subsets are the best of all by enumeration.",
    ),
)

Gadget = Literal["subset-sum", "pair"]
_MOST = {"subset-sum": 128, "pair": 1 << 15}
_POOL = 10  # products of one sign that a subset is chosen from


@dataclass(frozen=True)
class Ticket:
    """Hold a masked random network that computes nearly what a target does.

    Args:
        model: Random weights under masks, twice as deep as the target.
        bound: Largest difference of any output on the box, proven by interval arithmetic.
        candidates: Candidates for each sign of each weight.
        widths: Widths of the random hidden layers between the target's.
        density: Share of the random weights that is kept.
    """

    model: nn.Sequential
    bound: float
    candidates: int
    widths: tuple[int, ...]
    density: float


class _One(nn.Module):
    """Put a constant one beside the inputs: its weights are the biases."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(len(x), 1)], 1)


@dataclass(frozen=True)
class _Layer:
    """Hold one linear layer of the target, its bias as a last column, and random candidates for it."""

    weight: Tensor  # (out, in + 1)
    b: Tensor  # (K, in + 1): weights into the random hidden layer
    a: Tensor  # (K, in + 1, out): weights out of it

    def pick(self, width: int, gadget: Gadget) -> tuple[Tensor, Tensor]:
        """Return which of the first `width` candidates of every weight are kept, and the largest error of each."""
        kept = torch.zeros_like(self.a[:width], dtype=torch.bool)
        error = torch.zeros_like(self.weight)
        for sign in (1, -1):
            usable = self.b[:width] * sign > 0
            products = self.a[:width] * self.b[:width].unsqueeze(-1)
            if gadget == "pair":
                gaps = (products - self.weight.T).abs().masked_fill_(~usable.unsqueeze(-1), math.inf)
                best = gaps.min(0)
                # A weight that is nearer to nothing than to any product keeps nothing.
                keeps = best.values <= self.weight.T.abs()
                kept.scatter_(0, best.indices.unsqueeze(0), keeps.unsqueeze(0) | kept.gather(0, best.indices[None]))
                gap = torch.where(keeps, best.values, self.weight.T.abs()).T
            else:
                rows = products.masked_fill(~usable.unsqueeze(-1), 0).permute(2, 1, 0)
                chosen = self._best_subset(rows)
                gap = ((rows * chosen).sum(-1) - self.weight).abs()
                kept |= chosen.permute(2, 1, 0)
            error = torch.maximum(error, gap)
        return kept, error

    def _best_subset(self, rows: Tensor) -> Tensor:
        """Solve for a pool of the first few products of either sign, of which any target is within reach."""
        signs = torch.stack([rows > 0, rows < 0])
        pool = (signs & (signs.cumsum(-1) <= _POOL)).any(0)
        order = pool.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., : int(pool.sum(2).max())]
        chosen = subset_sum(rows.gather(2, order), self.weight) & pool.gather(2, order)
        return torch.zeros(rows.shape, dtype=torch.bool).scatter_(2, order, chosen)


def construct(
    target: nn.Module, eps: float, *, gadget: Gadget = "subset-sum", radius: float | Tensor = 1.0, seed: int = 0
) -> Ticket:
    """Mask a random network so that it differs from a target by at most eps on the box |x| <= radius.

    Every weight w of the target becomes the sum of a_m relu(b_m x) over kept m with b_m > 0, and likewise for
    b_m < 0, where products a_m b_m sum to w nearly; a constant input carries the biases. The number of candidates
    grows until the bound e' = |W - W'| X + |W'| e, carried through the layers, is at most eps; it is the smallest.

    Args:
        target: A Sequential of Linear and ReLU in turns, perhaps after a Flatten.
        eps: Largest difference, above 0.
        gadget: ``"pair"`` keeps for each sign of each weight one pair, as in the paper; ``"subset-sum"`` a subset.
        radius: Half width of the box, at least 0: one number, or one for each input.
        seed: Draws the random network.

    Returns:
        The masked network, with its bound.

    Raises:
        UsageError: If eps is not positive, or the radius negative or of another shape.
        Unsupported: If the target is something else.
        BadBudget: If eps is too small for the most candidates that are tried.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> ticket = construct(net, 0.01)
        >>> x = torch.rand(100, 2) * 2 - 1
        >>> bool((ticket.model(x) - net(x)).abs().max() <= 0.01)
        True
    """
    linears = _linears(target)
    box = torch.as_tensor(radius, dtype=torch.float64).cpu()
    if eps <= 0 or bool((box < 0).any()) or box.shape not in ((), (linears[0].in_features,)):
        raise UsageError("no such eps or box", expected="eps > 0, radius >= 0 of one number or one an input", found=eps)
    box = box.expand(linears[0].in_features)
    layers = [_drawn(linear, _MOST[gadget], seed, index) for index, linear in enumerate(linears)]
    low, high = 0, 1
    while (bound := _bound(layers, high, gadget, box)) > eps:
        if high == _MOST[gadget]:
            raise BadBudget("no mask is found", expected=f"an error of {eps}", found=bound, try_="a larger eps")
        low, high = high, min(2 * high, _MOST[gadget])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _bound(layers, middle, gadget, box) <= eps else (middle, high)
    return _built(target, layers, high, gadget, _bound(layers, high, gadget, box))


def _linears(target: nn.Module) -> list[nn.Linear]:
    children = list(target.children()) if isinstance(target, nn.Sequential) else [target]
    inner = [child for child in children if not isinstance(child, nn.Flatten)]
    flat = all(isinstance(child, nn.Linear) for child in inner[::2]) and len(inner) % 2 == 1
    if not flat or not all(isinstance(child, nn.ReLU) for child in inner[1::2]):
        raise Unsupported("construct", target, why="it is no Sequential of Linear and ReLU in turns")
    return [child for child in inner if isinstance(child, nn.Linear)]


def _drawn(linear: nn.Linear, most: int, seed: int, index: int) -> _Layer:
    """Draw candidates; the first k of them are the same for every number drawn."""
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    weight = torch.cat([weight, bias.double()[:, None]], 1).cpu()
    scale = float((2 * weight.abs().max()).sqrt())
    draw = rng.generator("strong ticket", seed, index)
    b = (torch.rand(most, weight.shape[1], generator=draw, dtype=torch.float64) * 2 - 1) * scale
    a = (torch.rand(most, weight.shape[1], len(weight), generator=draw, dtype=torch.float64) * 2 - 1) * scale
    return _Layer(weight, b, a)


def _bound(layers: Iterable[_Layer], width: int, gadget: Gadget, size: Tensor) -> float:
    """Carry the largest activation and the largest error through the layers."""
    error = torch.zeros_like(size)
    for layer in layers:
        gap = layer.pick(width, gadget)[1]
        size, error = torch.cat([size, size.new_ones(1)]), torch.cat([error, error.new_zeros(1)])
        error = gap @ size + (layer.weight.abs() + gap) @ error
        size = layer.weight.abs() @ size
    return float(error.max())


def _built(target: nn.Module, layers: list[_Layer], width: int, gadget: Gadget, bound: float) -> Ticket:
    first = next(target.parameters())
    parts: list[nn.Module] = [nn.Flatten()]
    kept: dict[str, Tensor] = {}
    for layer in layers:
        chosen = layer.pick(width, gadget)[0]  # (k, in, out)
        inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]
        into = skip_init(nn.Linear, inputs, width * inputs, bias=False)
        out = skip_init(nn.Linear, width * inputs, outputs, bias=False)
        with torch.no_grad():
            # What a mask drops is zero whatever was drawn for it; only the candidates are drawn.
            into.weight.copy_(torch.diag_embed(layer.b[:width]).reshape(width * inputs, inputs))
            out.weight.copy_(layer.a[:width].permute(2, 0, 1).reshape(outputs, -1))
        used = chosen.any(2)
        place = len(parts)
        kept[f"{place + 1}.weight"] = torch.diag_embed(used).reshape(width * inputs, inputs)
        kept[f"{place + 3}.weight"] = chosen.permute(2, 0, 1).reshape(outputs, -1)
        parts += [_One(), into, nn.ReLU(), out, nn.ReLU()]
    model = nn.Sequential(*parts[:-1]).to(first.device, first.dtype)
    masks.attach(model, {name: mask.to(first.device) for name, mask in kept.items()})
    widths = tuple(width * layer.weight.shape[1] for layer in layers)
    return Ticket(model.requires_grad_(False), bound, width, widths, masks.density(kept))


_EPS = (0.3, 0.1, 0.03)


@claim(
    CARD,
    checks=(
        Check.at_most(
            "subsets are within eps", method="subset-sum", metric="worst_ratio", bound=1.0, rule="every-seed"
        ),
        Check.at_most("pairs are within eps", method="pair", metric="worst_ratio", bound=1.0, rule="every-seed"),
        Check.at_least(
            "digits within half a point", method="subset-sum", metric="digits_gap", bound=-0.005, rule="every-seed"
        ),
        Check.at_least("pairs need a width of order 1/eps", method="pair", metric="slope", bound=0.7),
        Check.at_most("and not more", method="pair", metric="slope", bound=1.3),
        Check.at_most("subsets need far less", method="subset-sum", metric="slope", bound=0.5),
        Check.at_least("whole neurons do not reach eps", method="random features", metric="worst_ratio", bound=1.0),
    ),
    sabotage={"signs flipped": "subset-sum", "random mask": "subset-sum"},
    seeds=5,
    minutes=4,
    data=("digits",),
)
def masks_of_random_networks_suffice(ctx: Ctx) -> None:
    """A mask makes a random network equal to a trained one within eps; pairs need a width of 1/eps, subsets far less.

    Targets are a trained 2-8-1 network (largest difference on a 101 x 101 grid) and 64-16-10 on digits (on the test
    part), eps 0.3, 0.1 and 0.03; worst_ratio is the largest difference divided by eps, slope that of log width over
    log 1/eps. Random features are whole neurons of a random network as wide as the subsets' in all, with the best
    read-out, at eps 0.03. The sabotages flip the signs of the kept weights, or permute each layer's mask.
    """
    toy, grid = _toy(ctx), torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(-1, 1, 101))
    tickets: dict[str, list[Ticket]] = {}
    ratios: dict[str, float] = {}
    slopes: dict[str, float] = {}
    gadgets: tuple[Gadget, ...] = ("subset-sum", "pair")
    for done, gadget in enumerate(gadgets):
        ctx.progress(done, 4, gadget)
        tickets[gadget] = [construct(toy, eps, gadget=gadget, seed=ctx.seed_for("random")) for eps in _EPS]
        ratios[gadget] = max(
            _sup(ticket.model, toy, grid) / eps for ticket, eps in zip(tickets[gadget], _EPS, strict=True)
        )
        logs = [math.log(sum(ticket.widths)) for ticket in tickets[gadget]]
        slopes[gadget] = (logs[-1] - logs[0]) / math.log(_EPS[0] / _EPS[-1])
        ctx.measure(gadget, slope=slopes[gadget], width=sum(tickets[gadget][-1].widths))
    data = ctx.data("digits").flat()
    with rng.scope("digits", ctx.seed_for("start")):
        net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, data.classes))
    ctx.train(net, data, steps=ctx.scaled(600, 60), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
    whole = ctx.accuracy(net, data.test_x, data.test_y)
    gaps: list[float] = []
    for done, eps in enumerate(_EPS):
        ctx.progress(1 + done / 3, 2, "digits")
        ticket = construct(net, eps, radius=data.test_x.abs().amax(0), seed=ctx.seed_for("random"))
        ratios["subset-sum"] = max(ratios["subset-sum"], _sup(ticket.model, net, data.test_x) / eps)
        gaps.append(ctx.accuracy(ticket.model, data.test_x, data.test_y) - whole)
        ctx.measure("subset-sum", step=eps, digits_width=sum(ticket.widths), digits_bound=ticket.bound)
    ctx.measure("subset-sum", digits_gap=min(gaps), density=tickets["subset-sum"][-1].density)
    last = tickets["subset-sum"][-1]
    spoilt_digits = _spoilt(ticket.model, ctx.generator("spoilt digits"))
    for arm, model in _spoilt(last.model, ctx.generator("spoilt")).items():
        ratios[arm] = _sup(model, toy, grid) / _EPS[-1]
        # Spoiling leaves every width as it is.
        found = ctx.accuracy(spoilt_digits[arm], data.test_x, data.test_y) - whole
        ctx.measure(arm, digits_gap=found, slope=slopes["subset-sum"])
    ratios["random features"] = _features_miss(ctx, toy, grid, sum(last.widths)) / _EPS[-1]
    for arm, ratio in ratios.items():
        ctx.measure(arm, worst_ratio=ratio)


def _toy(ctx: Ctx) -> nn.Sequential:
    """Train 2-8-1 on a product of sines."""
    with rng.scope("toy", ctx.seed_for("toy")):
        net, x = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.rand(2048, 2) * 2 - 1
        y = torch.sin(math.pi * x).prod(1, keepdim=True)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(ctx.scaled(500, 50)):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    return net


@torch.no_grad()
def _sup(one: nn.Module, two: nn.Module, x: Tensor) -> float:
    return float((one(x) - two(x)).abs().max())


@torch.no_grad()
def _spoilt(model: nn.Sequential, draw: torch.Generator) -> dict[str, nn.Module]:
    """Return the ticket with flipped signs, and the same random network under permuted masks."""
    flipped, permuted = copy.deepcopy(model), copy.deepcopy(model)
    for name, mask in masks.read(model).items():
        weight = flipped.get_parameter(name)
        weight.mul_(torch.randint(0, 2, weight.shape, generator=draw) * 2 - 1)
        order = torch.randperm(mask.numel(), generator=draw)
        other = permuted.get_parameter(name)
        scale = float(weight.abs().max())
        other.copy_((torch.rand(other.shape, generator=draw) * 2 - 1) * scale)
        masks.attach(permuted, {name: mask.flatten()[order].view_as(mask)})
    return {"signs flipped": flipped, "random mask": permuted}


def _features_miss(ctx: Ctx, toy: nn.Module, grid: Tensor, width: int) -> float:
    """Return the largest error of the best read-out of random neurons with unpruned weights."""
    draw = ctx.generator("features")
    inner = torch.rand(3, width, generator=draw, dtype=torch.float64) * 2 - 1
    ones = torch.ones(len(grid), 1, dtype=torch.float64)
    features = (torch.cat([grid.double(), ones], 1) @ inner).relu()
    features = torch.cat([features, ones], 1)
    with torch.no_grad():
        wanted = toy(grid).double()
    found = features @ torch.linalg.lstsq(features, wanted, driver="gelsd").solution
    return float((found - wanted).abs().max())
