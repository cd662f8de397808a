"""The geometry of a layer over binary factors: alignment with inputs and targets, and what generalises across them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import BadData
from nervure.core.class_moments import ClassMoments
from nervure.core.features import features, samples
from nervure.core.forward import tree_map
from nervure.core.modules import replace_modules
from nervure.core.readout import Readout
from nervure.core.similarity import cka
from nervure.inspect._geometry_trial import Committee, fit, latent_patterns
from nervure.spec import Card, Check, Ctx, claim

CARD = Card(
    id="tanh-relu-geometry",
    n=42,
    title="Task structure and nonlinearity jointly determine learned representational geometry",
    year=2024,
    link="https://openreview.net/forum?id=k9t8dQ30kU",
    family="inspect",
    summary=(
        "A hidden layer of tanh units takes the geometry of its targets, one of ReLU units keeps more of its inputs'. "
        "Alignment with both, decoding of factors that were and were not trained, decoding across conditions and "
        "parallel coding directions say where a layer stands."
    ),
    tags=("representation geometry", "tanh", "ReLU", "kernel alignment", "abstraction", "parallelism", "decoding"),
    provides=("representation_geometry", "LayerGeometry", "parallelism", "cross_condition", "with_activation"),
    claims=("tanh_takes_the_targets_geometry",),
    needs=("data",),
    deviations=(
        "The readout is a mean with fixed signs and the loss is squared; the paper's exact training is not known here.",
        "The convolutional network is not in the claim; an exclusive-or target stands beside it and is not pooled.",
    ),
    verified=(
        "Perfect hypercubes have parallelism and cross-condition accuracy of 1, random points of 0 and a half.",
        "Parallelism against a plain loop over conditions.",
    ),
)


@dataclass(frozen=True)
class LayerGeometry:
    """Hold the geometry of one layer over K binary factors.

    Args:
        input_alignment: Linear kernel alignment with the inputs; None where these are no single tensor of numbers.
        factor_alignment: Linear kernel alignment with each factor, K of them.
        decoding: Accuracy of a ridge readout of each factor, fitted on half the samples of each combination and
            asked on the others.
        cross_condition: Accuracy of each factor's readout under values of the other factors it was not fitted on;
            a half is chance.
        parallelism: Mean cosine between each factor's coding directions under all values of the others: 1 where the
            factor moves the layer the same way everywhere, 0 where the directions have nothing in common.
    """

    input_alignment: float | None
    factor_alignment: tuple[float, ...]
    decoding: tuple[float, ...]
    cross_condition: tuple[float, ...]
    parallelism: tuple[float, ...]


def representation_geometry(
    model: nn.Module, inputs: object, factors: Tensor, *, layers: Sequence[str]
) -> Mapping[str, LayerGeometry]:
    """Measure where the geometry of layers stands between that of the inputs and that of binary factors.

    Args:
        model: Any network; it runs once in eval mode.
        inputs: The inputs of N samples.
        factors: What the samples are, shape (N, K), K at least 2; two values a factor, and every combination occurs
            twice or more.
        layers: Names of modules whose outputs are measured.

    Returns:
        Layer -> its geometry.

    Raises:
        BadData: If factors are not binary, combinations are missing, or a layer has no row for each sample.

    Examples:
        >>> bits = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 2).repeat(20, 1)
        >>> found = representation_geometry(nn.Sequential(nn.Linear(2, 8)), bits, bits, layers=["0"])
        >>> [round(one, 3) for one in found["0"].parallelism]
        [1.0, 1.0]
    """
    bits = _bits(factors)
    seen = features(model, inputs, layers)
    found = {}
    for name in layers:
        rows = samples(seen[name]) if seen.get(name) else torch.empty(0)
        if len(rows) != len(bits):
            raise BadData(f"{name or 'the layer'} has no row for each sample", expected=len(bits), found=len(rows))
        plain = isinstance(inputs, Tensor) and inputs.is_floating_point()
        found[name] = LayerGeometry(
            cka(rows, tree_map(Tensor.double, inputs)) if plain else None,
            tuple(cka(rows, bits[:, k : k + 1].double()) for k in range(bits.shape[1])),
            tuple(_decoded(rows, bits, k) for k in range(bits.shape[1])),
            tuple(cross_condition(rows, bits, k) for k in range(bits.shape[1])),
            tuple(parallelism(rows, bits, k) for k in range(bits.shape[1])),
        )
    return found


def _bits(factors: Tensor) -> Tensor:
    """Return factors as 0 and 1.

    Raises:
        BadData: If they are no table of binary factors with every combination.
    """
    if factors.ndim != 2 or factors.shape[1] < 2:
        raise BadData("there are too few factors", expected="shape (N, K), K at least 2", found=tuple(factors.shape))
    if any(len(column.unique()) != 2 for column in factors.T):
        raise BadData("a factor is not binary", expected="two values in each column")
    bits = (factors == factors.amax(0)).long()
    counts = bits.unique(dim=0, return_counts=True)[1]
    if len(counts) != 2 ** bits.shape[1] or int(counts.min()) < 2:
        expected = f"{2 ** bits.shape[1]} of two samples or more"
        raise BadData("combinations of factors are missing", expected=expected, found=len(counts))
    return bits


def _decoded(rows: Tensor, bits: Tensor, factor: int) -> float:
    """Return the accuracy of a readout fitted on every other sample of each combination."""
    place, counts = torch.unique(bits, dim=0, return_inverse=True, return_counts=True)[1:]
    rank = torch.empty_like(place)
    ahead = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank[place.argsort(stable=True)] = torch.arange(len(place), device=place.device) - ahead
    known, labels = rank % 2 == 0, bits[:, factor]
    return Readout(rows[known], labels[known]).accuracy(rows[~known], labels[~known])


def cross_condition(rows: Tensor, bits: Tensor, factor: int) -> float:
    """Return the accuracy of a factor's ridge readout where another factor has the value it was not fitted on.

    Args:
        rows: Features, shape (N, F).
        bits: Factors of 0 and 1, shape (N, K).
        factor: Which one is decoded.

    Returns:
        The mean over the other factors and both values.
    """
    found = []
    for other, value in itertools.product(range(bits.shape[1]), (0, 1)):
        if other != factor:
            known = bits[:, other] == value
            found.append(Readout(rows[known], bits[known, factor]).accuracy(rows[~known], bits[~known, factor]))
    return sum(found) / len(found)


def parallelism(rows: Tensor, bits: Tensor, factor: int) -> float:
    """Return the mean cosine between the vectors by which a factor moves the mean, one for each value of the others.

    Args:
        rows: Features, shape (N, F).
        bits: Factors of 0 and 1, shape (N, K), every combination.
        factor: Which one is moved.

    Returns:
        Between -1 and 1.
    """
    count = bits.shape[1]
    order = [factor, *(k for k in range(count) if k != factor)]
    moments = ClassMoments()
    moments.update(rows, bits[:, order] @ (2 ** torch.arange(count - 1, -1, -1, device=bits.device)))
    low, high = moments.means.tensor_split(2)  # the factor is the first bit of the class
    moves = F.normalize(high - low)
    cosines = moves @ moves.T
    return float((cosines.sum() - cosines.trace()) / (len(moves) * (len(moves) - 1)))


def with_activation(model: nn.Module, old: type[nn.Module], new: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of a network with every activation of one kind swapped for another; weights stay.

    Args:
        model: The network, left as it is.
        old: The class of the modules that go.
        new: Makes what comes in their place.

    Returns:
        The copy, to be trained or measured.

    Examples:
        >>> with_activation(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.ReLU, nn.Tanh)[1]
        Tanh()
    """
    twin = copy.deepcopy(model)
    replace_modules(twin, lambda name, module: new() if isinstance(module, old) else None)
    return twin


def _first(bits: Tensor) -> Tensor:
    return bits[:, 0]


def _xor(bits: Tensor) -> Tensor:
    return bits[:, 0] * bits[:, 1]


@claim(
    CARD,
    checks=(
        Check(name="tanh is nearer to the target", method="tanh", control="relu", metric="target"),
        Check(name="tanh is farther from the input", method="tanh", control="relu", metric="input", better="lower"),
        Check(name="untrained factors decode worse from tanh", method="tanh", control="relu", metric="untrained",
              better="lower"),
    ),
    sabotage={"relu, other draw": "tanh"},
    seeds=20,
    minutes=5.0,
)  # fmt: skip
def tanh_takes_the_targets_geometry(ctx: Ctx) -> None:
    """On a linearly separable target the tanh layer is nearer to the target, the ReLU layer to the input.

    Sixteen latent patterns of four bits in 100 dimensions with noise 1, 200 hidden units, 3,000 steps of SGD on the
    first bit, measured on 2,000 new samples. Swapping both for the identity leaves no difference; the control is a
    second ReLU layer. The exclusive or of two bits stands beside it.
    """
    directions = ctx.seed_for("patterns")
    steps = ctx.scaled(3000, 200)
    for task, target in (("", _first), (", xor", _xor)):
        for arm, activation, weights in (
            ("tanh", nn.Tanh(), "weights"),
            ("relu", nn.ReLU(), "weights"),
            ("relu, other draw", nn.ReLU(), "other"),
            ("identity", nn.Identity(), "weights"),
        ):
            if task and arm not in ("tanh", "relu"):
                continue
            source = latent_patterns(64, torch.Generator().manual_seed(directions))
            model = fit(Committee(100, 200, activation, ctx.generator(weights)), source, target, steps=steps)
            parts = [source() for _ in range(32)]
            x, bits = (torch.cat(each)[:2000] for each in zip(*parts, strict=True))
            rows = model.activation(model.first(x)).detach()
            wanted = target(bits)
            ctx.measure(
                arm + task,
                target=cka(rows, wanted[:, None]),
                input=cka(rows, x),
                untrained=_decoded(rows, (bits > 0).long(), 3),
                error=float(F.mse_loss(model(x), wanted).detach()),
                agreement=float((model(x).sign() == wanted).double().mean()),
                parallelism=parallelism(rows, (bits > 0).long(), 0),
            )
