"""Contracts of methods that take a whole model: pruners, initialisers, diagnostics, kernels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nervure import zoo
from nervure._kit import BadBudget, NervureError
from nervure.core import forward, masks, modules, state
from nervure.spec import Budget, Pruner
from nervure.testing.checks import digest, finite, require, tensors
from nervure.testing.contracts.base import ZooContract
from nervure.testing.toy import ToyTask


class PrunerContract(ZooContract):
    """Check a pruner.

    Attributes:
        informed: Whether its scores are meant to know more than chance does.
        frozen: Whether dropped weights stay at their start instead of becoming zero.
        target: Density the contract asks for.
        steps: Optimizer steps it grants.

    Examples:
        >>> from nervure.compress import LotteryTicket
        >>> class TestTicket(PrunerContract):
        ...     cases = ("mlp",)
        ...
        ...     def method(self):
        ...         return LotteryTicket(rate=0.5)
        >>> TestTicket().failures(only="test_budget")
        {}
    """

    informed = True
    frozen = False
    target = 0.5
    steps = 16

    def method(self) -> Pruner:
        """Return the pruner.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines method()")

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Return the pruned copy."""
        return self.method().fit(model, task, Budget(target=self.target, steps=self.steps), seed=seed).model

    def _dropped(self, pruned: nn.Module, original: nn.Module) -> dict[str, Tensor]:
        """Return what was dropped: the zeros, or what still is as it was where a method freezes."""
        named = dict(pruned.named_parameters())
        return {
            name: named[name].detach() == (weight.detach() if self.frozen else 0)
            for name, weight in modules.weights(original).items()
        }

    def test_budget_is_met(self, case: str) -> None:
        """The share of weights that are left, counted from the weights, is the target within one per cent."""
        model, task = self.problem(case)
        dropped = self._dropped(self.run(model, task, seed=0), model)
        kept = sum(int((~one).sum()) for one in dropped.values()) / sum(one.numel() for one in dropped.values())
        require(abs(kept - self.target) < 0.02, f"density {kept:.3f} instead of {self.target} on {case}")

    def test_report_equals_a_recount(self, case: str) -> None:
        """What the report says is what the weights show."""
        model, task = self.problem(case)
        found = self.method().fit(model, task, Budget(target=self.target, steps=0), seed=0)
        weights = [dict(found.model.named_parameters())[name] for name in modules.weights(model)]
        kept = sum(int(torch.count_nonzero(one)) for one in weights) / sum(one.numel() for one in weights)
        require(abs(found.report()["density"] - kept) < 1e-6, f"the report differs from a recount on {case}")

    def test_outputs_and_training(self, case: str) -> None:
        """The pruned model takes the same batches, and dropped weights stay dropped in another training step."""
        model, task = self.problem(case)
        pruned = self.run(model, task, seed=0)
        shape = forward.outputs(model, task.inputs).shape
        require(forward.outputs(pruned, task.inputs).shape == shape, f"another output shape on {case}")
        before = self._dropped(pruned, model)
        optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            task.loss(pruned, (task.inputs, task.targets)).backward()
            optimizer.step()
        after = self._dropped(pruned, model)
        require(all(bool(after[name][one].all()) for name, one in before.items()), f"dropped weights live on {case}")

    def test_budgets_that_cannot_be_met_are_refused(self) -> None:
        """A budget in another unit raises BadBudget, and one that drops nothing raises an error of nervure's."""
        model, task = self.problem(self.supported()[0])
        for budget, kind in ((Budget(target=0.5, metric="ms"), BadBudget), (Budget(target=1.0), NervureError)):
            try:
                self.method().fit(model, task, budget, seed=0)
            except kind:
                continue
            require(False, f"{budget} is accepted")

    def test_scores_are_informed(self) -> None:
        """Weights of dead, tiny inputs are dropped before live ones; random scores keep a quarter of them."""
        if not self.informed:
            return
        draw = torch.Generator().manual_seed(0)
        first = nn.Linear(16, 8)
        net = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=draw) - 0.5)
            first.weight[:, 4:] *= 1e-3
        x = torch.randn(32, 16, generator=draw)
        x[:, 4:] = 0
        task = ToyTask(x, x[:, :3].argmax(1))
        kept = masks.read(self.method().fit(net, task, Budget(target=0.25, steps=0), seed=0).model)
        useless = int(kept["0.weight"][:, 4:].sum())
        require(useless <= 7, f"{useless} of 96 useless weights are kept where chance keeps 24")

    def prepare(self, case: str, folder: Path) -> dict[str, Any]:
        """Prune, save, and return the outputs too."""
        model, task = self.problem(case)
        pruned = self.run(model, task, seed=0)
        state.save(pruned, folder / f"{case}.safetensors")
        return {"result": pruned, "outputs": forward.predict(pruned, task.inputs)}

    def fresh(self, case: str, folder: Path) -> dict[str, Any]:
        """Prune again, and load what the first process saved."""
        model, task = self.problem(case)
        loaded = state.load(folder / f"{case}.safetensors", model=zoo.case(case).model(seed=5))
        require(bool(masks.read(loaded)), f"no masks came back on {case}")
        return {"result": self.run(model, task, seed=0), "outputs": forward.predict(loaded, task.inputs)}


class InitialiserContract(ZooContract):
    """Check an initialiser: it changes weights in place by its seed, and nothing else."""

    def initialise(self, model: nn.Module, task: ToyTask, *, seed: int) -> None:
        """Initialise the model in place.

        Raises:
            NotImplementedError: Where a subclass does not say how.
        """
        raise NotImplementedError("a contract's subclass defines initialise(model, task, seed=...)")

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Initialise a copy, so that the common checks see the user's model untouched."""
        twin = copy.deepcopy(model)
        self.initialise(twin, task, seed=seed)
        return twin

    def test_weights_change_and_nothing_else(self, case: str) -> None:
        """Weights change; names, shapes, types, modes, requires_grad and hooks do not; outputs are finite."""
        model, task = self.problem(case)
        made = self.run(model, task, seed=0)
        old, new = dict(model.named_parameters()), dict(made.named_parameters())
        require(old.keys() == new.keys(), f"other parameters on {case}")
        require(any(not torch.equal(old[name], new[name]) for name in old), f"nothing changed on {case}")
        for name in old:
            kept = (old[name].shape, old[name].dtype, old[name].requires_grad)
            require((new[name].shape, new[name].dtype, new[name].requires_grad) == kept, f"{name} is another on {case}")
        for one, two in zip(model.modules(), made.modules(), strict=True):
            require(one.training == two.training, f"a mode changed on {case}")
            require(len(one._forward_hooks) == len(two._forward_hooks), f"a hook was left on {case}")
        finite(forward.predict(made, task.inputs), f"outputs on {case}")


class DiagnosticContract(ZooContract):
    """Check a diagnostic: `run` returns its result, and that is finite and the user's model untouched."""

    def test_result_is_finite(self, case: str) -> None:
        """There is a result, and it has no NaN and no infinity."""
        model, task = self.problem(case)
        found = self.run(model, task, seed=0)
        require(any(True for _ in tensors(found)), f"an empty result on {case}")
        finite(found, f"result on {case}")

    def test_result_depends_on_the_model(self, case: str) -> None:
        """A model with other weights gives another result."""
        model, task = self.problem(case)
        other = zoo.case(case).model(seed=1)
        one, two = self.run(model, task, seed=0), self.run(other, task, seed=0)
        require(digest(one) != digest(two), f"two models give one result on {case}")


class KernelContract(ZooContract):
    """Check a kernel of a model: `gram` returns its matrix on the inputs."""

    def gram(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the kernel's matrix, square in the samples (or samples times outputs).

        Raises:
            NotImplementedError: Where a subclass does not say how.
        """
        raise NotImplementedError("a contract's subclass defines gram(model, inputs)")

    def problem(self, case: str) -> tuple[nn.Module, ToyTask]:
        """Return the model in eval mode, where samples do not mix."""
        model, task = super().problem(case)
        return model.eval(), ToyTask(forward.take(task.inputs, slice(0, 4)), task.targets[:4])

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Return the matrix."""
        return self.gram(model, task.inputs)

    def test_symmetric_and_positive(self, case: str) -> None:
        """The matrix is its own transpose and has no negative eigenvalue."""
        model, task = self.problem(case)
        gram = self.gram(model, task.inputs).double()
        scale = float(gram.abs().max())
        require(scale > 0, f"a zero kernel on {case}")
        require(float((gram - gram.mT).abs().max()) <= 1e-5 * scale, f"not symmetric on {case}")
        require(float(torch.linalg.eigvalsh(gram)[0]) >= -1e-5 * scale * len(gram), f"not positive on {case}")

    def test_samples_do_not_mix(self, case: str) -> None:
        """The entries of a few samples do not depend on the others in the batch."""
        model, task = self.problem(case)
        whole = self.gram(model, task.inputs)
        few = self.gram(model, forward.take(task.inputs, slice(0, 2)))
        size, count = len(few), len(whole)
        places = torch.arange(count).reshape(-1, count // 4) if count % 4 == 0 else torch.arange(count)[:, None]
        index = places[:2].flatten()
        require(len(index) == size, f"the matrix does not grow with the samples on {case}")
        close = torch.allclose(whole[index][:, index], few, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
        require(close, f"samples mix on {case}")
