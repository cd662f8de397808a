"""Train n networks of one shape as one, by the fastest of the ways that give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nervure._kit import BadData, UsageError
from nervure.core import forward, rng
from nervure.core.population import batched
from nervure.core.population.engine import Backend, Engine, Way
from nervure.core.population.optim import Optimizer
from nervure.core.population.stack import Stack


@dataclass(frozen=True)
class Scores:
    """Hold every member's scores on one data set.

    Args:
        loss: Mean loss, shape (n,).
        accuracy: Share of right answers, shape (n,), or None where targets are not classes.
    """

    loss: Tensor
    accuracy: Tensor | None


def order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order in which a member sees its samples in one epoch.

    Args:
        seed: The member's seed.
        epoch: The epoch, from 0.
        count: Number of samples.

    Returns:
        A permutation of range(count).
    """
    return torch.randperm(count, generator=rng.generator("order", seed, epoch))


class Population:
    """Train n networks of one shape as one, each with its own weights, hyper-parameters, data order and dropout.

    Whatever the backend, member i gets the numbers it would get if it were trained alone by the torch optimizer after
    ``torch.manual_seed(seeds[i])``, to rounding. With ``backend="auto"`` the first step compares a batched program
    with that sequential training (losses, gradients, buffers, random streams), times both, undoes the trial, and
    keeps the batched one only if it agrees and is faster. Which one is faster can differ between machines, and with
    it the last bits: name a backend where results must be equal bit by bit.

    Args:
        networks: The networks; they are copied and left as they were.
        optimizer: `SGD`, `Adam` or `AdamW` of this package; its numbers may differ by member.
        loss: From one member's output and targets to a scalar; cross-entropy over the last axis by default.
        seeds: One for each member; 0, 1, ... by default.
        backend: ``"auto"``, or one of the names in `Backend`.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(6)]
        >>> from nervure.core.population import SGD
        >>> crowd = Population(nets, optimizer=SGD(lr=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), backend="batched")
        >>> crowd.step(torch.randn(6, 16, 4), torch.randint(3, (6, 16))).shape
        torch.Size([6])
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        optimizer: Optimizer,
        loss: Callable[[Any, Any], Tensor] = batched.cross_entropy,
        seeds: Sequence[int] | None = None,
        backend: Way | Literal["auto"] = "auto",
    ) -> None:
        if backend not in ("auto", "batched", "vmap", "sequential"):
            raise UsageError(f"there is no backend {backend!r}", expected="auto, batched, vmap or sequential")
        self.stack = Stack(networks, range(len(networks)) if seeds is None else seeds)
        self.optimizer, self.loss, self.steps = optimizer, loss, 0
        self._engine = Engine(self.stack, optimizer, loss, backend)
        optimizer.attach(self._engine.weights)

    @classmethod
    def build(cls, build: Callable[[], nn.Module], *, seeds: Iterable[int], **options: Any) -> Population:
        """Build one network after ``torch.manual_seed(seed)`` for each seed; the global generators are left alone.

        Args:
            build: Builds a network.
            seeds: The seeds.
            **options: As for `Population`.

        Returns:
            The population.
        """
        seeds, networks = list(seeds), []
        with rng.scope():
            for seed in seeds:
                torch.manual_seed(seed)
                networks.append(build())
        return cls(networks, seeds=seeds, **options)

    def __len__(self) -> int:
        return len(self.stack)

    @property
    def backend(self) -> Backend:
        """Return how the population is trained and why.

        Raises:
            UsageError: If no step was taken yet: the choice is made on the first batch.
        """
        if not self._engine.choices:
            raise UsageError("the backend is chosen on the first batch", try_="step or fit first")
        return list(self._engine.choices.values())[-1]

    def step(self, inputs: Any, targets: Any, *, shared: bool = False) -> Tensor:
        """Take one optimizer step with every member.

        Args:
            inputs: A tensor, or a tuple or dict of tensors, each (n, B, ...); (B, ...) with `shared`.
            targets: Targets, (n, B, ...); (B, ...) with `shared`.
            shared: Every member gets the same batch.

        Returns:
            The losses before the step, shape (n,).
        """
        inputs, targets = self._spread(inputs, shared), self._spread(targets, shared)
        losses = self._engine.step(inputs, targets)
        self.steps += 1
        return losses

    def fit(self, inputs: Any, targets: Any, *, steps: int, batch_size: int = 64) -> Tensor:
        """Take `steps` steps; every member goes through the samples in its own order (see `order`).

        A later call goes on where this one stopped.

        Args:
            inputs: All inputs, each (N, ...).
            targets: All targets, (N, ...).
            steps: Number of steps, at least 0.
            batch_size: Samples a member sees in a step; what an epoch leaves over is dropped.

        Returns:
            The losses, shape (steps, n).

        Raises:
            BadData: If there are fewer samples than one batch.
        """
        count = forward.batch_size(inputs)
        if not 1 <= batch_size <= count:
            raise BadData("the data cannot fill one batch", expected=f"at most {count}", found=batch_size)
        rounds, losses, epoch = count // batch_size, [], -1
        for _ in range(steps):
            if self.steps // rounds != epoch:
                epoch = self.steps // rounds
                orders = torch.stack([order(seed, epoch, count) for seed in self.stack.seeds])
            at = self.steps % rounds * batch_size
            index = orders[:, at : at + batch_size]
            losses.append(self.step(_gather(inputs, index), _gather(targets, index)))
        return torch.stack(losses) if losses else torch.empty(0, len(self))

    @torch.no_grad()
    def predict(self, inputs: Any, *, shared: bool = True, batch: int = 256) -> Tensor:
        """Return every member's main outputs in eval mode.

        Args:
            inputs: (N, ...) with `shared`, else (n, N, ...).
            shared: Every member gets the same inputs.
            batch: Samples a member sees at a time, at least 1.

        Returns:
            The outputs, shape (n, N, ...).
        """
        inputs = self._spread(inputs, shared)
        count = forward.batch_size(forward.tree_map(lambda value: value[0], inputs))
        parts = []
        for start in range(0, count, batch):
            part = forward.tree_map(lambda value, start=start: value[:, start : start + batch], inputs)  # type: ignore[misc]
            parts.append(self._engine.outputs(part))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def evaluate(self, inputs: Any, targets: Tensor, *, batch: int = 256) -> Scores:
        """Score every member on the same data in eval mode.

        The loss is that of the main output on all samples at once.

        Args:
            inputs: All inputs, each (N, ...).
            targets: All targets, (N, ...).
            batch: Samples a member sees at a time, at least 1.

        Returns:
            The scores.
        """
        outputs = self.predict(inputs, batch=batch)
        loss = torch.stack([self.loss(output, targets) for output in outputs])
        classes = not targets.is_floating_point() and outputs.ndim == targets.ndim + 2
        right = (outputs.argmax(-1) == targets).flatten(1).double().mean(1) if classes else None
        return Scores(loss, right)

    def member(self, index: int) -> nn.Module:
        """Return a plain copy of one member with its weights and buffers.

        Args:
            index: The member.

        Returns:
            The module; it shares nothing with the population.
        """
        return self.stack.member(index)

    def copy_member(self, source: int, target: int) -> None:
        """Overwrite one member by another: weights, buffers and optimizer state; its numbers and seed stay its own.

        Args:
            source: The member that is copied.
            target: The member that is overwritten.
        """
        self.select([source if index == target else index for index in range(len(self))])

    @torch.no_grad()
    def select(self, parents: Sequence[int]) -> None:
        """Overwrite every member by its parent, all at once: weights, buffers and optimizer state.

        Args:
            parents: For each member the index of its parent; its own index leaves it alone.

        Raises:
            UsageError: If there is not one parent for each member.
        """
        if len(parents) != len(self) or not all(0 <= parent < len(self) for parent in parents):
            raise UsageError("the parents are not members", expected=f"{len(self)} indices", found=list(parents))
        children = [index for index, parent in enumerate(parents) if parent != index]
        if children:
            self.stack.select(children, [parents[index] for index in children])
            self.optimizer.select(children, [parents[index] for index in children])

    def set_dropout(self, index: int, rate: float) -> None:
        """Set the rate of every dropout layer of one member.

        Args:
            index: The member.
            rate: The rate in [0, 1).

        Raises:
            UsageError: If the networks have no dropout layer or the rate is outside its range.
        """
        if not self.stack.dropouts or not 0 <= rate < 1:
            raise UsageError("the dropout rate cannot be set", expected="dropout layers and 0 <= rate < 1", found=rate)
        for layers in self.stack.dropouts.values():
            layers[index].p = rate
        self._engine.forget_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a resumed run needs to go on exactly as this one would."""
        return {
            **self.stack.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "backends": {key: choice.name for key, choice in self._engine.choices.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; the backend chosen then is used again.

        Args:
            state: The state of a population of the same networks and optimizer.
        """
        self.stack.load_state_dict(dict(state))
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self._engine.pinned = dict(state["backends"])
        self._engine.choices.clear()

    def _spread(self, value: Any, shared: bool) -> Any:
        count = len(self)
        if shared:
            return forward.tree_map(lambda tensor: tensor.expand(count, *tensor.shape), value)

        def check(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2 or len(tensor) != count:
                raise BadData(
                    "the batch has no axis of members",
                    expected=f"({count}, B, ...)",
                    found=tuple(tensor.shape),
                    try_="shared=True where all members get one batch",
                )
            return tensor

        return forward.tree_map(check, value)


def _gather(values: Any, index: Tensor) -> Any:
    flat = index.reshape(-1)
    return forward.tree_map(
        lambda value: value.index_select(0, flat.to(value.device)).unflatten(0, tuple(index.shape)), values
    )
