"""The lottery ticket hypothesis: iterative magnitude pruning with rewinding to the initial weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nervure.compress.claim_task import ClaimTask
from nervure.compress.recipe import Pruned, Recipe, restore, snapshot
from nervure.core import allocate, masks
from nervure.spec import Budget, Card, Check, Ctx, Data, Task, claim

CARD = Card(
    id="lottery-ticket",
    n=35,
    title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
    year=2019,
    link="https://arxiv.org/abs/1803.03635",
    family="compress",
    summary=(
        "A dense network contains a sparse one that, trained alone from the same initial weights, reaches the dense "
        "accuracy in no more steps. Found by training, dropping the smallest weights, putting the survivors back to "
        "their initial values, and repeating; the same mask with fresh weights does not do it."
    ),
    tags=("pruning", "sparsity", "rewinding", "iterative magnitude pruning", "winning ticket"),
    provides=("LotteryTicket",),
    protocol="pruner",
    entrants={"lottery-ticket": "LotteryTicket"},
    claims=("winning_ticket",),
    needs=("data", "labels", "grad", "trainer"),
    deviations=(
        "The steps of a budget are shared equally among the rounds; the paper trains every round to the end.",
        "Masked are all weights with two or more axes; biases and norm parameters stay dense, as in the paper.",
    ),
    verified=(
        "Masks after n rounds equal torch.nn.utils.prune applied n times, layer-wise and global, entry for entry.",
        "The density after n rounds is (1-p)^n to within one weight a layer.",
        "After rewinding every surviving weight equals its initial value bit for bit.",
    ),
    tunes={"rate": (0.1, 0.5)},
)


class LotteryTicket:
    """Find a winning ticket by iterative magnitude pruning with rewinding.

    Each round trains, drops the share ``rate`` of the surviving weights with the smallest magnitude (layer-wise with
    the output layer at half the rate for fully connected networks, globally for others) and rewinds the survivors to
    their value at step `rewind_step`. After n rounds the density is (1 - rate)^n.

    Differs from the paper: the steps of a budget are shared equally among the rounds.

    Args:
        rate: Share of survivors dropped a round, in (0, 1); 0.2 in the paper.
        rewind_step: Step of the first training to rewind to; 0 is the initialisation, later steps are needed for
            deep networks.

    Examples:
        In your own loop, with a task that says how you train:

        >>> from nervure.testing import toy_task
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> ticket = LotteryTicket(rate=0.5).fit(net, toy_task(), Budget(target=0.25, steps=30), seed=0)
        >>> round(ticket.report()["density"], 2)
        0.25
    """

    def __init__(self, *, rate: float = 0.2, rewind_step: int = 0) -> None:
        self.recipe = Recipe(name="LotteryTicket", when="train", rate=rate, rewind=rewind_step or "init")

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Pruned:
        """Return a trained ticket; see `nervure.compress.recipe.Recipe.fit`."""
        return self.recipe.fit(model, task, budget, seed=seed)


def shuffle(kept: Mapping[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Permute every layer's mask, so that each layer keeps its density and nothing else.

    Args:
        kept: Name -> mask.
        generator: Draws the permutations.

    Returns:
        Name -> mask.
    """
    return {
        name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
        for name, mask in kept.items()
    }


def flip_signs(
    values: Mapping[str, Tensor], names: Mapping[str, object], *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Flip the sign of every entry of the named tensors with probability one half.

    Args:
        values: Name -> tensor.
        names: Which of them to flip.
        generator: Draws the signs.

    Returns:
        Name -> tensor.
    """
    return {
        name: value * (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1) if name in names else value
        for name, value in values.items()
    }


class Speed:
    """Note, as a hook, the accuracy every 50 steps and the first step that reaches 83%.

    Args:
        ctx: The claim's context.
        arm: The arm in training.
        model: The model in training.
        data: The accuracy is measured on the first 2000 test samples.
    """

    def __init__(self, ctx: Ctx, arm: str, model: nn.Module, data: Data) -> None:
        self.ctx, self.arm, self.model = ctx, arm, model
        self.probe = data.test_x[:2000], data.test_y[:2000]
        self.reached = False

    def after_step(self, step: int) -> None:
        """Measure every 50 steps."""
        if step % 50 == 0:
            found = self.ctx.accuracy(self.model, *self.probe)
            self.ctx.measure(self.arm, step=step, accuracy=found)
            if found >= 0.83 and not self.reached:
                self.reached = True
                self.ctx.measure(self.arm, steps_to_83=step)


@claim(
    CARD,
    checks=(
        Check(
            name="the ticket beats the same mask re-initialised",
            method="ticket",
            control="reinit",
            metric="accuracy",
            margin=0.01,
        ),
        Check(
            name="the ticket beats a shuffled mask with its initial weights",
            method="ticket",
            control="shuffled",
            metric="accuracy",
        ),
        Check(
            name="the ticket is at most half a point below the dense network",
            method="ticket",
            control="dense",
            metric="accuracy",
            margin=-0.005,
        ),
    ),
    sabotage={"signs flipped": "ticket"},
    seeds=5,
    minutes=3,
    data=("fashion-mnist",),
)
def winning_ticket(ctx: Ctx) -> None:
    """At 5% density or less the ticket, trained from its initial weights, beats the same mask with fresh weights.

    It also beats a shuffled mask and is not worse than the dense network, at the same number of steps.
    LeNet-300-100, Adam 1.2e-3, batch 64, 1000 steps a round; 8 rounds drop 40% of each layer and 20% of the output
    layer. The arms are compared at the first density of 5% or less (about 4.8%).
    """
    steps = ctx.scaled(1000, 120)
    data = ctx.data("fashion-mnist")
    model = ctx.model("lenet-300-100", data=data)
    start = snapshot(model)
    compared = next(n for n in itertools.count(1) if allocate.density_after(model, rate=0.4, rounds=n) <= 0.05)
    rounds = max(ctx.scaled(8, 6), compared)
    ctx.plan((rounds + 4) * steps)
    arms = {0: "dense", compared: "ticket"}

    def watch(net: nn.Module, part: int) -> list[object]:
        return [Speed(ctx, arms[part], net, data)] if part in arms else []

    def train_control(arm: str, values: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        net = copy.deepcopy(model)
        masks.attach(net, kept)
        restore(net, values)
        ctx.train(net, data, steps=steps, hooks=[Speed(ctx, arm, net, data)])
        ctx.measure(arm, accuracy=ctx.accuracy(net, data.test_x, data.test_y))

    recipe = Recipe(name="LotteryTicket", when="train", allocator="layerwise")
    budget = Budget(target=allocate.density_after(model, rate=0.4, rounds=rounds))
    for index in recipe.iterate(model, ClaimTask(ctx, data, hooks=watch), budget, count=rounds, steps=steps):
        kept = masks.read(model)
        density = masks.density(kept) if kept else 1.0
        reached = ctx.accuracy(model, data.test_x, data.test_y)
        ctx.measure("ticket", step=density, accuracy_by_density=reached)
        if index in arms:
            ctx.measure(arms[index], accuracy=reached, density=density)
        if index == compared:
            fresh = snapshot(ctx.model("lenet-300-100", data=data, draw="fresh"))
            train_control("reinit", fresh, kept)
            train_control("shuffled", start, shuffle(kept, generator=ctx.generator("shuffle")))
            train_control("signs flipped", flip_signs(start, kept, generator=ctx.generator("signs")), kept)
