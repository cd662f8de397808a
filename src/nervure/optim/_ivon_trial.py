"""The experiment of IVON's claim: train by any optimizer, choose by validation loss, score the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure.core import forward
from nervure.spec import Ctx

Make = Callable[[Any], torch.optim.Optimizer]
Predict = Callable[[Tensor], Tensor]

_TEMPERATURES = torch.logspace(-1, 1, 101)
_GRID = [(lr, ess, hess) for lr in (0.1, 0.3) for ess, hess in ((12e3, 0.1), (1e5, 0.1), (12e3, 0.5))]
_RATES = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)


class _Sampled:
    """Let a training loop take every gradient at sampled weights: from before the forward to after the backward."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.open = optimizer, ExitStack()

    def batch(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        self.open.enter_context(self.optimizer.sample())
        return inputs, targets

    def gradients(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        self.open.close()
        return {**named}


class Trial:
    """Hold 12,000 Fashion-MNIST images, 10% of the training labels drawn anew, and digits as unknown images.

    Args:
        ctx: The context of one seed.
        trainings: Number of trainings to come, for the progress.
    """

    def __init__(self, ctx: Ctx, *, trainings: int) -> None:
        data: Any = ctx.data("fashion-mnist", train=ctx.scaled(12_000, 2_000), validation=1_000, test=2_000)
        draw = ctx.generator("label noise")
        flip = torch.rand(len(data.train_y), generator=draw) < 0.1
        noisy = torch.where(flip, torch.randint(10, data.train_y.shape, generator=draw), data.train_y)
        self.ctx, self.data = ctx, replace(data, train_y=noisy)
        strange = ctx.data("digits", test=500).test_x
        self.strange = F.interpolate(strange, size=data.test_x.shape[-2:], mode="bilinear")
        self.steps = 8 * (len(noisy) // 64)
        ctx.plan(self.steps * trainings)

    def train(self, make: Make, *, draw: str = "first") -> tuple[nn.Module, Predict]:
        """Train an MLP from the same start and on the same batches; return it and its way to predict."""
        model = self.ctx.model("mlp", data=self.data, draw=draw)
        optimizer: Any = make(model.parameters())
        samples = hasattr(optimizer, "sample")
        hooks = [_Sampled(optimizer)] if samples else []
        self.ctx.train(
            model, self.data, steps=self.steps, optimizer=lambda _: optimizer, hooks=hooks, order=("order", draw)
        )
        if samples:
            return model, lambda x: optimizer.average(lambda: chances(model, x), samples=32)
        return model, lambda x: chances(model, x)

    def choose(self, makes: Sequence[Make]) -> tuple[int, nn.Module, Predict]:
        """Train by each and keep the one with the lowest validation NLL."""
        trained = [self.train(make) for make in makes]
        losses = [scores(predict(self.data.validation_x), self.data.validation_y)["nll"] for _, predict in trained]
        best = min(range(len(makes)), key=losses.__getitem__)
        return best, *trained[best]

    def temperature(self, model: nn.Module) -> float:
        """Return the temperature with the lowest validation NLL."""
        logits = forward.predict(model, self.data.validation_x)
        losses = [F.cross_entropy(logits / heat, self.data.validation_y) for heat in _TEMPERATURES]
        return float(_TEMPERATURES[torch.stack(losses).argmin()])

    def measure(self, arm: str, predict: Predict) -> None:
        """Record an arm's test scores."""
        inside = predict(self.data.test_x)
        self.ctx.measure(arm, auroc=auroc(inside, predict(self.strange)), **scores(inside, self.data.test_y))


def chances(model: nn.Module, x: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the model's class probabilities."""
    return (forward.predict(model, x) / temperature).softmax(-1)


def scores(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Return accuracy, NLL and the calibration error over 15 bins of confidence."""
    confidence, guess = probabilities.max(-1)
    right = (guess == targets).double()
    place = (confidence * 15).long().clamp_max(14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, place, right - confidence.double())
    nll = F.nll_loss(probabilities.clamp_min(1e-12).log(), targets)
    return {"accuracy": float(right.mean()), "nll": float(nll), "ece": float(gaps.abs().sum() / len(right))}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the chance that a known sample is more confident than an unknown one."""
    both = torch.cat([inside.amax(-1), outside.amax(-1)])
    ranks = both.argsort().argsort().double() + 1
    n, m = len(inside), len(outside)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def compare(ctx: Ctx, ivon: Callable[..., Any], *, sabotaged: Callable[..., Any]) -> None:
    """Measure IVON, its sabotage, AdamW with its calibrators and SGD."""
    trial = Trial(ctx, trainings=21)

    def make(kind: Callable[..., Any], lr: float, ess: float, hess: float) -> Make:
        return lambda params: kind(params, lr=lr, ess=ess, hess_init=hess, seed=ctx.seed_for("noise"))

    place, model, predict = trial.choose([make(ivon, *setting) for setting in _GRID])
    trial.measure("ivon", predict)
    trial.measure("ivon, mean weights", partial(chances, model))
    trial.measure("noise after the gradient", trial.train(make(sabotaged, *_GRID[place]))[1])

    adamw: list[Make] = [partial(torch.optim.AdamW, lr=lr, fused=True) for lr in _RATES]
    place, model, predict = trial.choose(adamw)
    trial.measure("adamw", predict)
    trial.measure("adamw, temperature", partial(chances, model, temperature=trial.temperature(model)))
    crowd = [predict, *(trial.train(adamw[place], draw=draw)[1] for draw in ("second", "third"))]
    trial.measure("ensemble of 3", lambda x: torch.stack([one(x) for one in crowd]).mean(0))
    trial.measure("sgd", trial.choose([partial(torch.optim.SGD, lr=10 * lr, momentum=0.9) for lr in _RATES])[2])
