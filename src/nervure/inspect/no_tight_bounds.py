"""No measure of sample and network can be tight everywhere: the usual ones for any classifier, and the floor."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from nervure._kit import BadData, UsageError
from nervure.core import rng
from nervure.core.forward import batch_size, predict
from nervure.core.graph import as_batches
from nervure.core.lanczos import eigenpairs
from nervure.core.operators import hessian
from nervure.core.persample import Loss
from nervure.core.vectors import select
from nervure.inspect._parity_worlds import Worlds, draw
from nervure.spec import Batch, Card, Check, Ctx, claim

CARD = Card(
    id="no-tight-bounds",
    n=286,
    title="Fantastic Generalization Measures are Nowhere to be Found",
    year=2024,
    link="https://arxiv.org/abs/2309.13658",
    family="inspect",
    summary=(
        "With more parameters than samples no bound that sees only the training set and the learned function can be "
        "near the true error for all learners and distributions: two worlds give the same sample and function, and "
        "different errors. A battery of the usual measures stands beside that floor."
    ),
    tags=("generalisation bounds", "margins", "norms", "sharpness", "PAC-Bayes", "parities", "impossibility"),
    provides=("generalisation_measures", "Measures", "rank_correlations", "tightness_floor"),
    protocol="diagnostic",
    claims=("nothing_beats_the_floor",),
    deviations=(
        "The two worlds of parities are our own witness in the spirit of the theorem; the paper's examples and "
        "constants may differ.",
        "The PAC-Bayes bound has its prior at zero, since the initial weights of a given network are not known; path "
        "norms, stability and m-coherence are not in the battery.",
    ),
    verified=(
        "The floor by enumerating every sample, parity and learner's draw of three bits.",
        "Margins, norms and the bound against their formulas on networks written out by hand.",
    ),
)


@dataclass(frozen=True)
class Measures:
    """Hold measures said to go with generalisation; each is larger where a network is said to generalise worse.

    Args:
        training_error: Share of wrong answers.
        norm: Sum of the squared parameters.
        negative_margin: Less the margin, the right logit's lead over the next, that a tenth of the samples stays under.
        norm_by_margin: Product of the matrices' spectral norms over that margin, in logarithm; None where the margin is
            not positive.
        sharpness: The Hessian's largest eigenvalue; None where it did not converge.
        inverse_noise: One over the squared deviation of Gaussian noise on all weights that costs a tenth of accuracy.
        pac_bayes: McAllester's bound on the error of the network with that noise, prior at zero, confidence 95%.
    """

    training_error: float
    norm: float
    negative_margin: float
    norm_by_margin: float | None
    sharpness: float | None
    inverse_noise: float
    pac_bayes: float


def generalisation_measures(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    loss: Loss = F.cross_entropy,
    parameters: Iterable[str] | None = None,
    draws: int = 5,
    seed: int = 0,
) -> Measures:
    """Compute the usual measures of a classifier on its training samples.

    None of them vouches for the true error: see `tightness_floor`, and `rank_correlations` for a set of models.

    Args:
        model: The classifier; batch normalisation must be in eval mode.
        batches: Training samples: one batch (inputs, classes) or a sequence of batches.
        loss: From (output, targets) of a batch to its mean loss.
        parameters: Names or prefixes; None takes all that require a gradient.
        draws: Draws of the noise, at least 1.
        seed: Draws the noise.

    Returns:
        The measures.

    Raises:
        UsageError: If there is no draw.
        BadData: If the targets are no classes.

    Examples:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(model.weight)
        >>> found = generalisation_measures(model, (4 * torch.eye(2), torch.arange(2)))
        >>> found.training_error, found.norm, found.negative_margin
        (0.0, 2.0, -4.0)
    """
    if draws < 1:
        raise UsageError("no noise is drawn", expected="at least 1", found=draws)
    every = as_batches(batches)
    logits = torch.cat([predict(model, inputs) for inputs, _ in every]).double()
    targets = torch.cat([classes for _, classes in every])
    if targets.is_floating_point() or logits.shape[:-1] != targets.shape or logits.shape[-1] < 2:
        raise BadData("the targets are no classes", expected=tuple(logits.shape[:-1]), found=tuple(targets.shape))
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    lead = own - logits.scatter(-1, targets.unsqueeze(-1), -math.inf).amax(-1)
    margin = float(lead.flatten().quantile(0.1))
    chosen = select(model, parameters)
    norm = float(sum(value.detach().double().square().sum() for value in chosen.values()))
    spectral = [
        float(torch.linalg.matrix_norm(value.detach().double().flatten(1), 2)) for value in chosen.values()
        if value.ndim > 1
    ]  # fmt: skip
    product = sum(math.log(max(value, 1e-300)) for value in spectral)
    top = eigenpairs(hessian(model, every, loss, parameters=parameters), 1, which="largest", tolerance=1e-2, limit=60)
    error = float((lead <= 0).double().mean())
    deviation, noisy = _tolerated(model, every, list(chosen), error, draws=draws, seed=seed)
    n = sum(batch_size(inputs) for inputs, _ in every)
    divergence = norm / (2 * deviation**2)
    return Measures(
        error,
        norm,
        -margin,
        product - math.log(margin) if margin > 0 else None,
        float(top.values[0]) if bool(top.converged[0]) else None,
        1 / deviation**2,
        noisy + math.sqrt((divergence + math.log(2 * math.sqrt(n) / 0.05)) / (2 * n)),
    )


def _tolerated(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], error: float, *, draws: int, seed: int
) -> tuple[float, float]:
    """Return the largest deviation of noise that costs at most a tenth of accuracy, and the error under it."""
    twin = copy.deepcopy(model)
    chosen = select(twin, names)
    source = rng.generator("noise", seed)
    before = {name: value.detach().clone() for name, value in chosen.items()}
    noise = [
        {name: torch.randn(value.shape, generator=source).to(value) for name, value in before.items()}
        for _ in range(draws)
    ]

    @torch.no_grad()
    def wrong(deviation: float) -> float:
        found = []
        for each in noise:
            for name, value in chosen.items():
                value.copy_(before[name] + deviation * each[name])
            found += [(predict(twin, x).argmax(-1) != y).double().flatten() for x, y in batches]
        return float(torch.cat(found).mean())

    # In units of the weights' root mean square, so that scaled networks tolerate scaled noise.
    count = sum(value.numel() for value in before.values())
    unit = math.sqrt(float(sum(value.double().square().sum() for value in before.values())) / count) or 1.0
    low, high, cost = 1e-4 * unit, 10.0 * unit, error
    for _ in range(10):
        middle = math.sqrt(low * high)
        now = wrong(middle)
        low, high, cost = (middle, high, now) if now <= error + 0.1 else (low, middle, cost)
    return low, cost


def rank_correlations(measures: Sequence[Measures], gaps: Sequence[float]) -> Mapping[str, float]:
    """Return Kendall's tau of every measure with the generalisation gap, over a set of models.

    Args:
        measures: Of each model, two or more.
        gaps: Test less training error of each, or any other quantity.

    Returns:
        Measure -> tau; NaN where the measure is the same for all, or unknown for one.

    Raises:
        BadData: If there are fewer than two models or the numbers differ.
    """
    if len(measures) != len(gaps) or len(gaps) < 2:
        raise BadData("no ranks to compare", expected="as many gaps as models, at least 2", found=len(gaps))
    rows = [asdict(one) for one in measures]

    def tau(name: str) -> float:
        values = [row[name] for row in rows]
        if any(value is None for value in values):
            return math.nan
        return float(scipy.stats.kendalltau(values, gaps).statistic)

    return {name: tau(name) for name in rows[0]}


def tightness_floor(bits: int, samples: int) -> float:
    """Return what any estimate of the error from sample and hypothesis must err by on average: (1 - 2^(n-d)) / 4.

    The world is a fair mixture over parities of d bits, n independent constraints: in one half the learner outputs the
    true parity, in the other a random one that fits, and sample and hypothesis have one law in both.

    Args:
        bits: d, at least 1.
        samples: n, at least 0; from d on the parity is known.

    Returns:
        The floor.

    Raises:
        UsageError: If a number is out of range.

    Examples:
        >>> tightness_floor(12, 8)
        0.234375
    """
    if bits < 1 or samples < 0:
        raise UsageError("no such world", expected="bits >= 1, samples >= 0", found=(bits, samples))
    return 0.25 * (1 - 2.0 ** min(0, samples - bits))


_SIZES = (4, 8, 12, 22)


@claim(
    CARD,
    checks=(
        Check.at_least("a trained estimator keeps to the floor at n = 4", method="trained", metric="over_floor_4",
                       bound=0.9),
        Check.at_least("and at n = 8", method="trained", metric="over_floor_8", bound=0.9),
        Check.at_least("so does the best of the measures", method="measures", metric="over_floor_8", bound=0.9),
        Check.at_most("one that sees test samples does not", method="test samples", metric="over_floor_8", bound=0.5),
        Check.at_most("with ten samples over the bits it is exact", method="trained", metric="error_22", bound=0.01),
        Check.at_most("the worlds cannot be told apart", method="told apart", metric="auc", bound=0.55),
    ),
    sabotage={"test samples": "trained"},
    seeds=5,
    minutes=2.0,
)  # fmt: skip
def nothing_beats_the_floor(ctx: Ctx) -> None:
    """With fewer samples than bits no estimator of the error from sample and hypothesis errs by less than the floor.

    Parities of 12 bits, 4 to 22 samples, 2000 draws to train on and 2000 to judge by. Boosted trees see the sample,
    the hypothesis and the measures; each measure alone is calibrated as well as any function of it can be. The control
    sees 20 more labelled points. Over the floor is the mean absolute error over that of the enumerated optimum.
    """
    # Only the claim needs these, and importing them draws from Python's global generator.
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import roc_auc_score

    count, bits = ctx.scaled(2000, 300), 12
    for place, samples in enumerate(_SIZES):
        train, test = (draw(count, bits=bits, samples=samples, source=ctx.generator(part, samples)) for part in "ab")
        floor, truth = test.floor, test.error.numpy()
        ctx.measure("floor", **{f"enumerated_{samples}": floor, f"formula_{samples}": tightness_floor(bits, samples)})
        seed = ctx.seed_for("trees") % 2**31
        trees = HistGradientBoostingRegressor(loss="absolute_error", random_state=seed)
        guesses = {"trained": trees.fit(_seen(train), train.error.numpy()).predict(_seen(test))}
        guesses["test samples"] = _checked(test, ctx.generator("more", samples))
        single = [_calibrated(a, train.error.numpy(), b) for a, b in zip(_usual(train).T, _usual(test).T, strict=True)]
        guesses["measures"] = min(single, key=lambda guess: float(np.abs(guess - truth).mean()))
        for arm, guess in guesses.items():
            error = float(np.abs(guess - truth).mean())
            ctx.measure(arm, **{f"error_{samples}": error})
            if floor > 0.01:
                ctx.measure(arm, **{f"over_floor_{samples}": error / floor})
        if samples == 8:
            judge = HistGradientBoostingClassifier(random_state=seed).fit(_seen(train), train.second.numpy())
            ctx.measure("told apart", auc=roc_auc_score(test.second.numpy(), judge.predict_proba(_seen(test))[:, 1]))
        ctx.progress(place + 1, len(_SIZES), f"{samples} samples")


def _usual(worlds: Worlds) -> np.ndarray:
    """Return what measures there are of a parity: training error, weight, and how many others fit."""
    answers = (worlds.x * worlds.hypothesis.unsqueeze(1)).sum(2) % 2
    wrong = (answers != worlds.y).double().mean(1)
    return torch.stack([wrong, worlds.hypothesis.sum(1).double(), worlds.fitting.double().log2()], 1).numpy()


def _seen(worlds: Worlds) -> np.ndarray:
    """Return everything an admissible estimator may see."""
    parts = [worlds.x.flatten(1), worlds.y, worlds.hypothesis]
    return np.concatenate([torch.cat(parts, 1).numpy(), _usual(worlds)], 1)


def _calibrated(known: np.ndarray, errors: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the median error of the training draws that share a measure's value; that of all where there is none."""
    table = {value: float(np.median(errors[known == value])) for value in np.unique(known)}
    return np.array([table.get(value, float(np.median(errors))) for value in asked])


def _checked(worlds: Worlds, source: torch.Generator) -> np.ndarray:
    """Return 1/2 where the hypothesis is wrong on one of 20 more points, else 0."""
    x = torch.randint(0, 2, (len(worlds.x), 20, worlds.x.shape[2]), generator=source)
    answers = [(x * parity.unsqueeze(1)).sum(2) % 2 for parity in (worlds.hypothesis, worlds.truth)]
    return 0.5 * (answers[0] != answers[1]).any(1).double().numpy()
