"""Choose how a population runs, check the choice against sequential training, and run it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nervure._kit import CouldNotRun
from nervure.core import forward, rng
from nervure.core.population import agreement, batched
from nervure.core.population.optim import Optimizer
from nervure.core.population.stack import Stack

Way = Literal["batched", "vmap", "sequential"]
_COMPILERS: dict[str, Callable[[Stack, Any], batched.Program]] = {
    "batched": batched.trace,
    "vmap": lambda stack, inputs: batched.whole(stack),
}
# A network whose own step takes this long is bound by its arithmetic: there is no overhead left to share.
_HEAVY_SECONDS = 0.02
_WORTH = 1.05


@dataclass(frozen=True)
class Backend:
    """Say how the population is trained and why.

    Args:
        name: ``"batched"``: one batched operation for each node of the traced graph; ``"vmap"``: the whole network
            under `torch.vmap`; ``"sequential"``: one member after the other.
        why: The reason, with the measured ratio where it was measured.
    """

    name: Way
    why: str


class Engine:
    """Run all members of a stack: batched where that agrees with sequential training and is faster, else one by one.

    Args:
        stack: The members.
        optimizer: The optimizer.
        loss: From one member's output and targets to a scalar.
        wanted: A backend's name, or ``"auto"``.
    """

    def __init__(
        self, stack: Stack, optimizer: Optimizer, loss: Callable[[Any, Any], Tensor], wanted: Way | Literal["auto"]
    ) -> None:
        self.stack, self.optimizer, self.loss, self.wanted = stack, optimizer, loss, wanted
        self.weights = [stack.parameters[name] for name in stack.trainable]
        self.choices: dict[str, Backend] = {}
        self.pinned: dict[str, Way] = {}
        self._programs: dict[str, batched.Program | None] = {}

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Take one optimizer step with every member.

        Args:
            inputs: Stacked inputs.
            targets: Stacked targets.

        Returns:
            The losses before the step, shape (n,).
        """
        key = _structure(inputs)
        if key not in self.choices:
            self.choices[key] = self._choose(key, inputs, targets)
        self.stack.train(True)
        return self._step(self._programs[key], inputs, targets)

    def forget_rates(self) -> None:
        """Compile anew, at the next step, the programs that copied the dropout rates; the others read them anew."""
        for key, program in self._programs.items():
            if getattr(program, "baked", program is not None):
                self.choices.pop(key, None)

    def outputs(self, inputs: Any) -> Tensor:
        """Return every member's main output in eval mode.

        Args:
            inputs: Stacked inputs.

        Returns:
            The outputs, shape (n, B, ...).
        """
        self.stack.train(False)
        program = self._eval_program(inputs)
        return self._alone(inputs) if program is None else forward.logits(program(inputs))

    def _step(self, program: batched.Program | None, inputs: Any, targets: Any) -> Tensor:
        if program is not None:
            losses, gradients = self._together(program, inputs, targets)
            with torch.no_grad():
                self.optimizer.update(self.weights, gradients)
            return losses
        losses = torch.empty(len(self.stack), dtype=self.weights[0].dtype, device=self.stack.device)
        with self.stack.streams() as switch:
            for index in range(len(self.stack)):
                switch(index)
                loss, gradients = self._one(index, inputs, targets)
                losses[index] = loss
                with torch.no_grad():
                    self.optimizer.update_member(index, self.stack.rows[index], gradients)
        return losses

    def _one(self, index: int, inputs: Any, targets: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        mine = forward.tree_map(lambda tensor: tensor[index], inputs)
        output = forward.call(self.stack.members[index], mine)
        loss = self.loss(output, forward.tree_map(lambda tensor: tensor[index], targets))
        gradients = torch.autograd.grad(loss, self.stack.rows[index], allow_unused=True)
        self.stack.collect(index)
        return loss.detach(), gradients

    def _together(
        self, program: batched.Program, inputs: Any, targets: Any
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        losses = batched.member_losses(self.loss, program(inputs), targets)
        leaves = [self.stack.leaves[name] for name in self.stack.trainable]
        return losses.detach(), torch.autograd.grad(losses.sum(), leaves, allow_unused=True)

    def _alone(self, inputs: Any) -> Tensor:
        with self.stack.streams() as switch:
            parts = []
            for index, member in enumerate(self.stack.members):
                switch(index)
                parts.append(forward.outputs(member, forward.tree_map(lambda v, i=index: v[i], inputs)))  # type: ignore[misc]
        return torch.stack(parts)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo everything inside: weights, state, random streams, also after an exception."""
        state = {**self.stack.state_dict(), "optimizer": self.optimizer.state_dict()}
        with rng.scope():
            try:
                yield
            finally:
                with torch.no_grad():
                    self.stack.load_state_dict(state)
                    self.optimizer.load_state_dict(state["optimizer"])

    def _choose(self, key: str, inputs: Any, targets: Any) -> Backend:
        wanted = self.pinned.get(key, self.wanted)
        self._programs[key] = None
        if wanted == "sequential":
            return Backend("sequential", "asked for")
        if self.stack.has_hooks():
            return self._settle(wanted, ["a module has hooks, which a batched program would not call"])
        self.stack.train(True)
        attributes = self.stack.attributes()
        try:
            with self._undone():
                reference = self._reference(inputs, targets)
        finally:
            changed = self.stack.restore(attributes)
        if changed:
            return self._settle(wanted, [f"forward sets {', '.join(changed)}, which a batched program would not"])
        if wanted == "auto":
            seconds = self._seconds(None, inputs, targets, rounds=1) / len(self.stack)
            if seconds > _HEAVY_SECONDS:
                return Backend("sequential", f"one member's step takes {seconds:.3f} s: no overhead is left to share")
        reasons = []
        for name in _COMPILERS if wanted == "auto" else (wanted,):
            try:
                # A warning of vmap means an operation that it runs member by member.
                with warnings.catch_warnings(), self._undone():
                    warnings.simplefilter("error")
                    program = _COMPILERS[name](self.stack, forward.tree_map(lambda tensor: tensor[0], inputs))
                    found = agreement.Step(*self._together(program, inputs, targets), self.stack.state_dict())
                    agreement.check(found, reference, self.stack.trainable)
            except Exception as error:
                reasons.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
                continue
            why = "asked for; it agrees with sequential training on the first batch"
            if wanted == "auto":
                ratio = self._speedup(program, inputs, targets)
                why = f"{ratio:.1f} times as fast as one member after the other on the first batch"
                if ratio < _WORTH:
                    reasons.append(f"{name}: only {why}")
                    continue
            self._programs[key] = program
            return Backend(name, why)  # type: ignore[arg-type]
        return self._settle(wanted, reasons)

    def _settle(self, wanted: str, reasons: Sequence[str]) -> Backend:
        if wanted != "auto":
            raise CouldNotRun(
                f"the population cannot be trained by the backend {wanted!r}: {'; '.join(reasons)}",
                try_='backend="auto", which falls back to one member after the other',
            )
        return Backend("sequential", "; ".join(reasons))

    def _reference(self, inputs: Any, targets: Any) -> agreement.Step:
        losses, rows = [], []
        with self.stack.streams() as switch:
            for index in range(len(self.stack)):
                switch(index)
                loss, gradients = self._one(index, inputs, targets)
                losses.append(loss)
                rows.append(gradients)
        stacked = [None if None in column else torch.stack(column) for column in zip(*rows, strict=True)]
        return agreement.Step(torch.stack(losses), stacked, self.stack.state_dict())

    def _speedup(self, program: batched.Program, inputs: Any, targets: Any) -> float:
        self._seconds(program, inputs, targets, rounds=1)  # warm up
        alone, together = float("inf"), float("inf")
        for _ in range(3):
            together = min(together, self._seconds(program, inputs, targets, rounds=2))
            alone = min(alone, self._seconds(None, inputs, targets, rounds=2))
        return alone / together

    def _seconds(self, program: batched.Program | None, inputs: Any, targets: Any, *, rounds: int) -> float:
        with self._undone():
            best = float("inf")
            for _ in range(rounds):
                start = time.perf_counter()
                self._step(program, inputs, targets)
                best = min(best, time.perf_counter() - start)
        return best

    def _eval_program(self, inputs: Any) -> batched.Program | None:
        """Return the batched program for eval mode if training is batched and its outputs agree, else None.

        Raises:
            CouldNotRun: If a backend was asked for by name and cannot evaluate.
        """
        key = f"eval {_structure(inputs)}"
        chosen = self.choices.get(key[5:])
        name = chosen.name if chosen else "sequential" if self.wanted == "auto" else self.wanted
        if name == "sequential":
            return None
        if key not in self._programs:
            try:
                with warnings.catch_warnings(), self._undone():
                    warnings.simplefilter("error")
                    program = _COMPILERS[name](self.stack, forward.tree_map(lambda tensor: tensor[0], inputs))
                    agreement.close("the output", forward.logits(program(inputs)), self._alone(inputs))
                self._programs[key] = program
            except Exception as error:
                if self.wanted != "auto":
                    raise CouldNotRun(
                        f"the backend {name!r} cannot evaluate: {error}", try_='backend="auto"'
                    ) from error
                self._programs[key] = None
        return self._programs[key]


def _structure(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return f"dict {list(inputs)}"
    return f"tuple {len(inputs)}" if isinstance(inputs, tuple | list) else "tensor"
