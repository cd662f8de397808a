"""Inner distillation: a smaller network keeps the features of the one it was cut from, in any training loop."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import BadModel, Unsupported, UsageError
from nervure.core import forward
from nervure.core.scores import kept_buffers
from nervure.spec import Task


class InnerDistillation:
    """Add weight * mean over points of MSE(map(student's features), teacher's features) to whatever is trained.

    While the context is open, every forward of the student in train mode with gradients runs the teacher (in eval
    mode, without gradients) on the same inputs, and the backward of any loss of its outputs adds the gradient of this
    one. Where the widths differ a linear map without bias takes the student's channels to the teacher's; it starts as
    the least-squares fit on `inputs` and is learnt if `parameters()` are given to the optimizer. The student gets
    hooks, which are gone when the context closes.

    Args:
        student: The smaller network.
        teacher: A network whose modules have the same names; left as it is.
        inputs: Inputs to find shapes on, and to fit the maps.
        at: Names of modules after which features are compared; by default all `stages` but those that give the
            network's output.
        weight: Factor of the loss, at least 0. A loop that accumulates gradients over k batches divides it by k.

    Raises:
        UsageError: If there is no point to compare at, or the weight is negative.
        BadModel: If features differ in more than one axis.

    Examples:
        >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
        >>> with InnerDistillation(student, teacher, x, weight=1.0) as inner:
        ...     optimizer = torch.optim.SGD([*student.parameters(), *inner.parameters()], lr=0.1)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         F.cross_entropy(student(x), y).backward()
        ...         optimizer.step()
        >>> inner.points
        ['0', '1']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        inputs: Any,
        *,
        at: Sequence[str] | None = None,
        weight: float = 20.0,
    ) -> None:
        if weight < 0:
            raise UsageError("the weight of a loss is negative", expected="weight >= 0", found=weight)
        self.student, self.teacher, self.weight = student, teacher, weight
        names = stages(student) if at is None else list(at)
        mine, theirs = (_features(net, names, inputs) for net in (student, teacher))
        if at is None:
            with kept_buffers(student):
                output = forward.predict(student, inputs)
            mine = {name: one for name, one in mine.items() if not torch.equal(one, output)}
        self.points = [name for name in names if name in mine and name in theirs]
        if not self.points or (at is not None and len(self.points) < len(names)):
            missing = sorted({*names} - {*self.points})
            raise UsageError("there is no tensor to compare after a module", found=missing, try_="at=[...]")
        device = next(student.parameters()).device
        self.axes = {name: _axis(name, mine[name], theirs[name]) for name in self.points}
        self.maps = {
            name: _fitted(mine[name], theirs[name], axis).to(device)
            for name, axis in self.axes.items()
            if axis is not None
        }
        self._wanted: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def parameters(self) -> list[Tensor]:
        """Return the weights of the maps."""
        return [one.weight for one in self.maps.values()]

    def __enter__(self) -> InnerDistillation:
        modules = dict(self.student.named_modules(remove_duplicate=False))
        self._stack.callback(self.student.register_forward_pre_hook(self._ask, with_kwargs=True).remove)
        for name in self.points:
            self._stack.callback(modules[name].register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._wanted = {}

    def loss(self, name: str, features: Tensor, wanted: Tensor) -> Tensor:
        """Return the squared error at one point, averaged over the features.

        Args:
            name: The point.
            features: The student's.
            wanted: The teacher's.

        Returns:
            A scalar.
        """
        axis = self.axes[name]
        if axis is None:
            return F.mse_loss(features, wanted)
        return F.mse_loss(self.maps[name](features.movedim(axis, -1)), wanted.movedim(axis, -1))

    def _ask(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._wanted = {}
        if module.training and torch.is_grad_enabled():
            self._wanted = _features(self.teacher, self.points, kwargs or args)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if name not in self._wanted:
                return None
            features = _tensor(output)
            loss = self.loss(name, features, self._wanted[name]) * (self.weight / len(self.points))
            added = _Added.apply(features, loss)
            return added if isinstance(output, Tensor) else (added, *output[1:])

        return add


def fine_tune(student: nn.Module, parent: nn.Module, task: Task, *, steps: int, weight: float, part: int = 0) -> None:
    """Train a pruned network in place under inner distillation; see `InnerDistillation`.

    Args:
        student: The pruned network.
        parent: What it was cut from; left as it is.
        task: Its training takes an `optimizer`.
        steps: Optimizer steps.
        weight: Weight of the distillation; 0 is plain training.
        part: Number of the training, which decides the batches.

    Raises:
        Unsupported: If the task's training takes no optimizer.
    """
    if not steps or not weight:
        task.train(student, steps=steps, part=part)
        return
    if "optimizer" not in inspect.signature(task.train).parameters:
        why = "its task trains with no other optimizer, and the maps of the distillation must be learnt"
        raise Unsupported("InnerDistillation", student, why=why, try_="a weight of 0, or your own loop")
    inner = InnerDistillation(student, parent, task.batches(1)[0][0], weight=weight)

    def learn_maps(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if inner.maps:
            optimizer.add_param_group({"params": inner.parameters()})
        return optimizer

    with inner:
        task.train(student, steps=steps, part=part, optimizer=learn_maps)


class _Added(torch.autograd.Function):
    """Pass features on; backward, a loss of them gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor) -> Tensor:
        return features.clone()  # layers that follow may work in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), dtype=gradients[0].dtype, device=gradients[0].device)


def stages(model: nn.Module) -> list[str]:
    """Return the names of a network's stages: elements of its lists and sequences, and its other children.

    Args:
        model: The network.

    Returns:
        The names in the order of registration.

    Examples:
        >>> stages(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1))))
        ['0', '1.0', '1.1']
    """
    found = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            found.append(name)
    return found


@torch.no_grad()
def _features(model: nn.Module, names: Sequence[str], inputs: Any) -> dict[str, Tensor]:
    """Return what modules give back that are called once and return a tensor, or a tuple that begins with one.

    Raises:
        UsageError: If the model has no such module.
    """
    seen: dict[str, list[Tensor | None]] = {name: [] for name in names}
    known = dict(model.named_modules(remove_duplicate=False))
    unknown = sorted({*names} - {*known})
    if unknown:
        raise UsageError("the model has no such module", found=unknown)
    with ExitStack() as stack, forward.mode(model, train=False), kept_buffers(model):
        for name in names:

            def watch(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                found = _tensor(output)
                seen[name].append(None if found is None else found.clone())

            stack.callback(known[name].register_forward_hook(watch).remove)
        forward.call(model, inputs)
    once = {name: calls[0] for name, calls in seen.items() if len(calls) == 1}
    return {name: one for name, one in once.items() if one is not None and one.ndim > 1}


def _tensor(output: Any) -> Any:
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _axis(name: str, mine: Tensor, theirs: Tensor) -> int | None:
    """Return the one axis in which the widths differ, or None.

    Raises:
        BadModel: If more differ.
    """
    if mine.shape == theirs.shape:
        return None
    differ = [
        axis for axis in range(1, mine.ndim) if mine.ndim == theirs.ndim and mine.shape[axis] != theirs.shape[axis]
    ]
    if len(differ) != 1 or len(mine) != len(theirs):
        raise BadModel(
            f"the features after {name} differ in more than the number of channels",
            expected=tuple(theirs.shape),
            found=tuple(mine.shape),
        )
    return differ[0]


def _fitted(mine: Tensor, theirs: Tensor, axis: int) -> nn.Linear:
    """Return the linear map that takes one to the other with least squared error, slightly damped."""
    x, y = (one.movedim(axis, -1).flatten(0, -2).double() for one in (mine, theirs))
    gram = x.T @ x
    damped = gram + (1e-6 * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    linear = nn.utils.skip_init(nn.Linear, x.shape[1], y.shape[1], bias=False, dtype=mine.dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.solve(damped, x.T @ y).T)
    return linear
