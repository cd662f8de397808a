"""The contract of pruners that cut whole channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nervure import zoo
from nervure._kit import BadBudget, NervureError
from nervure.core import forward, state
from nervure.core.cost import macs
from nervure.spec import Budget, Pruner
from nervure.testing.checks import require
from nervure.testing.contracts.base import ZooContract
from nervure.testing.toy import ToyTask


class ChannelPrunerContract(ZooContract):
    """Check a pruner that cuts channels: the result is a plain smaller network.

    Attributes:
        target: Share of the MACs the contract asks for.
        steps: Optimizer steps it grants.

    Examples:
        >>> from nervure.compress import Spa
        >>> class TestSpa(ChannelPrunerContract):
        ...     cases = ("mlp",)
        ...
        ...     def method(self):
        ...         return Spa()
        >>> TestSpa().test_budget_is_met("mlp")
    """

    target = 0.6
    steps = 6

    def method(self) -> Pruner:
        """Return the pruner.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines method()")

    def fit(self, case: str) -> tuple[nn.Module, ToyTask, Any]:
        """Return the model, its task and what the pruner makes of it."""
        model, task = self.problem(case)
        budget = Budget(target=self.target, metric="macs", steps=self.steps)
        return model, task, self.method().fit(model, task, budget, seed=0)

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Return the smaller network."""
        budget = Budget(target=self.target, metric="macs", steps=self.steps)
        return self.method().fit(model, task, budget, seed=seed).model

    def test_budget_is_met(self, case: str) -> None:
        """Physical MACs, counted as the smaller network runs, are at most the target, and not a third less."""
        model, task, found = self.fit(case)
        one = forward.take(task.inputs, slice(0, 1))
        share = macs(found.model, one) / macs(model, one)
        require(share <= self.target, f"{share:.3f} of the MACs instead of {self.target} on {case}")
        require(share >= self.target / 3, f"only {share:.3f} of the MACs stay on {case}")

    def test_result_is_a_plain_smaller_network(self, case: str) -> None:
        """The same class with fewer parameters, without new buffers or hooks, whose every parameter trains."""
        model, task, found = self.fit(case)
        small = found.model
        require(type(small) is type(model), f"{type(small).__name__} instead of {type(model).__name__} on {case}")
        sizes = [sum(p.numel() for p in net.parameters()) for net in (small, model)]
        require(sizes[0] < sizes[1], f"no parameter is gone on {case}")
        require(small.state_dict().keys() == model.state_dict().keys(), f"other names in the state on {case}")
        hooks = [hook for module in small.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
        require(not hooks, f"hooks are left on {case}")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        require(trained == {n for n, p in small.named_parameters() if p.requires_grad}, f"other parameters on {case}")
        shape = forward.outputs(model, task.inputs).shape
        require(forward.outputs(small, task.inputs).shape == shape, f"another output shape on {case}")
        before = copy.deepcopy(small)
        task.train(small, steps=2)
        pairs = zip(before.parameters(), small.parameters(), strict=True)
        require(any(not torch.equal(one, two) for one, two in pairs), f"the result does not train on {case}")

    def test_report_equals_a_recount(self, case: str) -> None:
        """What the report says is what the network shows."""
        _, _, found = self.fit(case)
        count = sum(parameter.numel() for parameter in found.model.parameters())
        require(found.report()["parameters"] == count, f"the report differs from a recount on {case}")

    def test_budgets_that_cannot_be_met_are_refused(self) -> None:
        """A density, everything, and less than the smallest network raise errors of nervure's; the model stays."""
        model, task = self.problem(self.supported()[0])
        wrong = (Budget(target=0.5), Budget(target=1.0, metric="macs"), Budget(target=1e-9, metric="macs"))
        for budget, kind in zip(wrong, (BadBudget, NervureError, BadBudget), strict=True):
            try:
                self.method().fit(model, task, budget, seed=0)
            except kind:
                continue
            require(False, f"{budget} is accepted")

    def prepare(self, case: str, folder: Path) -> dict[str, Any]:
        """Prune, save, and return the outputs too."""
        _, task, found = self.fit(case)
        found.save(folder / f"{case}.safetensors")
        return {"result": found.model, "outputs": forward.outputs(found.model.eval(), task.inputs)}

    def fresh(self, case: str, folder: Path) -> dict[str, Any]:
        """Prune again, and load what the first process saved."""
        _, task, found = self.fit(case)
        loaded = state.load(folder / f"{case}.safetensors", model=zoo.case(case).model(seed=5))
        return {"result": found.model, "outputs": forward.outputs(loaded.eval(), task.inputs)}
