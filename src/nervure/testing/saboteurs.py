"""Methods that break a contract on purpose, each in one way: a contract that lets one pass is no contract."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nervure.core import masks, modules
from nervure.spec import Budget, Pruner, Task


class Saboteur:
    """Wrap a pruner's `fit`; what a subclass does beside it is the sabotage.

    Args:
        pruner: An honest pruner.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return what the honest pruner returns."""
        return self.pruner.fit(model, task, budget, seed=seed)


class NoOp(Saboteur):
    """Report a pruned model that is not pruned."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result with the user's weights in it."""
        found = super().fit(model, task, budget, seed=seed)
        masks.detach(found.model)
        found.model.load_state_dict(model.state_dict())
        return found


class RandomScores(Saboteur):
    """Drop seeded random weights and call it a method."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result with masks drawn by the seed."""
        found = super().fit(model, task, budget, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        named = modules.weights(model)
        scores = torch.cat([torch.rand(one.numel(), generator=draw) for one in named.values()])
        bar = scores.sort().values[int((1 - budget.target) * len(scores))]
        parts = scores.split([one.numel() for one in named.values()])
        new = {name: (part >= bar).reshape(named[name].shape) for name, part in zip(named, parts, strict=True)}
        masks.detach(found.model)
        found.model.load_state_dict(model.state_dict())
        masks.attach(found.model, new)
        found.masks = new
        return found


class UnseededScores(Saboteur):
    """Draw from the operating system's noise: no seed gives the same result twice."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result of a seed of its own."""
        found = super().fit(model, task, budget, seed=seed)
        with torch.no_grad():
            for weight in modules.weights(found.model).values():
                weight.mul_(1 + 1e-3 * random.SystemRandom().random())
        return found


class GlobalSeed(Saboteur):
    """Seed the global generators and leave them so."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Seed everything first."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return super().fit(model, task, budget, seed=seed)


class GlobalNoise(Saboteur):
    """Let the global generator decide, and put it back so that nobody notices."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Perturb the result by the global generator."""
        found = super().fit(model, task, budget, seed=seed)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for weight in modules.weights(found.model).values():
                weight.mul_(1 + 1e-3 * torch.rand(()))
        return found


class StateLeaker(Saboteur):
    """Remember the call before and let it change the next one."""

    calls = 0

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Scale the result by the number of calls so far."""
        type(self).calls += 1
        found = super().fit(model, task, budget, seed=seed)
        with torch.no_grad():
            for weight in modules.weights(found.model).values():
                weight.mul_(1 + 1e-3 * type(self).calls)
        return found


class _Meddler(Saboteur):
    """Do something to the user's model or process first."""

    def meddle(self, model: nn.Module) -> None:
        """Do it."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Do it, then prune."""
        found = super().fit(model, task, budget, seed=seed)
        self.meddle(model)
        return found


class ModeFlipper(_Meddler):
    """Leave the user's model in eval mode."""

    def meddle(self, model: nn.Module) -> None:
        """Flip the mode."""
        model.eval()


class HookLeaker(_Meddler):
    """Leave a hook on the user's model."""

    def meddle(self, model: nn.Module) -> None:
        """Hang it on."""
        model.register_forward_hook(lambda module, args, output: None)


class ParameterHookLeaker(_Meddler):
    """Leave a hook on a parameter of the user's model."""

    def meddle(self, model: nn.Module) -> None:
        """Hang it on."""
        next(iter(model.parameters())).register_hook(lambda grad: grad)


class GradEraser(_Meddler):
    """Erase the user's gradients."""

    def meddle(self, model: nn.Module) -> None:
        """Erase them."""
        model.zero_grad(set_to_none=True)


class Freezer(_Meddler):
    """Switch the user's gradients off."""

    def meddle(self, model: nn.Module) -> None:
        """Switch them off."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)


class WeightToucher(_Meddler):
    """Prune the user's own model beside the copy."""

    def meddle(self, model: nn.Module) -> None:
        """Change one weight."""
        with torch.no_grad():
            next(iter(model.parameters())).view(-1)[0] += 1


class DtypeChanger(_Meddler):
    """Leave another default dtype behind."""

    def meddle(self, model: nn.Module) -> None:
        """Change it."""
        torch.set_default_dtype(torch.float64)


class GradSwitcher(_Meddler):
    """Leave gradients switched off in the whole process."""

    def meddle(self, model: nn.Module) -> None:
        """Switch them off."""
        torch.set_grad_enabled(False)


class Untidy(Saboteur):
    """Clean up at the end, but not when something raises."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Hang a hook on, prune, take it off."""
        handle = model.register_forward_hook(lambda module, args, output: None)
        found = super().fit(model, task, budget, seed=seed)
        task.loss(model, task.batches(1)[0])  # runs the user's own model, which may raise
        handle.remove()
        return found


class WrongBudget(Saboteur):
    """Prune less than asked."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Aim at half way."""
        easy = Budget(target=(1 + budget.target) / 2, steps=budget.steps, metric=budget.metric)
        return super().fit(model, task, easy, seed=seed)


class LooseMasks(Saboteur):
    """Zero weights once and let training bring them back."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Take the masks off, keep the zeros."""
        found = super().fit(model, task, budget, seed=seed)
        masks.detach(found.model)
        return found


class LyingReport(Saboteur):
    """Report half the density."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return a result whose report is wrong."""
        found = copy.copy(super().fit(model, task, budget, seed=seed))
        honest: Callable[[], Mapping[str, float]] = found.report
        found.report = lambda: {**honest(), "density": honest()["density"] / 2}
        return found


PRUNERS: tuple[type[Saboteur], ...] = (
    NoOp, RandomScores, UnseededScores, GlobalSeed, GlobalNoise, StateLeaker, ModeFlipper, HookLeaker,
    ParameterHookLeaker, GradEraser, Freezer, WeightToucher, DtypeChanger, GradSwitcher, Untidy, WrongBudget,
    LooseMasks, LyingReport,
)  # fmt: skip


class MaskedChannels(Saboteur):
    """Zero channels and sell the network as a smaller one."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result with a masked network in it."""
        found = super().fit(model, task, budget, seed=seed)
        found.model = found.graph.mask(model, found.keep)
        return found


class HookedResult(Saboteur):
    """Leave a hook on the result."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result with a hook that does nothing."""
        found = super().fit(model, task, budget, seed=seed)
        found.model.register_forward_hook(lambda module, args, output: None)
        return found


class FrozenResult(Saboteur):
    """Return a network that cannot be trained on."""

    def fit(self, model: nn.Module, task: Task, budget: Budget, *, seed: int) -> Any:
        """Return the result with frozen parameters."""
        found = super().fit(model, task, budget, seed=seed)
        found.model.requires_grad_(False)
        return found


class StillOptimizer(torch.optim.SGD):
    """Change nothing."""

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


class ForgetfulOptimizer(torch.optim.SGD):
    """Use momentum but do not save it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the groups alone."""
        return {**super().state_dict(), "state": {}}


class GrouplessOptimizer(torch.optim.SGD):
    """Use the first group's rate for all."""

    def step(self, closure: Any = None) -> Any:
        """Step every group with one rate."""
        for group in self.param_groups:
            group["lr"] = self.param_groups[-1]["lr"]
        return super().step(closure)


def sum_loss_of_first(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss in which the first sample counts most: the order of a batch then matters."""
    weight = torch.arange(len(outputs), 0, -1, dtype=outputs.dtype)
    return (nn.functional.cross_entropy(outputs, targets, reduction="none") * weight).mean()


def detached_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy whose gradient is half of what it must be."""
    whole = nn.functional.cross_entropy(outputs, targets)
    return whole / 2 + whole.detach() / 2


class BatchMixer(nn.Module):
    """Subtract the mean of the batch: samples mix, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return centred outputs."""
        found = self.linear(x)
        return found - found.mean(0)


class UnusedParameter(nn.Module):
    """Hold a parameter that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Leave it out."""
        return self.linear(x) + self.idle.detach()
