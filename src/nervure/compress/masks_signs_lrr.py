"""Masks, signs and learning-rate rewinding: keep the learnt weights and restart the learning rate alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nervure.compress.claim_task import ClaimTask
from nervure.compress.recipe import Pruned, Recipe, restore, snapshot
from nervure.core import allocate, masks, modules
from nervure.spec import Budget, Card, Check, Ctx, Task, claim

CARD = Card(
    id="masks-signs-lrr",
    n=277,
    title="Masks, Signs, And Learning Rate Rewinding",
    year=2024,
    link="https://arxiv.org/abs/2402.19262",
    family="compress",
    summary=(
        "Learning-rate rewinding prunes like the lottery ticket but goes on from the learnt weights and restarts only "
        "the learning-rate schedule. It keeps the signs that the denser network learnt: a single hidden neuron shows "
        "that a wrong initial sign can be corrected while there are many inputs and never once one is left."
    ),
    tags=("pruning", "sparsity", "rewinding", "sign flips", "LRR", "lottery ticket"),
    provides=("LearningRateRewinding", "sign_flips", "neuron_flow"),
    protocol="pruner",
    entrants={"lr-rewinding": "LearningRateRewinding"},
    claims=("single_neuron", "rewinding_the_rate"),
    needs=("data", "labels", "grad", "trainer"),
    deviations=(
        "The single neuron follows the gradient flow of the population loss for Gaussian inputs, in Euler steps.",
        "First runs of the neuron's claim let pruned inputs regrow and rounding revive dead neurons; both were mended.",
        "In the network claim 20% of the survivors' signs are flipped once, after the last pruning.",
    ),
    verified=(
        "The neuron's gradient equals autograd of a Monte Carlo loss and finite differences of the closed form.",
        "With balanced weights the sign of a is conserved and a^2 - |w|^2 stays put along the flow.",
        "Sign flips are counted against the stored initial weights.",
    ),
    tunes={"rate": (0.1, 0.5)},
)


class LearningRateRewinding:
    """Prune iteratively by magnitude, keep the learnt weights, restart the learning-rate schedule.

    The same rounds as `LotteryTicket`, but after dropping the smallest weights training goes on from the CURRENT
    values with a fresh optimizer and schedule.

    Args:
        rate: Share of survivors dropped a round, in (0, 1).

    Examples:
        >>> from nervure.testing import toy_task
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> small = LearningRateRewinding(rate=0.5).fit(net, toy_task(), Budget(target=0.25, steps=30), seed=0)
        >>> small.steps
        30
    """

    def __init__(self, *, rate: float = 0.2) -> None:
        self.recipe = Recipe(name="LearningRateRewinding", when="train", rate=rate, rewind="lr")

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Pruned:
        """Return a trained sparse copy; see `nervure.compress.recipe.Recipe.fit`."""
        return self.recipe.fit(model, task, budget, seed=seed)


def sign_flips(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    """Return the share of surviving weights whose sign differs from their initial one.

    Args:
        model: A masked model.
        start: Name -> initial weight.

    Returns:
        A number in [0, 1].
    """
    named = dict(model.named_parameters())
    kept = masks.read(model)
    flipped = sum(int((named[name].sign() * start[name].sign() < 0)[mask].sum()) for name, mask in kept.items())
    return flipped / max(1, sum(int(mask.sum()) for mask in kept.values()))


def neuron_flow(
    a: Tensor, w: Tensor, *, kept: Tensor | None = None, steps: int = 1200, rate: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Follow the gradient flow of one hidden neuron a*relu(w.x) towards the target relu(x_1), x standard normal.

    The population loss is L = a^2 |w|^2 / 4 - a k(w) + 1/4 with k(w) = E[relu(w.x) relu(x_1)]
    = |w| (sin t + (pi - t) cos t) / (2 pi), t the angle between w and e_1.

    Where the theorem says that a neuron fails, the flow runs into the saddle at the origin; within 1e-8 of it the
    neuron is set to zero, because on a computer rounding would carry it out again.

    Args:
        a: Output weights, shape (n,).
        w: Input weights, shape (n, d).
        kept: Ones for the inputs that are left, zeros for pruned ones, shape (n, d); None keeps all.
        steps: Number of Euler steps.
        rate: Step size.

    Returns:
        The final a and w.
    """
    kept = torch.ones_like(w) if kept is None else kept
    a, w = a.clone(), w * kept
    first = torch.zeros(w.shape[1], dtype=w.dtype)
    first[0] = 1.0
    for _ in range(steps):
        norm = w.norm(dim=1).clamp_min(1e-12)
        cosine = (w[:, 0] / norm).clamp(-1, 1)
        angle = torch.acos(cosine)
        overlap = norm * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
        pull = (angle.sin()[:, None] * w / norm[:, None] + (math.pi - angle)[:, None] * first) / (2 * math.pi)
        grad_a = a * norm**2 / 2 - overlap
        grad_w = a[:, None] ** 2 * w / 2 - a[:, None] * pull
        # Within 1e-8 of the saddle a neuron is dead; rounding alone would carry it out again.
        alive = (a.abs() * norm > 1e-8).to(w.dtype)
        a, w = (a - rate * grad_a) * alive, (w - rate * grad_w * kept) * alive[:, None]
    return a, w


def _succeeds(a: Tensor, w: Tensor) -> Tensor:
    """Tell which neurons ended at the target: a*w close to e_1."""
    product = a[:, None] * w
    target = torch.zeros_like(product)
    target[:, 0] = 1.0
    return (product - target).norm(dim=1) < 0.05


def _keep_largest(w: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(w.abs().argmax(1), w.shape[1]).to(w.dtype)


def _neuron_table(rewind: str, *, dimension: int, count: int, generator: torch.Generator) -> list[float]:
    """Return the success rates for (a, w_1) in the quadrants (+,+), (+,-), (-,+), (-,-)."""
    sign_a = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat_interleave(count)
    sign_w = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat_interleave(count)
    w0 = torch.randn(4 * count, dimension, generator=generator, dtype=torch.float64)
    w0[:, 0] = w0[:, 0].abs().clamp_min(0.1) * sign_w
    w0 = 0.5 * w0 / w0.norm(dim=1, keepdim=True)
    a0 = sign_a * 0.5  # balanced: a^2 = |w|^2
    a1, w1 = neuron_flow(a0, w0)
    kept = _keep_largest(w1)
    if rewind == "init":
        a1, w1 = a0, w0
    elif rewind == "signs":
        a1, w1 = a1.abs() * a0.sign(), w1.abs() * w0.sign()
    final_a, final_w = neuron_flow(a1, w1, kept=kept)
    return _succeeds(final_a, final_w).double().reshape(4, count).mean(1).tolist()


_IMP, _LRR = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]


@claim(
    CARD,
    checks=(
        Check.at_most("IMP succeeds in its quadrant alone", method="IMP", metric="deviation", bound=0.0),
        Check.at_most("LRR also corrects a wrong sign", method="LRR", metric="deviation", bound=0.0),
        Check.at_most("with one input the advantage vanishes", method="LRR, d=1", metric="deviation", bound=0.0),
    ),
    sabotage={"LRR, signs reset": "LRR"},
    seeds=5,
    minutes=1,
)
def single_neuron(ctx: Ctx) -> None:
    """A single neuron: IMP succeeds only if a(0)>0 and w1(0)>0; LRR for a(0)>0 whatever w1(0), when d>1.

    40 starts in each sign quadrant, d in {1, 4, 8}; the measure is the largest deviation of a success rate from the
    theorem's table.
    """

    def deviation(rewind: str, dimensions: tuple[int, ...], theory: list[float]) -> float:
        found = [_neuron_table(rewind, dimension=d, count=40, generator=ctx.generator("neuron", d)) for d in dimensions]
        return max(abs(rate - right) for table in found for rate, right in zip(table, theory, strict=True))

    ctx.measure("IMP", deviation=deviation("init", (1, 4, 8), _IMP))
    ctx.progress(1, 4)
    ctx.measure("LRR", deviation=deviation("lr", (4, 8), _LRR))
    ctx.progress(2, 4)
    ctx.measure("LRR, d=1", deviation=deviation("lr", (1,), _IMP))
    ctx.progress(3, 4)
    ctx.measure("LRR, signs reset", deviation=deviation("signs", (4, 8), _LRR))


def reset_signs(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Give every maskable weight the sign it had at the start, keeping its magnitude; in place.

    Args:
        model: The model.
        start: Name -> initial weight.
    """
    with torch.no_grad():
        for name, weight in modules.weights(model).items():
            weight.copy_(weight.abs() * start[name].sign())


def perturb_signs(model: nn.Module, *, share: float, generator: torch.Generator) -> nn.Module:
    """Return a copy whose weights have their sign flipped with a probability.

    Args:
        model: The model.
        share: The probability, in [0, 1].
        generator: Draws the flips.

    Returns:
        The copy.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in modules.weights(twin).values():
            weight.mul_(1 - 2 * (torch.rand(weight.shape, generator=generator) < share).to(weight.dtype))
    return twin


@claim(
    CARD,
    checks=(
        Check(name="LRR beats IMP at 2% density or less", method="LRR", control="IMP", metric="accuracy", margin=0.003),
        Check(
            name="LRR loses less than IMP when 20% of the signs are flipped",
            method="LRR",
            control="IMP",
            metric="loss_by_flips",
            better="lower",
        ),
    ),
    sabotage={"LRR, signs reset": "LRR"},
    seeds=5,
    minutes=4,
    data=("fashion-mnist",),
)
def rewinding_the_rate(ctx: Ctx) -> None:
    """On a network at 2% density or less LRR is at least 0.3 points better than IMP and hurt less by sign flips.

    LeNet-300-100, 8 rounds of 40%, 500 steps a round with cosine-annealed Adam at 1.2e-3. The sabotaged arm gives
    the weights their first signs back after every round.
    """
    steps, rounds = ctx.scaled(500, 60), 8
    data = ctx.data("fashion-mnist")
    task = ClaimTask(ctx, data, cosine=True)
    arms: dict[str, Recipe] = {
        "IMP": Recipe(name="IMP", when="train", allocator="layerwise"),
        "LRR": Recipe(name="LRR", when="train", allocator="layerwise", rewind="lr"),
        "LRR, signs reset": Recipe(name="LRR", when="train", allocator="layerwise", rewind="lr", rewound=reset_signs),
        "rewinding to step 100": Recipe(
            name="rewinding", when="train", allocator="layerwise", rewind=ctx.scaled(100, 20)
        ),
    }
    ctx.plan((rounds + 1) * steps * len(arms) + 3 * steps)
    for arm, recipe in arms.items():
        model = ctx.model("lenet-300-100", data=data)
        start = snapshot(model)
        budget = Budget(target=allocate.density_after(model, rate=0.4, rounds=rounds))
        before = model
        for index in recipe.iterate(model, task, budget, count=rounds, steps=steps):
            ctx.measure(arm, step=index, sign_flips=sign_flips(model, start) if index else 0.0)
            if index == rounds - 1:
                before = copy.deepcopy(model)
        reached = ctx.accuracy(model, data.test_x, data.test_y)
        ctx.measure(arm, accuracy=reached, density=masks.density(masks.read(model)))
        if arm != "rewinding to step 100":
            masks.attach(before, masks.read(model))
            if recipe.rewind == "init":
                restore(before, start)
            hurt = perturb_signs(before, share=0.2, generator=ctx.generator("flips"))
            task.train(hurt, steps=steps)
            ctx.measure(arm, loss_by_flips=reached - ctx.accuracy(hurt, data.test_x, data.test_y))
