"""Quality of convolution filters from the weights alone: dead kernels, few patterns, kernels no better than noise."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nervure._kit import BadModel, Unsupported
from nervure.inspect._filter_trial import Narrow, fit, pooled, random_kernels, shuffled_kernels
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="cnn-filter-quality",
    n=189,
    title="CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
    year=2022,
    link="https://arxiv.org/abs/2203.15331",
    family="inspect",
    summary=(
        "Three numbers of a layer's k x k kernels tell a degenerate layer without any data: the share of kernels that "
        "are nearly zero, the entropy of the kernels' principal variances (few patterns, or as many as noise has), and "
        "the orthogonality of its filters. Histograms over principal components measure how two networks differ."
    ),
    tags=("convolution", "filters", "weights", "degeneration", "entropy", "audit", "distribution shift"),
    provides=("filter_quality", "FilterQuality", "filter_shift"),
    protocol="diagnostic",
    claims=("measures_tell_layers_apart",),
    needs=("data", "labels"),
    deviations=(
        "Kernels of any size and dimension; above which entropy a layer looks random is the paper's curve for nine "
        "entries, and the lowest twentieth of random draws for any other number.",
        "The paper's collection of hundreds of networks is not used: only networks trained here.",
        "The constants of the curve were taken from public code; a Monte Carlo test holds them to their meaning.",
        "The claim's images have 14 x 14 pixels and the wide network is trained on 3,000 of them.",
    ),
    verified=(
        "Entropy and sparsity against numpy's SVD in float64; the curve against random Gaussian kernels.",
        "The divergence of two Gaussians' histograms against its closed form.",
    ),
)

_FEW = math.log10(2)


@dataclass(frozen=True)
class LayerQuality:
    """Hold the numbers of one layer.

    Args:
        kernels: Number of k x k kernels: output times input channels within their groups.
        entries: Entries of a kernel, such as 9.
        sparsity: Share of kernels whose entries are all below 1% of the layer's largest.
        entropy: Entropy to base 10 of the shares of variance along the kernels' principal components, between 0 and
            log10(entries).
        random_above: The entropy above which a layer of as many kernels looks random.
        orthogonality: One less the mean |cosine| between the layer's filters; 1 where there is one filter.
    """

    kernels: int
    entries: int
    sparsity: float
    entropy: float
    random_above: float
    orthogonality: float

    @property
    def kind(self) -> str:
        """Return "dead" (half the kernels or more), "few patterns" (under two), "random" or "structured".

        Below 64 kernels the entropy of random kernels spreads too far to be told from others: "too few kernels".
        """
        if self.sparsity >= 0.5:
            return "dead"
        if self.entropy < _FEW:
            return "few patterns"
        if self.kernels < 64:
            return "too few kernels"
        return "random" if self.entropy > self.random_above else "structured"


@dataclass(frozen=True)
class FilterQuality:
    """Report the quality of every layer of kernels.

    Args:
        layers: Module -> its numbers, in the model's order.
    """

    layers: Mapping[str, LayerQuality]

    @property
    def verdict(self) -> str:
        """Return "ok", "warn" where a layer is dead, random or of few patterns, "cannot tell" if all are too small."""
        kinds = {one.kind for one in self.layers.values()}
        if kinds & {"dead", "few patterns", "random"}:
            return "warn"
        return "ok" if "structured" in kinds else "cannot tell"


def filter_quality(model: nn.Module, batch: Batch | None = None, *, seed: int = 0) -> FilterQuality:
    """Measure the kernels of every convolution larger than one entry, from the weights alone.

    With the n kernels as rows, centred, and s their singular values, p_i = s_i^2 / sum s^2 and the entropy is
    -sum p_i log10 p_i.

    Args:
        model: The model, in any mode.
        batch: Not looked at.
        seed: Without effect.

    Returns:
        The report.

    Raises:
        Unsupported: If the model has no such convolution.
        BadModel: If a weight is not finite.

    Examples:
        >>> layer = nn.Conv2d(16, 16, 3)
        >>> filter_quality(layer).layers[""].kernels
        256
    """
    found = {name: _quality(name, weight) for name, weight in _kernels(model).items()}
    if not found:
        raise Unsupported("filter_quality", model, why="it has no convolution with kernels larger than one entry")
    return FilterQuality(found)


def _kernels(model: nn.Module) -> dict[str, Tensor]:
    """Return name of module -> filters, shape (out, in, entries); transposed ones are turned round."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.weight[0, 0].numel() > 1:
            if id(module.weight) in seen or isinstance(module.weight, nn.UninitializedParameter):
                continue
            seen.add(id(module.weight))
            weight = module.weight.detach().double().flatten(2)
            found[name] = weight.transpose(0, 1) if module.transposed else weight
    return found


def _quality(name: str, weight: Tensor) -> LayerQuality:
    if not bool(weight.isfinite().all()):
        raise BadModel(f"the weight of {name or 'the layer'} is not finite", found="NaN or infinity")
    kernels = weight.flatten(0, 1)
    count, entries = kernels.shape
    largest = kernels.abs().max()
    dead = (kernels.abs().amax(1) <= 0.01 * largest).double().mean()
    return LayerQuality(
        kernels=count,
        entries=entries,
        sparsity=float(dead),
        entropy=entropy(kernels),
        random_above=random_above(count, entries),
        orthogonality=_orthogonality(weight.flatten(1)),
    )


def entropy(kernels: Tensor) -> float:
    """Return the entropy to base 10 of the variances along the principal components; 0 where nothing varies.

    Args:
        kernels: Shape (n, entries).

    Returns:
        Between 0 and log10(entries).
    """
    centred = kernels - kernels.mean(0)
    power = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    if not float(power.sum()) > 0:
        return 0.0
    p = power / power.sum()
    return float(-torch.special.xlogy(p, p).sum() / math.log(10)) + 0.0


@functools.lru_cache(maxsize=256)
def random_above(kernels: int, entries: int) -> float:
    """Return the entropy that 95 of 100 layers of independent Gaussian kernels exceed.

    Args:
        kernels: Number of kernels.
        entries: Entries of a kernel; for nine the paper's fitted curve is used.

    Returns:
        The threshold; from 4,096 kernels on it hardly changes and is that of 4,096.
    """
    if entries == 9:
        return 1.2618 / (1 + math.exp(-0.8877 * (math.log2(kernels) - 2.3044))) - 0.3105
    draw = torch.Generator().manual_seed(0)
    shape = (100, min(kernels, 4096), entries)
    drawn = [entropy(torch.randn(shape[1:], generator=draw, dtype=torch.float64)) for _ in range(shape[0])]
    return float(torch.tensor(drawn, dtype=torch.float64).quantile(0.05))


def _orthogonality(filters: Tensor) -> float:
    if len(filters) < 2:
        return 1.0
    rows = nn.functional.normalize(filters)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    return 1 - float(cosines.sum()) / (len(rows) * (len(rows) - 1))


def filter_shift(first: Tensor, second: Tensor, *, bins: int = 70) -> float:
    """Return how far two collections of kernels differ: symmetric KL of histograms over principal components.

    Both are projected on the principal components of their union; the divergences are weighted by the share of
    variance each component explains.

    Args:
        first: Kernels, shape (n, entries).
        second: Others, shape (m, entries).
        bins: Bins of a histogram over the common range.

    Returns:
        0 for equal collections.

    Raises:
        BadModel: If the kernels differ in size.
    """
    if first.ndim != 2 or first.shape[1:] != second.shape[1:]:
        raise BadModel("the kernels differ in size", expected=tuple(first.shape[1:]), found=tuple(second.shape[1:]))
    both = torch.cat([first, second]).double()
    both = both - both.mean(0)
    scale, components = torch.linalg.svd(both, full_matrices=False)[1:]
    weights = scale.square() / scale.square().sum()
    shares = both @ components.T
    return sum(
        float(weight) * _divergence(column[: len(first)], column[len(first) :], bins)
        for weight, column in zip(weights, shares.T, strict=True)
    )


def _divergence(first: Tensor, second: Tensor, bins: int) -> float:
    low, high = float(min(first.min(), second.min())), float(max(first.max(), second.max()))
    p, q = (
        # One count in every bin keeps the divergence of an empty bin finite.
        (counts + 1) / (counts + 1).sum()
        for counts in (torch.histc(one, bins, low, high) for one in (first, second))
    )
    return float(((p - q) * (p / q).log()).sum())


@claim(
    CARD,
    checks=(
        Check.at_least("random kernels look random", method="random kernels", metric="random", bound=0.95),
        Check.at_least("no trained layer looks random", method="trained", metric="below_threshold", bound=0.0),
        Check.at_least("three times as many dead kernels", method="wide", metric="times_narrow", bound=3.0),
        Check.at_most("repeated kernels have few patterns", method="repeated kernels", metric="entropy", bound=_FEW),
    ),
    sabotage={"untrained": "trained", "shuffled weights": "trained"},
    seeds=5,
    minutes=4.0,
    data=("fashion-mnist",),
)
def measures_tell_layers_apart(ctx: Ctx) -> None:
    """Entropy tells trained layers from random ones, and sparsity a layer that is too wide from one that is not.

    Convolutions of 16, 32 and 64 channels on 14 x 14 Fashion-MNIST, SGD with momentum 0.9 and rate 0.05: untrained,
    after 3 and 15 epochs of 6,000 images, with weight decay 0.01, and eight times wider with weight decay for 8 epochs
    of 3,000. Below the threshold is the least over the layers of 64 kernels or more of T(n) less the entropy. The
    controls are the untrained network, and the trained one with its weights shuffled within each layer.
    """
    ctx.measure("random kernels", random=random_kernels(ctx.generator("random"), entropy, random_above))
    data = ctx.data("fashion-mnist", train=6000, test=1000)
    x, y, test = pooled(data.train_x), data.train_y, pooled(data.test_x)
    long, short = ctx.scaled((3, 15), (1, 2)), ctx.scaled(8, 1)

    def told(arm: str, model: nn.Module) -> float:
        layers = filter_quality(model).layers.values()
        gaps = [one.random_above - one.entropy for one in layers if one.kernels >= 64]
        count = sum(one.kernels for one in layers)
        dead = sum(one.sparsity * one.kernels for one in layers)
        ctx.measure(
            arm, below_threshold=min(gaps), sparsity=dead / count, accuracy=ctx.accuracy(model, test, data.test_y)
        )
        return max(dead, 1.0) / count

    model = Narrow(1, ctx.generator("weights"))
    told("untrained", model)
    fit(ctx, model, x, y, epochs=long[0])
    told("three epochs", model)
    fit(ctx, model, x, y, epochs=long[1] - long[0])
    told("trained", model)
    told("shuffled weights", shuffled_kernels(copy.deepcopy(model), ctx.generator("shuffle")))
    repeated = copy.deepcopy(model)
    repeated.conv3.weight.data[:] = repeated.conv3.weight.data[:1, :1]
    ctx.measure("repeated kernels", entropy=filter_quality(repeated).layers["conv3"].entropy)
    narrow = told("narrow", fit(ctx, Narrow(1, ctx.generator("weights")), x[:3000], y[:3000], epochs=short, decay=0.01))
    wide = told("wide", fit(ctx, Narrow(8, ctx.generator("wide")), x[:3000], y[:3000], epochs=short, decay=0.01))
    ctx.measure("wide", times_narrow=wide / narrow)
