"""compare similarity: measures of likeness between representations, on pairs whose order is known."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nervure.arena.contest import Contest, Trial
from nervure.core.calibration import separation
from nervure.core.similarity import canonical_correlations, cka, pwcca, rbf_cka, svcca

SAMPLES, WIDTH, DRAWS = 200, 20, 12

Measure = Callable[[Tensor, Tensor], float]


def _distances(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of all distances between samples: representational similarity analysis."""
    from scipy.stats import spearmanr

    return float(spearmanr(torch.pdist(x.double()).numpy(), torch.pdist(y.double()).numpy()).statistic)


def _units(x: Tensor, y: Tensor) -> float:
    """Return the mean correlation of units matched one to one."""
    from scipy.optimize import linear_sum_assignment

    a, b = ((one - one.mean(0)) / one.std(0, correction=0).clamp_min(1e-12) for one in (x.double(), y.double()))
    alike = (a.T @ b / len(a)).abs().numpy()
    rows, columns = linear_sum_assignment(-alike)
    return float(alike[rows, columns].mean())


MEASURES: dict[str, tuple[Measure, str]] = {
    "CKA": (cka, "linear centred kernel alignment, the biased estimate"),
    "CKA, unbiased": (lambda x, y: cka(x, y, estimator="unbiased"), "the same without the bias of few samples"),
    "CKA, RBF": (rbf_cka, "with a Gaussian kernel of half the median distance"),
    "CCA": (lambda x, y: float(canonical_correlations(x, y).mean()), "mean canonical correlation"),
    "SVCCA": (svcca, "CCA of the parts that hold 99% of the variance"),
    "PWCCA": (pwcca, "CCA weighted by what the variates explain"),
    "matched units": (_units, "mean correlation of units matched one to one"),
    "RSA": (_distances, "rank correlation of the distances between samples"),
}


def _base(draw: torch.Generator, samples: int) -> Tensor:
    """Draw a representation: four clusters, features whose scales fall tenfold."""
    centres = 2 * torch.randn(4, WIDTH, generator=draw, dtype=torch.float64)
    x = centres[torch.randint(4, (samples,), generator=draw)]
    x = x + torch.randn(samples, WIDTH, generator=draw, dtype=torch.float64)
    return x * torch.logspace(0, -1, WIDTH, dtype=torch.float64)


def _noisy(x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Return x with noise of so many times its features' deviations."""
    return x + share * x.std(0) * torch.randn(x.shape, generator=draw, dtype=x.dtype)


def _rotation(draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64))[0]


def _transformed(case: str, x: Tensor, draw: torch.Generator) -> Tensor:
    """Return what carries the same information as x, in the case's way."""
    if case == "permuted":
        return x[:, torch.randperm(WIDTH, generator=draw)]
    if case == "rotated":
        return x @ _rotation(draw)
    if case == "rescaled":
        return 7 * x + 3
    if case == "scaled by unit":
        return x * torch.exp(torch.randn(WIDTH, generator=draw, dtype=torch.float64))
    # An invertible map of condition number 10.
    return x @ _rotation(draw) @ torch.diag(torch.logspace(0, -1, WIDTH, dtype=torch.float64)) @ _rotation(draw)


INVARIANCES = ("permuted", "rotated", "rescaled", "scaled by unit", "mapped linearly")
ORDERS = ("less noise", "more shared", "related, few samples")


def _pair(case: str, x: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what should be more like x, and what less."""
    if case in INVARIANCES:
        return _transformed(case, x, draw), _noisy(x, 0.3, draw)
    if case == "less noise":
        return _noisy(x, 0.5, draw), _noisy(x, 0.7, draw)
    other = _base(draw, len(x))
    if case == "more shared":
        half, third = WIDTH // 2, WIDTH // 3
        order = torch.randperm(WIDTH, generator=draw)
        return tuple(
            torch.cat([x[:, order[:kept]], other[:, order[kept:]]], 1) @ _rotation(draw) for kept in (half, third)
        )  # type: ignore[return-value]
    return _noisy(x, 1.0, draw), other


def measure(trial: Trial) -> None:
    """Let every measure order pairs, and count how often it does it right over all draws.

    Args:
        trial: One case.
    """
    draw = torch.Generator().manual_seed(trial.seed_for("pairs"))
    samples = WIDTH + 10 if trial.case == "related, few samples" else SAMPLES
    pairs = []
    for _ in range(DRAWS):
        x = _base(draw, samples)
        pairs.append((x, *_pair(trial.case, x, draw)))

    def enter(name: str) -> dict[str, float]:
        began = time.process_time()
        like = torch.tensor([MEASURES[name][0](x, more) for x, more, _ in pairs])
        unlike = torch.tensor([MEASURES[name][0](x, less) for x, _, less in pairs])
        spent = (time.process_time() - began) / (2 * DRAWS)
        return {
            "auc": separation(unlike, like),
            "like": float(like.mean()),
            "unlike": float(unlike.mean()),
            "ms": 1000 * spent,
        }

    trial.each(enter)


CONTEST = Contest(
    name="similarity",
    title="Measures of similarity between representations, on pairs whose order is known",
    metric="auc",
    better="higher",
    baselines=("CKA",),
    entrants={name: told for name, (_, told) in MEASURES.items()},
    cases={
        **{case: f"x {case} must be more like x than x with 30% noise is" for case in INVARIANCES},
        "less noise": "50% of noise against 70%",
        "more shared": "half of the features shared against a third, rotated",
        "related, few samples": "noise as large as x against an independent draw, 30 samples of 20 features",
    },
    quick=("rotated", "less noise"),
    seeds=5,
    protocol=f"All measures see the same {DRAWS} draws a seed: {SAMPLES} samples of {WIDTH} features in four "
    "clusters, of scales that fall tenfold. The area under the curve is the chance that a pair that is more alike "
    "scores higher than one that is less; 0.5 is chance. Whether a scale of single units or an invertible map should "
    "count as the same is a choice: the cases show what a measure takes for the same, not that it is right.",
    measure=measure,
    columns={"like": "value, more alike", "unlike": "value, less alike", "ms": "CPU ms a pair"},
)
