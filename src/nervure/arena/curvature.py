"""compare curvature: estimators of eigenvalues, trace and density against the exact spectrum, at equal cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure import zoo
from nervure.arena.contest import Contest, Trial
from nervure.core import rng
from nervure.core.forward import mode
from nervure.core.lanczos import eigenpairs, exact_density, spectral_density, trace
from nervure.core.operators import Operator, hessian
from nervure.learn.loop import cross_entropy

K = 5
# A Hessian product costs about two gradients: two backward passes through a graph that is kept.
PER_PRODUCT = 2


@dataclass(frozen=True)
class Truth:
    """Hold a trained network's Hessian and its exact spectrum."""

    operator: Operator
    values: Tensor


def _tanh_mlp(draw: int) -> nn.Module:
    with rng.scope("weights", draw):
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def _problem(case: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network briefly trained on Gaussian clusters or the zoo's own batch, in eval mode and float64."""
    draw = torch.Generator().manual_seed(seed)
    if case == "tanh-mlp":
        model, y = _tanh_mlp(seed), torch.randint(8, (256,), generator=draw)
        centres = 2 * torch.randn(8, 8, generator=draw)
        x = centres[y] + torch.randn(256, 8, generator=draw)
    else:
        made = zoo.case(case)
        model = made.model(seed=seed)
        x, y = made.batch(32, seed=seed)
    model = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y


_last: dict[tuple[str, int], Truth] = {}


def _truth(model_name: str, seed: int) -> Truth:
    """Return the exact spectrum; a process keeps the last, which several budgets in a row need."""
    if (model_name, seed) not in _last:
        model, x, y = _problem(model_name, seed)
        with mode(model, train=False):
            operator = hessian(model, (x, y), cross_entropy, parameters=_some(model))
            values = torch.linalg.eigvalsh(operator.dense())
        _last.clear()
        _last[model_name, seed] = Truth(operator, values)
    return _last[model_name, seed]


def _some(model: nn.Module, most: int = 600) -> list[str] | None:
    """Name parameters from the end of the network, at most so many entries: the exact spectrum takes their cube."""
    chosen: list[str] = []
    total = 0
    for name, value in reversed(list(model.named_parameters())):
        if total + value.numel() > most:
            break
        chosen, total = [*chosen, name], total + value.numel()
    return chosen or None


def _lanczos(operator: Operator, products: int, seed: int) -> Tensor:
    found = eigenpairs(operator, min(K, operator.size), tolerance=1e-6, limit=max(K, products), seed=seed)
    return found.values


def _deflation(operator: Operator, products: int, seed: int) -> Tensor:
    """Power iteration one eigenvector after another, the usual peer's way."""
    draw = torch.Generator().manual_seed(seed)
    known: list[Tensor] = []
    values = []
    for _ in range(K):
        v = F.normalize(torch.randn(operator.size, generator=draw, dtype=operator.dtype), dim=0)
        value = torch.zeros(())
        for _ in range(max(1, products // K)):
            for one in known:
                v = v - (one @ v) * one
            v = F.normalize(v, dim=0)
            image = operator @ v
            value, v = v @ image, image
        known.append(F.normalize(v, dim=0))
        values.append(value)
    return torch.stack(values)


def _subspace(operator: Operator, products: int, seed: int) -> Tensor:
    """Iterate a random subspace of five dimensions, then Rayleigh and Ritz."""
    draw = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(operator.size, K, generator=draw, dtype=operator.dtype))[0]
    for _ in range(max(1, products // K - 1)):
        Q = torch.linalg.qr(operator @ Q)[0]
    small = Q.T @ (operator @ Q)
    values = torch.linalg.eigvalsh((small + small.T) / 2)
    return values[values.abs().argsort(descending=True)]


EIGENVALUES: dict[str, Callable[[Operator, int, int], Tensor]] = {
    "block Lanczos": _lanczos,
    "power iteration": _deflation,
    "subspace iteration": _subspace,
}
TRACES = {"Hutch++": "hutch++", "Hutchinson": "hutchinson"}
DENSITIES = {"Lanczos quadrature, 2 probes": 2, "Lanczos quadrature, 8 probes": 8}


def measure(trial: Trial) -> None:
    """Measure every estimator of one quantity at one budget.

    Args:
        trial: Its case is "quantity, model, budget".
    """
    quantity, model_name, budget = trial.case.split(", ")
    products = int(budget.split()[0]) // PER_PRODUCT
    truth = _truth(model_name, trial.seed)
    order = truth.values[truth.values.abs().argsort(descending=True)]
    scale = float(order[0].abs())

    def enter(name: str) -> dict[str, float] | None:
        seed, before, began = trial.seed_for(name), truth.operator.products, time.process_time()
        if quantity == "eigenvalues" and name in EIGENVALUES:
            found = EIGENVALUES[name](truth.operator, products, seed)
            error = float((found[:K] - order[: len(found[:K])]).abs().max()) / scale
        elif quantity == "trace" and name in TRACES:
            estimate = trace(truth.operator, products=max(6, products), method=TRACES[name], seed=seed)  # type: ignore[arg-type]
            error = abs(estimate.value - float(truth.values.sum())) / float(truth.values.abs().sum())
        elif quantity == "density" and name in DENSITIES:
            probes = DENSITIES[name]
            made = spectral_density(truth.operator, probes=probes, steps=max(1, products // probes), seed=seed)
            exact = exact_density(truth.values, made.grid, made.width)
            error = float(torch.trapezoid((made.values - exact).abs(), made.grid))
        else:
            return None
        spent = truth.operator.products - before
        return {"error": error, "gradients": PER_PRODUCT * spent, "seconds": time.process_time() - began}

    trial.each(enter)


_MODELS = ("tanh-mlp", "residual-conv", "pre-activation", "encoder")
_BUDGETS = (50, 200, 1000)

CONTEST = Contest(
    name="curvature",
    title="Estimators of curvature against the exact spectrum",
    metric="error",
    better="lower",
    baselines=("power iteration", "Hutchinson", "Lanczos quadrature, 2 probes"),
    entrants={
        "block Lanczos": "full reorthogonalisation and a residual test (nervure.core.lanczos)",
        "power iteration": "one eigenvector after another by deflation",
        "subspace iteration": "five random vectors at once, Rayleigh and Ritz at the end",
        **dict.fromkeys(TRACES, "trace by random signs"),
        **dict.fromkeys(DENSITIES, "density by stochastic Lanczos quadrature"),
    },
    cases={
        f"{quantity}, {model}, {budget} gradients": f"{quantity} of {model} within {budget} gradients"
        for quantity in ("eigenvalues", "trace", "density")
        for model in _MODELS
        for budget in _BUDGETS
    },
    quick=("eigenvalues, tanh-mlp, 200 gradients", "trace, tanh-mlp, 200 gradients"),
    seeds=5,
    protocol="Every estimator gets the same trained network, batch and number of gradient-equivalents, a Hessian "
    "product counting two. Truth is the dense Hessian of at most 600 parameters from the output back, in float64. "
    "The error is the largest of the five leading eigenvalues beside the first, that of the trace beside the sum of "
    "magnitudes, and the L1 distance of the densities.",
    measure=measure,
    columns={"gradients": "gradient-equivalents spent", "seconds": "CPU seconds"},
)
