"""Hooks sorted by event, as every adapter calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nervure._kit import BadData, Unsupported, UsageError
from nervure.learn.loop import HOOKS

Hooks = Iterable[object] | Callable[[nn.Module], Iterable[object]]
"""Objects with methods of `nervure.learn.Loop`'s hooks, or a function that makes them for a model."""


class Carried:
    """Call the hooks of a run, and keep what `nervure.learn.Loop` would keep.

    Args:
        hooks: The hooks, or a function that makes them for a model.
        host: The adapter's name, for refusals.

    Raises:
        UsageError: If the hooks can be read but once, as those of a generator.
    """

    def __init__(self, hooks: Hooks, *, host: str) -> None:
        if isinstance(hooks, Iterator):
            raise UsageError(f"{host} may need its hooks again", expected="a list, or a function of the model")
        self.given, self.host = hooks, host
        self.model: nn.Module | None = None
        self.hooks: list[object] = []
        self.events: dict[str, list[tuple[object, Callable[..., Any]]]] = {name: [] for name in HOOKS}
        self.step = 0
        self.history: list[dict[str, float]] = []

    def bind(self, model: nn.Module) -> None:
        """Take up a model; hooks made for another model are made anew.

        Args:
            model: The model whose parameters the hooks name.

        Raises:
            UsageError: If a hook has no method of a hook.
        """
        if model is self.model:
            return
        found = list(self.given(model) if callable(self.given) else self.given)
        events: dict[str, list[tuple[object, Callable[..., Any]]]] = {
            name: [(hook, getattr(hook, name)) for hook in found if callable(getattr(hook, name, None))]
            for name in HOOKS
        }
        heard = {id(hook) for pairs in events.values() for hook, _ in pairs}
        idle = [type(hook).__name__ for hook in found if id(hook) not in heard]
        if idle:
            raise UsageError(f"{self.host} got what is no hook", expected=f"some of {HOOKS}", found=", ".join(idle))
        self.model, self.hooks, self.events = model, found, events

    def has(self, event: str) -> bool:
        """Return whether any hook listens to an event."""
        return bool(self.events[event])

    def refuse(self, *events: str, why: str, try_: str | None = None) -> None:
        """Refuse events that the host cannot carry, if any hook listens to them.

        Args:
            *events: The events.
            why: The reason.
            try_: What to do instead.

        Raises:
            Unsupported: Naming the hook and the event.
        """
        for event in events:
            for hook, _ in self.events[event]:
                raise Unsupported(self.host, f"{type(hook).__name__}.{event}", why=why, try_=try_)

    def batch(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return the batch the hooks make of a batch."""
        for _, hook in self.events["batch"]:
            inputs, targets = hook(inputs, targets)
        return inputs, targets

    def pair(self, batch: Any) -> Any:
        """Return what the hooks make of a batch that is a pair.

        Args:
            batch: Inputs and targets; anything else is refused if a hook listens.

        Returns:
            The batch, of the same type.
        """
        if not self.has("batch"):
            return batch
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            self.refuse("batch", why=f"the batch is no pair of inputs and targets but a {type(batch).__name__}")
        return getattr(type(batch), "_make", type(batch))(self.batch(*batch))  # a named tuple stays one

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss the hooks make of a loss, in full precision as in `nervure.learn.Loop`."""
        with torch.autocast(loss.device.type, enabled=False):
            for _, hook in self.events["loss"]:
                loss = hook(loss, self.model)
        return loss

    def gradients(self) -> None:
        """Put the gradients the hooks make of the gradients in their place."""
        if not self.has("gradients"):
            return
        assert self.model is not None
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for _, hook in self.events["gradients"]:
            named = hook(named)
        for name, parameter in self.model.named_parameters():
            parameter.grad = named.get(name)

    def stepped(self, step: int, loss: float | Tensor) -> bool:
        """Tell the hooks that an optimizer step is done.

        Args:
            step: How many steps are done.
            loss: The loss of this one; a scalar.

        Returns:
            Whether the run shall end.
        """
        self.step = step
        for _, hook in self.events["after_step"]:
            hook(step)
        if not (self.has("metrics") or self.has("stop")):
            return False  # a loss nobody asks for stays where it is
        value = float(loss)
        for _, hook in self.events["metrics"]:
            self.history.append({"step": step, **hook(step, value)})
        return any(hook(step, value) for _, hook in self.events["stop"])

    @property
    def stateful(self) -> list[str]:
        """Return the names of the hooks that have a state to keep."""
        return [type(hook).__name__ for hook in self.hooks if hasattr(hook, "load_state_dict")]

    def state_dict(self) -> dict[str, Any]:
        """Return step, history and the states of the hooks that have one."""
        states = [hook.state_dict() if hasattr(hook, "load_state_dict") else None for hook in self.hooks]  # type: ignore[attr-defined]
        return {"step": self.step, "history": list(self.history), "hooks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state: The state.

        Raises:
            BadData: If it is of other hooks.
        """
        given = [each is not None for each in state["hooks"]]
        wanted = [hasattr(hook, "load_state_dict") for hook in self.hooks]
        if given != wanted:
            raise BadData(f"the checkpoint's hooks are not those of {self.host}", expected=wanted, found=given)
        self.step, self.history = int(state["step"]), list(state["history"])
        for hook, each in zip(self.hooks, state["hooks"], strict=True):
            if each is not None:
                hook.load_state_dict(each)  # type: ignore[attr-defined]
