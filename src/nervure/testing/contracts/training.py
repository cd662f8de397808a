"""Contracts of what takes part in training: optimizers, losses, layers, continual learners, training rules."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData
from nervure.core import forward
from nervure.spec import ContinualLearner, TrainingRule
from nervure.testing.checks import finite, require, same, untouched
from nervure.testing.contracts.base import Contract, ZooContract
from nervure.testing.toy import ToyTask


def through_a_file(value: Any) -> Any:
    """Return what comes back after saving and loading without pickled objects.

    Args:
        value: A state of tensors, numbers and text.

    Returns:
        The loaded state.
    """
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class OptimizerContract(Contract):
    """Check an optimizer on small problems."""

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        """Return the optimizer over parameters, or over a list of groups.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines make(parameters)")

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> float:
        """Do one training step; a subclass overrides this where the optimizer wants another call."""
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def _problem(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=draw) - 0.5)
        x = torch.randn(32, 6, generator=draw).to(dtype)
        return model, x, x[:, :2] * 0.7

    def _run(self, steps: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(3)
        model, x, y = self._problem(dtype)
        optimizer = self.make(model.parameters())
        return model, [self.step(optimizer, model, x, y) for _ in range(steps)]

    def test_the_loss_falls(self) -> None:
        """Sixty steps on a small regression bring the loss below its start."""
        model, losses = self._run(60)
        finite(model, "weights")
        require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")

    def test_same_seed_same_weights(self) -> None:
        """Two runs are equal bit for bit."""
        same(self._run(5)[0], self._run(5)[0], "two runs")

    def test_float64_stays_float64(self) -> None:
        """Weights and state keep the type of the parameters."""
        model, _ = self._run(2, torch.float64)
        require(all(one.dtype == torch.float64 for one in model.parameters()), "a weight changed its type")

    def test_state_resumes_exactly(self) -> None:
        """Three steps, a file, three steps equal six steps."""
        whole, _ = self._run(6)
        torch.manual_seed(3)
        model, x, y = self._problem()
        optimizer = self.make(model.parameters())
        for _ in range(3):
            self.step(optimizer, model, x, y)
        stream = torch.get_rng_state()
        state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        other, _, _ = self._problem()
        other.load_state_dict(state["model"])
        again = self.make(other.parameters())
        again.load_state_dict(state["optimizer"])
        torch.set_rng_state(stream)
        for _ in range(3):
            self.step(again, other, x, y)
        same(whole, other, "a resumed run")

    def test_parameters_without_gradient_stay(self) -> None:
        """A parameter the loss does not touch is left as it was."""
        model, x, y = self._problem()
        idle = nn.Parameter(torch.ones(3))
        optimizer = self.make([*model.parameters(), idle])
        for _ in range(2):
            self.step(optimizer, model, x, y)
        require(bool((idle == 1).all()), "a parameter without a gradient changed")

    def test_groups_have_their_own_rate(self) -> None:
        """A group with rate zero stands still while another moves."""
        model, x, y = self._problem()
        start = copy.deepcopy(model)
        groups = [{"params": [*model[0].parameters()], "lr": 0.0}, {"params": [*model[2].parameters()]}]  # type: ignore[index]
        optimizer = self.make(groups)
        for _ in range(3):
            self.step(optimizer, model, x, y)
        pairs = [torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
        require(pairs[:2] == [True, True], "a group with rate zero moved")
        require(pairs[2:] == [False, False], "the other group stood still")

    def test_settings_of_the_process_stay(self) -> None:
        """The default dtype, gradient mode and modes of the model are left as they were."""
        model, x, y = self._problem()
        model.eval()
        optimizer = self.make(model.parameters())
        stream = torch.get_rng_state()
        default = torch.get_default_dtype()
        self.step(optimizer, model, x, y)
        torch.set_rng_state(stream)
        require(torch.get_default_dtype() == default and torch.is_grad_enabled(), "a setting of the process changed")
        require(not any(module.training for module in model.modules()), "a mode changed")


class LossContract(Contract):
    """Check a loss: a callable from (outputs, targets) to a scalar."""

    def loss(self) -> Any:
        """Return the loss.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines loss()")

    def batch(self, count: int = 6) -> tuple[Tensor, Tensor]:
        """Return outputs in float64 and targets; class scores unless a subclass says otherwise."""
        draw = torch.Generator().manual_seed(1)
        return torch.randn(count, 4, generator=draw, dtype=torch.float64), torch.arange(count) % 4

    def test_scalar_finite_and_untouched(self) -> None:
        """The loss is one finite number, its gradient is finite, and its arguments are not written to."""
        outputs, targets = self.batch()
        kept = outputs.clone(), targets.clone()
        outputs.requires_grad_(True)
        with untouched():
            value = self.loss()(outputs, targets)
            value.backward()
        require(value.ndim == 0, f"the loss has the shape {tuple(value.shape)}")
        finite([value, outputs.grad], "loss and gradient")
        same(kept, (outputs, targets), "the arguments")

    def test_gradient_is_right(self) -> None:
        """Autograd equals finite differences in float64."""
        outputs, targets = self.batch()
        outputs.requires_grad_(True)
        right = torch.autograd.gradcheck(lambda one: self.loss()(one, targets), (outputs,), raise_exception=False)
        require(right, "the gradient differs from finite differences")

    def test_order_of_the_batch_does_not_matter(self) -> None:
        """Samples in another order give the same loss."""
        outputs, targets = self.batch()
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
        one, two = self.loss()(outputs, targets), self.loss()(outputs[order], targets[order])
        require(bool(torch.isclose(one, two, rtol=1e-9)), "the order of the samples matters")


class LayerContract(Contract):
    """Check a layer or architecture."""

    def layer(self) -> nn.Module:
        """Return the layer, its weights drawn from the global generator.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines layer()")

    def inputs(self, count: int) -> Any:
        """Return a batch: a tensor, or a tuple or dict of such.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines inputs(count)")

    def _made(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.layer()

    def _double(self, count: int) -> Any:
        return forward.tree_map(lambda one: one.double() if one.is_floating_point() else one, self.inputs(count))

    def test_weights_follow_the_global_seed(self) -> None:
        """As in torch: one seed gives one layer, another seed another."""
        same(self._made(1), self._made(1), "two layers of one seed")
        one, two = self._made(1).state_dict(), self._made(2).state_dict()
        require(not one or any(not torch.equal(one[name], two[name]) for name in one), "the seed does not matter")

    def test_forward_leaves_everything_alone(self) -> None:
        """A forward in eval mode changes neither the layer nor its inputs nor the process."""
        layer, inputs = self._made().eval(), self.inputs(3)
        kept = forward.tree_map(torch.clone, inputs)
        with untouched(layer):
            finite(forward.outputs(layer, inputs), "outputs")
        same(kept, inputs, "the inputs")

    def test_gradients_are_right(self) -> None:
        """Autograd of all parameters equals finite differences in float64, and every parameter gets a gradient."""
        layer, inputs = self._made().double().eval(), self._double(2)
        named = {name: one for name, one in layer.named_parameters() if one.requires_grad}

        def loss(*values: Tensor) -> Tensor:
            call = torch.func.functional_call
            args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
            swapped = dict(zip(named, values, strict=True))
            found = forward.logits(call(layer, swapped, args, inputs if isinstance(inputs, dict) else None))
            return (found * torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).reshape(found.shape)).sum()

        values = tuple(named.values())
        unused = [name for name, one in zip(named, torch.autograd.grad(loss(*values), values, allow_unused=True),
                                            strict=True) if one is None]  # fmt: skip
        require(not unused, f"no gradient reaches {', '.join(unused)}")
        right = torch.autograd.gradcheck(loss, values, raise_exception=False, fast_mode=True)
        require(right, "a gradient differs from finite differences")

    def test_samples_do_not_mix(self) -> None:
        """In eval mode an output depends on its own sample alone."""
        layer, inputs = self._made().double().eval(), self._double(4)
        with torch.no_grad():
            whole, half = forward.outputs(layer, inputs), forward.outputs(layer, forward.take(inputs, slice(0, 2)))
        require(torch.allclose(whole[:2], half, rtol=1e-9, atol=1e-12), "samples of a batch mix")

    def test_state_and_copies(self) -> None:
        """A layer filled from a saved state, and a deep copy, give the same outputs."""
        layer, other, inputs = self._made(1).eval(), self._made(2).eval(), self.inputs(3)
        other.load_state_dict(through_a_file(layer.state_dict()))
        with torch.no_grad():
            found = forward.outputs(layer, inputs)
            same(found, forward.outputs(other, inputs), "outputs of a loaded layer")
            same(found, forward.outputs(copy.deepcopy(layer), inputs), "outputs of a copy")


class ContinualLearnerContract(ZooContract):
    """Check a continual learner: a penalty that remembers a task."""

    def make(self, model: nn.Module, task: ToyTask) -> ContinualLearner:
        """Return a learner attached to the model.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines make(model, task)")

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Return the penalty after one task at moved weights, and its gradients, on a copy of the model."""
        twin = copy.deepcopy(model)
        learner = self.make(twin, task)
        learner.end_task(task.batches(2))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.05)
        penalty = learner.penalty()
        used = [one for one in twin.parameters() if one.requires_grad]
        return [penalty, *torch.autograd.grad(penalty, used, allow_unused=True, materialize_grads=True)]

    def test_remembering_leaves_the_model_alone(self, case: str) -> None:
        """`end_task` changes no weight, buffer, mode or gradient."""
        model, task = self.problem(case)
        learner = self.make(model, task)
        with untouched(model):
            learner.end_task(task.batches(2))

    def test_penalty_pulls_back(self, case: str) -> None:
        """The penalty is a finite scalar that grows when weights leave where the task was learnt."""
        model, task = self.problem(case)
        learner = self.make(model, task)
        learner.end_task(task.batches(2))
        near = learner.penalty().detach()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        far = learner.penalty().detach()
        finite([near, far], f"penalty on {case}")
        require(far.ndim == 0, f"the penalty is no scalar on {case}")
        require(float(far) > float(near), f"the penalty does not pull back on {case}")


class TrainingRuleContract(ZooContract):
    """Check a training rule: `step` learns from a batch, `predict` answers."""

    def make(self, model: nn.Module, inputs: Any) -> TrainingRule:
        """Return the rule on a model.

        Raises:
            NotImplementedError: Where a subclass does not say which.
        """
        raise NotImplementedError("a contract's subclass defines make(model, inputs)")

    def user_models(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return none: a rule trains its model in place."""
        return ()

    def run(self, model: nn.Module, task: ToyTask, *, seed: int) -> Any:
        """Return the trained model and its predictions after three steps."""
        rule = self.make(model, task.inputs)
        losses = [dict(rule.step((task.inputs, task.targets))) for _ in range(3)]
        return [model, losses, rule.predict(task.inputs)]

    def test_it_learns(self, case: str) -> None:
        """Thirty steps on eight samples bring the loss of the predictions down."""
        model, task = self.problem(case)
        rule = self.make(model, task.inputs)
        before = task.loss_function(rule.predict(task.inputs), task.targets)
        for _ in range(30):
            rule.step((task.inputs, task.targets))
        after = task.loss_function(rule.predict(task.inputs), task.targets)
        require(float(after) < float(before), f"the loss went from {before:.4g} to {after:.4g} on {case}")

    def test_modes_and_frozen_weights_stay(self, case: str) -> None:
        """Every module keeps its mode, and a weight with requires_grad off its value."""
        model, task = self.problem(case)
        frozen = next(iter(model.parameters())).requires_grad_(False)
        kept, modes = frozen.clone(), [module.training for module in model.modules()]
        rule = self.make(model, task.inputs)
        rule.step((task.inputs, task.targets))
        rule.predict(task.inputs)
        require(modes == [module.training for module in model.modules()], f"a mode changed on {case}")
        require(torch.equal(kept, frozen), f"a frozen weight changed on {case}")

    def test_resumes_exactly(self, case: str) -> None:
        """Two steps, a file, two steps equal four steps."""
        models = [self.problem(case)[0] for _ in range(3)]
        task = self.problem(case)[1]
        batch = (task.inputs, task.targets)
        whole, begun, resumed = (self.make(model, task.inputs) for model in models)
        for _ in range(4):
            whole.step(batch)
        for _ in range(2):
            begun.step(batch)
        resumed.load_state_dict(through_a_file(begun.state_dict()))  # type: ignore[attr-defined]
        for _ in range(2):
            resumed.step(batch)
        same(models[0], models[2], f"a resumed run on {case}")

    def test_bad_batches_are_refused(self) -> None:
        """Inputs and targets of different length raise BadData and leave the weights alone."""
        model, task = self.problem(self.supported()[0])
        rule = self.make(model, task.inputs)
        kept = copy.deepcopy(model)
        try:
            rule.step((task.inputs, task.targets[:-1]))
        except BadData:
            same(kept, model, "weights after a refused batch")
            return
        require(False, "a batch whose parts differ in length is accepted")
