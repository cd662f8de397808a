"""FreezeNet: train the few most sensitive weights, freeze the rest at their random start and store them as a seed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nervure.compress.claim_task import ClaimTask
from nervure.compress.recipe import Pruned, Recipe, sensitivity
from nervure.core import masks, modules, seeded
from nervure.core.cost import bytes_on_disk
from nervure.spec import Budget, Card, Check, Ctx, Data, Task, claim

CARD = Card(
    id="freezenet",
    n=249,
    title="FreezeNet: Full Performance by Reduced Storage Costs",
    year=2020,
    link="https://arxiv.org/abs/2011.14087",
    family="compress",
    summary=(
        "Before training, keep the weights whose sensitivity |w dL/dw| is largest and train only these; all others "
        "stay frozen at their random start instead of becoming zero, so that signal and gradient still flow. A file "
        "needs the trained values, their places and one 32-bit seed."
    ),
    tags=("pruning at initialisation", "freezing", "SNIP", "storage", "seed"),
    provides=("FreezeNet",),
    protocol="pruner",
    claims=("frozen_beats_zero",),
    needs=("data", "labels", "grad", "trainer"),
    deviations=(
        "Seeded weights are uniform with He's variance, drawn from integers, so that any machine draws the same bits.",
        "The variant that decays frozen weights to zero during training is not offered.",
    ),
    verified=(
        "Chosen weights are the top k of autograd's |w dL/dw|; frozen weights never move, bit for bit.",
        "A file written in one process gives the same outputs, bit for bit, in another.",
    ),
)


class FreezeNet:
    """Train the share of weights with the largest |w dL/dw| and freeze the others where they started.

    Draw the start by ``nervure.core.seeded.draw_(model, seed=...)`` and the result can be stored by
    ``nervure.core.seeded.save``: seed, trained values and their places, nothing else.

    Args:
        frozen: What a frozen weight is: ``"start"`` its first value, ``"signs"`` its sign times the layer's
            root mean square, so that one bit a weight would do.

    Examples:
        >>> from nervure.testing import toy_task
        >>> net = seeded.draw_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), seed=1)
        >>> small = FreezeNet().fit(net, toy_task(), Budget(target=0.1, steps=10), seed=0)
        >>> moved = (small.model[0].weight != net[0].weight).float().mean()
        >>> bool(0 < moved < 0.2)
        True
    """

    def __init__(self, *, frozen: Literal["start", "signs"] = "start") -> None:
        self.recipe = Recipe(
            name="FreezeNet",
            score=sensitivity,
            allocator="global",
            carrier="init",
            finish=_to_signs if frozen == "signs" else None,
        )

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Pruned:
        """Return a copy of which the budget's share is trained; see `Recipe.fit`."""
        return self.recipe.fit(model, task, budget, seed=seed)


def _to_signs(model: nn.Module) -> None:
    weights = modules.weights(model)
    kept = masks.read(model)
    carriers = {name: weights[name].detach().sign() * weights[name].detach().square().mean().sqrt() for name in kept}
    masks.attach(model, kept, carriers=carriers)


_RATES, _SHARES = (6e-4, 1.2e-3, 4e-3), {"10": 0.1, "1": 0.01, "05": 0.005}
_SNIP = Recipe(name="SNIP", score=sensitivity, allocator="global")


@claim(
    CARD,
    checks=(
        Check(name="at 0.5% above SNIP, MLP", method="freezenet", control="snip", metric="mlp_05", margin=0.05),
        Check(name="at 0.5% above SNIP, CNN", method="freezenet", control="snip", metric="cnn_05", margin=0.05),
        Check.at_least(
            "reloads bit for bit, MLP", method="freezenet", metric="mlp_05_reloaded", bound=1.0, rule="every-seed"
        ),
        Check.at_least(
            "reloads bit for bit, CNN", method="freezenet", metric="cnn_05_reloaded", bound=1.0, rule="every-seed"
        ),
    ),
    sabotage={"other seed": "freezenet"},
    seeds=5,
    minutes=4,
    data=("fashion-mnist",),
)
def frozen_beats_zero(ctx: Ctx) -> None:
    """With 0.5% of the weights trained, freezing the others beats zeroing them by five points; a file gives it back.

    Fashion-MNIST, LeNet-300-100 at 10%, 1% and 0.5% and LeNet at 0.5% trained, 800 Adam steps, every arm with the
    best of three learning rates after 200 steps by validation accuracy. Controls: SNIP with the same mask and zeros,
    a random choice of the same number in each layer, nothing trained. The sabotage reloads the file with another seed.
    """
    data = ctx.data("fashion-mnist", validation=2000)
    steps = ctx.scaled(800, 80)
    ctx.plan((3 * 3 + 3) * (steps + len(_RATES) * (steps // 4)))
    for name, zoo, shares in (("mlp", "lenet-300-100", _SHARES), ("cnn", "lenet", {"05": 0.005})):
        model = seeded.draw_(ctx.model(zoo, data=data), seed=ctx.seed_for("weights") % 2**32)
        for label, share in shares.items():
            frozen = FreezeNet().recipe
            arms = {"freezenet": frozen, "snip": _SNIP, "random": replace(frozen, score=_same_counts)}
            for arm, recipe in arms.items():
                trained = _trained(ctx, recipe, model, data, share, steps)
                found = {f"{name}_{label}": ctx.accuracy(trained.model, data.test_x, data.test_y)}
                ctx.measure(arm, **found)
                if arm == "freezenet" and label == "05":
                    _reload(ctx, trained.model, model, data, f"{name}_{label}")
        ctx.measure("nothing trained", **{f"{name}_05": ctx.accuracy(model, data.test_x, data.test_y)})


def _trained(ctx: Ctx, recipe: Recipe, model: nn.Module, data: Data, share: float, steps: int) -> Pruned:
    def run(rate: float, count: int) -> Pruned:
        task = ClaimTask(ctx, data, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate))
        return recipe.fit(model, task, Budget(target=share, steps=count), seed=ctx.seed)

    early = {rate: ctx.accuracy(run(rate, steps // 4).model, data.validation_x, data.validation_y) for rate in _RATES}
    return run(max(early, key=early.__getitem__), steps)


def _same_counts(
    model: nn.Module, task: Task, weights: Mapping[str, nn.Parameter], budget: Budget, seed: int
) -> Mapping[str, Tensor]:
    """Score so that each layer keeps as many weights as by sensitivity, chosen by chance."""
    found = sensitivity(model, task, weights, budget, seed)
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=draw)].view_as(value)
        for name, value in found.items()
    }


def _reload(ctx: Ctx, trained: nn.Module, start: nn.Module, data: Data, metric: str) -> None:
    """Store a trained network and read it again with its own and with another seed."""
    seed = ctx.seed_for("weights") % 2**32
    with tempfile.TemporaryDirectory() as folder:
        file = seeded.save(trained, Path(folder) / "seeded.safetensors", seed=seed)
        ratio = bytes_on_disk(trained) / file.stat().st_size
        for arm, other in (("freezenet", None), ("other seed", (seed + 1) % 2**32)):
            again = seeded.load(copy.deepcopy(start), file, seed=other)
            pairs = zip(again.parameters(), trained.parameters(), strict=True)
            found = {f"{metric}_reloaded": float(all(torch.equal(one, two) for one, two in pairs))}
            if other is None:
                found[f"{metric}_file_ratio"] = ratio
            else:
                found[metric] = ctx.accuracy(again, data.test_x, data.test_y)
            ctx.measure(arm, **found)
