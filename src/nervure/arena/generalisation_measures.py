"""compare generalisation-measures: which number taken on the training data foretells the gap to the test data?"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from nervure.arena.contest import Contest, Trial
from nervure.core import rng
from nervure.core.lanczos import eigenpairs, trace
from nervure.core.operators import hessian
from nervure.data import Splits, load
from nervure.inspect.gradient_coherence import m_coherence

# Two of each but the noise, which changes the gap most: 24 networks.
AXES: dict[str, tuple[float, ...]] = {
    "width": (32, 128),
    "depth": (1, 2),
    "decay": (0.0, 0.03),
    "noise": (0.0, 0.2, 0.5),
}
STEPS, BATCH, LOOK = 500, 128, 256


@dataclass(frozen=True)
class Trained:
    """Hold a trained network, its start, and what it was trained on.

    Args:
        model: The network.
        start: The same before training.
        x: Training inputs, flat.
        y: Training labels, some of them wrong.
        gap: Training accuracy less test accuracy.
        place: Its hyper-parameters, in the order of `AXES`.
    """

    model: nn.Sequential
    start: nn.Sequential
    x: Tensor
    y: Tensor
    gap: float
    place: tuple[float, ...]


def _network(inputs: int, width: int, depth: int, classes: int, draw: int) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    with rng.scope("weights", draw):
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def _train(data: Splits, place: tuple[float, ...], trial: Trial, steps: int) -> Trained:
    width, depth, decay, noise = place
    x, y = data.train_x.flatten(1), data.train_y.clone()
    draw = torch.Generator().manual_seed(trial.seed_for("labels", noise))
    wrong = torch.randperm(len(y), generator=draw)[: int(noise * len(y))]
    y[wrong] = (y[wrong] + torch.randint(1, data.classes, (len(wrong),), generator=draw)) % data.classes
    model = _network(x.shape[1], int(width), int(depth), data.classes, trial.seed_for("weights", *place))
    start = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay, fused=True)
    for _ in range(steps):
        index = torch.randint(len(y), (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        seen = float((model(x).argmax(1) == y).double().mean())
        unseen = float((model(data.test_x.flatten(1)).argmax(1) == data.test_y).double().mean())
    return Trained(model, start, x, y, seen - unseen, place)


def _linears(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


@torch.no_grad()
def _path_norm(one: Trained) -> float:
    """Return the root of the sum over all paths of the product of squared weights."""
    flow = torch.ones(1, one.x.shape[1], dtype=torch.float64)
    for layer in _linears(one.model):
        flow = F.linear(flow, layer.weight.double().square())
    return float(flow.sum().sqrt())


@torch.no_grad()
def _margin(one: Trained) -> float:
    """Return minus the tenth percentile of the margin beside the length of the scores."""
    scores = one.model(one.x)
    own = scores.gather(1, one.y[:, None])[:, 0]
    others = scores.scatter(1, one.y[:, None], -torch.inf).amax(1)
    return -float(((own - others) / scores.norm(dim=1)).quantile(0.1))


@torch.no_grad()
def _pac_bayes(one: Trained) -> float:
    """Return |w - w0|^2 / s^2, s the noise in the weights that costs a tenth of the training accuracy."""
    draw = torch.Generator().manual_seed(0)
    base = _accuracy(one.model, one)
    noises = [[torch.randn(p.shape, generator=draw) for p in one.model.parameters()] for _ in range(3)]

    def lost(scale: float) -> float:
        found = 0.0
        for noise in noises:
            moved = copy.deepcopy(one.model)
            for value, step in zip(moved.parameters(), noise, strict=True):
                value.add_(scale * step)
            found += (base - _accuracy(moved, one)) / len(noises)
        return found

    low, high = 1e-4, 1.0
    for _ in range(10):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if lost(middle) < 0.1 else (low, middle)
    return _distance(one) ** 2 / low**2


def _accuracy(model: nn.Module, one: Trained) -> float:
    return float((model(one.x[:LOOK]).argmax(1) == one.y[:LOOK]).double().mean())


@torch.no_grad()
def _distance(one: Trained) -> float:
    pairs = zip(one.model.parameters(), one.start.parameters(), strict=True)
    return float(sum(float((now - before).double().square().sum()) for now, before in pairs)) ** 0.5


def _batch(one: Trained) -> tuple[Tensor, Tensor]:
    return one.x[:LOOK], one.y[:LOOK]


def _largest(one: Trained) -> float:
    operator = hessian(one.model, _batch(one), F.cross_entropy)
    return float(eigenpairs(operator, 1, which="largest", tolerance=1e-2, limit=40).values[0])


def _coherence(one: Trained) -> float:
    return -m_coherence(one.model, _batch(one)).whole.shared


def _loss(one: Trained) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(one.model(one.x), one.y))


# Each is turned so that more of it should mean a larger gap.
MEASURES: dict[str, tuple[Callable[[Trained], float], str]] = {
    "parameters": (lambda one: float(sum(p.numel() for p in one.model.parameters())), "their number"),
    "coherence": (_coherence, "less of a gradient shared by two examples (row of m-coherence)"),
    "Hessian trace": (
        lambda one: trace(hessian(one.model, _batch(one), F.cross_entropy), products=15).value,
        "Hutch++",
    ),
    "largest eigenvalue": (_largest, "of the Hessian, by Lanczos"),
    "path norm": (_path_norm, "root of the sum over paths of squared products"),
    "margin": (_margin, "less of the tenth percentile of the margin, scores of unit length"),
    "PAC-Bayes": (_pac_bayes, "squared distance from the start over the squared noise the network bears"),
    "distance": (_distance, "of the weights from their start"),
    "training loss": (_loss, "more of it"),
}


def granulated(values: list[float], gaps: list[float], places: list[tuple[float, ...]]) -> float:
    """Return the mean agreement in sign over pairs of networks that differ in one hyper-parameter, axis by axis.

    Args:
        values: Of a measure.
        gaps: Of the networks.
        places: Their hyper-parameters.

    Returns:
        From -1 to 1: the mean over the hyper-parameters of the mean over their pairs.

    Examples:
        >>> granulated([1, 2, 3, 4], [1, 2, 3, 4], [(0, 0), (0, 1), (1, 0), (1, 1)])
        1.0
    """
    found: dict[int, list[int]] = {}
    for (v, g, p), (w, h, q) in itertools.combinations(zip(values, gaps, places, strict=True), 2):
        axes = [axis for axis, (a, b) in enumerate(zip(p, q, strict=True)) if a != b]
        if len(axes) == 1:
            found.setdefault(axes[0], []).append(_sign(v - w) * _sign(g - h))
    means = [sum(signs) / len(signs) for signs in found.values()]
    return sum(means) / len(means)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def measure(trial: Trial) -> None:
    """Train all networks of one seed, and see which measure orders their gaps.

    Args:
        trial: Its case is the data set.
    """
    data = load(trial.case, seed=trial.seed, train=1000, test=700)
    places = list(itertools.product(*AXES.values()))
    steps = STEPS // (10 if trial.quick else 1)
    networks = []
    for number, place in enumerate(places):
        trial.progress(0.7 * number / len(places), f"network {number + 1} of {len(places)}, seed {trial.seed}")
        networks.append(_train(data, place, trial, steps))
    gaps = [one.gap for one in networks]
    quiet = [number for number, place in enumerate(places) if place[-1] == 0]

    def enter(name: str) -> dict[str, float]:
        began = time.process_time()
        values = [MEASURES[name][0](one) for one in networks]
        return {
            "tau": _tau(values, gaps),
            "granulated": granulated(values, gaps, places),
            "tau_clean": _tau([values[n] for n in quiet], [gaps[n] for n in quiet]),
            "ms": 1000 * (time.process_time() - began) / len(networks),
        }

    trial.each(enter)


def _tau(values: list[float], gaps: list[float]) -> float:
    """Return Kendall's tau-b; 0 where a measure is the same for all."""
    return float(kendalltau(values, gaps).statistic) if len(set(values)) > 1 else 0.0


CONTEST = Contest(
    name="generalisation-measures",
    title="Measures on the training data against the gap to the test data",
    metric="tau",
    better="higher",
    baselines=("parameters",),
    entrants={name: told for name, (_, told) in MEASURES.items()},
    cases={"digits": "1,000 images of 8 x 8", "fashion-mnist": "1,000 images of 28 x 28"},
    quick=("digits",),
    seeds=5,
    protocol="24 ReLU networks a seed: two widths, depths and weight decays, and 0, 20 or 50% of wrong labels; 500 "
    "steps of AdamW. Tau is Kendall's rank correlation of a measure, turned so that more of it should mean a larger "
    "gap, with the gap of accuracy between training labels and test data. Granulated averages the agreement in sign "
    "over pairs that differ in one hyper-parameter, so that none of them can carry a measure alone. Label noise "
    "changes the gap most, so the correlation over the eight networks of clean labels stands beside it. No measure "
    "can be tight for every distribution; effective complexity and intrinsic dimension train many networks each and "
    "are left out.",
    measure=measure,
    columns={"granulated": "granulated tau", "tau_clean": "tau, clean labels", "ms": "CPU ms a network"},
)
