"""A slim training loop with a step budget, six hooks and exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from nervure._kit import BadBudget, BadData, Diverged
from nervure.core import forward, rng

LossFunction = Callable[[Any, Any], Tensor]
HOOKS = ("batch", "loss", "gradients", "after_step", "metrics", "stop")


class Loop:
    """Train a model for a number of optimizer steps.

    Batches depend on (seed, epoch) only, so two methods with one seed see the same batches. The loop keeps its
    own random stream (dropout and the like); the global generators are left as they were.

    A hook is any object that has some of these methods; each returns a value instead of changing shared state:

    - ``batch(inputs, targets) -> (inputs, targets)``: augmentation.
    - ``loss(loss, model) -> loss``: penalties.
    - ``gradients(named) -> named``: masks, projections, noise; a dict of name -> gradient.
    - ``after_step(step) -> None``: put masks back, move averages; the only one called for its effect.
    - ``metrics(step, loss) -> dict``: numbers to keep in `history`.
    - ``stop(step, loss) -> bool``: true ends the run.

    Args:
        model: Any module; inputs are passed as `nervure.core.forward.call` says.
        optimizer: Any torch optimizer over its parameters.
        data: (inputs, targets), each a tensor; inputs may be a tuple or dict of tensors.
        loss: From (outputs, targets) to a scalar; cross-entropy of the main output by default.
        batch_size: Samples per optimizer step (all micro-batches together).
        accumulate: Number of micro-batches a step is cut into, at least 1.
        precision: ``"float32"`` leaves the model's own type; ``"bf16"`` computes under autocast.
        clip: Largest gradient norm, or None.
        schedule: A torch learning-rate scheduler stepped after every optimizer step, or None.
        hooks: Objects with some of the methods above.
        seed: Decides batches and the loop's random stream.

    Raises:
        BadData: If inputs and targets differ in length.
        BadBudget: If a size is not positive.

    Examples:
        >>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
        >>> model = nn.Linear(8, 3)
        >>> loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), (x, y), batch_size=16)
        >>> loop.run(10).step
        10

        The same by hand:

        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for start in range(0, 64, 16):
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(x[start : start + 16]), y[start : start + 16]).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: tuple[Any, Any],
        *,
        loss: LossFunction | None = None,
        batch_size: int = 64,
        accumulate: int = 1,
        precision: Literal["float32", "bf16"] = "float32",
        clip: float | None = None,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        hooks: Iterable[object] = (),
        seed: int = 0,
    ) -> None:
        inputs, targets = data
        self.count = forward.batch_size(inputs)
        if self.count != len(targets) or self.count == 0:
            raise BadData("inputs and targets differ in length", expected=f"{self.count} > 0", found=len(targets))
        if batch_size < 1 or accumulate < 1:
            raise BadBudget("sizes must be positive", found=f"batch_size={batch_size}, accumulate={accumulate}")
        self.model, self.optimizer, self.inputs, self.targets = model, optimizer, inputs, targets
        self.loss: LossFunction = loss or cross_entropy
        self.batch_size, self.accumulate = min(batch_size, self.count), accumulate
        self.precision, self.clip, self.schedule, self.seed = precision, clip, schedule, seed
        self.hooks = {name: [getattr(hook, name) for hook in hooks if hasattr(hook, name)] for name in HOOKS}
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._stream = rng.generator("loop", seed).get_state()
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return the batch of a step: epochs are reshuffled by (seed, epoch), a ragged rest is left out.

        Args:
            step: Number of the step, from 0.

        Returns:
            Inputs and targets.
        """
        per_epoch = self.count // self.batch_size
        epoch, place = divmod(step, per_epoch)
        if self._order[0] != epoch:
            draw = rng.generator("order", self.seed, epoch)
            self._order = (epoch, torch.randperm(self.count, generator=draw))
        index = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return forward.take(self.inputs, index), forward.take(self.targets, index)

    def run(self, steps: int) -> Loop:
        """Train for `steps` further optimizer steps.

        Args:
            steps: Number of steps, at least 0.

        Returns:
            The loop itself.

        Raises:
            Diverged: When a loss is NaN or infinite; the model keeps its last finite weights.
        """
        device = next(self.model.parameters()).device
        with forward.mode(self.model, train=True), rng.scope():
            torch.set_rng_state(self._stream)
            try:
                for _ in range(steps):
                    if self._one_step(device):
                        break
            finally:
                self._stream = torch.get_rng_state()
        return self

    def _one_step(self, device: torch.device) -> bool:
        inputs, targets = self.batch(self.step)
        inputs = forward.tree_map(lambda tensor: tensor.to(device), inputs)
        targets = forward.tree_map(lambda tensor: tensor.to(device), targets)
        for hook in self.hooks["batch"]:
            inputs, targets = hook(inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        value = self._backward(inputs, targets)
        if not math.isfinite(value):
            self.optimizer.zero_grad(set_to_none=True)
            raise Diverged(self.step, value)
        if self.hooks["gradients"]:
            self._transform_gradients()
        if self.clip is not None:
            clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        for hook in self.hooks["after_step"]:
            hook(self.step)
        for hook in self.hooks["metrics"]:
            self.history.append({"step": self.step, **hook(self.step, value)})
        return any(hook(self.step, value) for hook in self.hooks["stop"])

    def _backward(self, inputs: Any, targets: Any) -> float:
        count, total = forward.batch_size(inputs), 0.0
        size = math.ceil(count / self.accumulate)
        for start in range(0, count, size):
            part = slice(start, start + size)
            some, labels = (inputs, targets) if size == count else (forward.take(inputs, part), targets[part])
            with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, self.precision == "bf16"):
                loss = self.loss(forward.call(self.model, some), labels)
            for hook in self.hooks["loss"]:
                loss = hook(loss, self.model)
            share = 1.0 if size == count else forward.batch_size(some) / count
            (loss if share == 1.0 else loss * share).backward()
            total += float(loss.detach()) * share
        return total

    def _transform_gradients(self) -> None:
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for hook in self.hooks["gradients"]:
            named = hook(named)
        for name, parameter in self.model.named_parameters():
            parameter.grad = named.get(name)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on bit for bit: tensors, numbers and text only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "step": self.step,
            "stream": self._stream,
            "history": list(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Args:
            state: What `state_dict` returned, from a loop with the same data, sizes and seed.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self._stream, self.history = state["step"], state["stream"], list(state["history"])


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the main output, over positions too for language models.

    Args:
        output: What the model returned.
        targets: Class numbers, shape (N,) or (N, positions).

    Returns:
        A scalar.
    """
    scores = forward.logits(output)
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


def accuracy(model: nn.Module, inputs: Any, targets: Tensor) -> float:
    """Return the share of right answers, in eval mode and without gradients.

    Args:
        model: The model.
        inputs: All inputs.
        targets: Class numbers.

    Returns:
        A number in [0, 1].
    """
    return float((forward.predict(model, inputs).argmax(-1) == targets).double().mean())
