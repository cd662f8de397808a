"""Hooks of `nervure.learn.Loop` in a skorch net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nervure._kit import Unsupported, require
from nervure.connect._carried import Carried, Hooks

_skorch: Any = require("skorch", extra="skorch")
_Callback: Any = require("skorch.callbacks", extra="skorch").Callback


class SkorchHooks(_Callback):
    """Carry hooks as a callback of a skorch net.

    All six events are carried: ``batch`` of batches that are (X, y), ``loss`` around `get_loss`, ``gradients`` before
    any other callback sees them (such as clipping), ``after_step``, ``metrics`` and ``stop`` at the end of a batch.
    A stop leaves the epoch unfinished, as an interrupt by the keyboard does. A net that steps in its own way
    (its own `train_step`, accelerate, an optimizer that asks for the loss again and again) is refused.

    Args:
        hooks: Objects with methods of `nervure.learn.Loop`'s hooks, or a function that makes them for the module;
            a net that is cloned (a grid search) needs the function, so that each clone has its own.
        step: Steps already taken by a net whose parameters and history are loaded; needed only by hooks that hold
            a state, which must have been given back to them.

    Examples:
        >>> import numpy
        >>> from skorch import NeuralNetClassifier
        >>> class Half:
        ...     def gradients(self, named):
        ...         return {name: 0.5 * gradient for name, gradient in named.items()}
        >>> net = NeuralNetClassifier(
        ...     torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss, max_epochs=1, train_split=None, verbose=0,
        ...     callbacks=[SkorchHooks([Half()])])
        >>> _ = net.fit(torch.randn(32, 4), torch.zeros(32, dtype=torch.long))
    """

    def __init__(self, hooks: Hooks, *, step: int = 0) -> None:
        self.hooks, self.step = hooks, step
        self.carried_ = Carried(hooks, host="SkorchHooks")

    @property
    def history(self) -> list[dict[str, float]]:
        """Return what the ``metrics`` hooks gave, step by step."""
        return self.carried_.history

    def initialize(self) -> SkorchHooks:
        """Begin anew, as the net does."""
        self.carried_ = Carried(self.hooks, host="SkorchHooks")
        self.carried_.step = self.step
        return self

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Bind the hooks to the module and refuse what this net cannot carry.

        Raises:
            Unsupported: If the net takes its steps in a way of its own, or hooks have lost their state.
        """
        carried = self.carried_
        if isinstance(net.__dict__.get("train_step_single"), _Once):  # a callback failed between two steps
            del net.__dict__["train_step_single"]
        carried.bind(net.module_)
        if type(net).train_step is not _skorch.NeuralNet.train_step or hasattr(net, "accelerator"):
            _refuse_all(carried, "the net takes its steps in a way of its own, with train_step or accelerate")
        optimizers = [getattr(net, f"{name}_") for name in net._optimizers]
        if len(optimizers) > 1 or any(isinstance(one, torch.optim.LBFGS) for one in optimizers):
            _refuse_all(carried, "its optimizers compute the gradients several times a step")
        done = sum(sum("train_loss" in batch for batch in row["batches"]) for row in net.history)
        if done != carried.step:
            if carried.stateful:
                raise Unsupported(
                    "SkorchHooks",
                    carried.stateful[0],
                    why=f"the net is resumed at step {done}, and its files hold no state of callbacks",
                    try_=f"give the hook its state back and SkorchHooks(hooks, step={done})",
                )
            carried.step = done

    def on_batch_begin(self, net: Any, batch: Any = None, training: bool | None = None, **kwargs: Any) -> None:
        """Take the place of the next step's forward and backward pass."""
        if not training:
            return
        if "train_step_single" in net.__dict__:
            _refuse_all(self.carried_, "something else has taken the place of the net's train_step_single")
        net.__dict__["train_step_single"] = _Once(net, self.carried_)

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool | None = None, loss: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Tell the hooks that a step is done.

        Raises:
            KeyboardInterrupt: To end the run, which is how skorch is told to.
        """
        if training and loss is not None and self.carried_.stepped(self.carried_.step + 1, loss.detach()):
            raise KeyboardInterrupt


def _refuse_all(carried: Carried, why: str) -> None:
    carried.refuse(*carried.events, why=why, try_="a net with skorch's own train_step, or nervure.learn.Loop")


class _Once:
    """Let the hooks into one forward and backward pass; the net's own methods are back before anything can fail."""

    def __init__(self, net: Any, carried: Carried) -> None:
        self.net, self.carried = net, carried

    def __call__(self, batch: Any, **fit_params: Any) -> Any:
        """Do what the net's `train_step_single` does."""
        own, carried = self.net.__dict__, self.carried
        del own["train_step_single"]
        own["get_loss"] = self.get_loss
        try:
            found = self.net.train_step_single(carried.pair(batch), **fit_params)
        finally:
            del own["get_loss"]
        carried.gradients()
        return found

    def get_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the net's loss, with what the hooks add."""
        return self.carried.loss(type(self.net).get_loss(self.net, *args, **kwargs))
