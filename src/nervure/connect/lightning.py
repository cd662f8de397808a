"""Hooks of `nervure.learn.Loop` in a Lightning trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nervure._kit import Unsupported, require
from nervure.connect._carried import Carried, Hooks

_Callback: Any = require("lightning.pytorch", extra="lightning").Callback


class LightningHooks(_Callback):
    """Carry hooks as a callback of a Lightning trainer.

    All six events are carried: ``batch`` of batches that are (inputs, targets), ``loss`` on what `training_step`
    returns, ``gradients`` once an optimizer step and before clipping, ``after_step``, ``metrics`` and ``stop`` after
    an optimizer step, be it of one batch or of several accumulated ones. Checkpoints hold the step, the history and
    the state of every hook that has `state_dict` and `load_state_dict`. Refused are manual optimization, several
    processes, 16-bit precision with a scaled loss, ``batch`` under accumulation (it is a hook of the whole step's
    batch), and ``stop`` where the trainer has a least number of steps or epochs.

    Args:
        hooks: Objects with methods of `nervure.learn.Loop`'s hooks, or a function that makes them for the model.
        model: The network the hooks are about, where that is a part of the LightningModule: its name there, such as
            ``"net"``; the whole module by default.

    Examples:
        >>> class Half:
        ...     def gradients(self, named):
        ...         return {name: 0.5 * gradient for name, gradient in named.items()}
        >>> callback = LightningHooks([Half()], model="net")  # Trainer(callbacks=[callback])
    """

    def __init__(self, hooks: Hooks, *, model: str | None = None) -> None:
        super().__init__()
        self.model = model
        self._carried = Carried(hooks, host="LightningHooks")
        self._strategy: Any = None
        self._loss: float | Tensor = 0.0
        self._before = 0

    @property
    def history(self) -> list[dict[str, float]]:
        """Return what the ``metrics`` hooks gave, step by step."""
        return self._carried.history

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Bind the hooks to the network and refuse what this trainer cannot carry."""
        if stage != "fit":
            return
        carried = self._carried
        if trainer.global_step == 0:
            carried.history = []
        carried.bind(_part(pl_module, self.model))
        if not pl_module.automatic_optimization:
            _refuse_all(carried, "the module optimizes by hand")
        if trainer.world_size > 1:
            _refuse_all(carried, "the run has several processes")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            _refuse_all(carried, "steps with a scaled loss may be left out", try_='precision="bf16-mixed"')
        if trainer.fit_loop.min_epochs or trainer.fit_loop.min_steps:
            carried.refuse("stop", why="the trainer has a least number of steps or epochs", try_="min_epochs=0")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of the strategy's training step; neither the module nor the network is touched."""
        self._release()
        self._strategy, self._loss, self._before = trainer.strategy, 0.0, trainer.global_step
        self._carried.step = trainer.global_step
        own = trainer.strategy.training_step

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.accumulate_grad_batches > 1:
                self._carried.refuse(
                    "batch", why="it is for the batch of a whole step, and steps are accumulated", try_="larger batches"
                )
            return self._hooked(own(self._carried.pair(batch), *args, **kwargs), trainer.accumulate_grad_batches)

        trainer.strategy.__dict__["training_step"] = training_step

    def _hooked(self, output: Any, parts: int) -> Any:
        """Return a training step's output with the loss the hooks make of it."""
        found = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor):
            return output  # None leaves the batch out, which is Lightning's way
        loss = self._carried.loss(found)
        self._loss = self._loss + loss.detach() / parts
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Hand the gradients of the step to the hooks, before they are clipped."""
        self._carried.gradients()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the hooks that a step is done, where this batch completed one."""
        if trainer.global_step == self._before:
            return
        self._before = trainer.global_step
        loss, self._loss = self._loss, 0.0
        if self._carried.stepped(trainer.global_step, loss):
            trainer.should_stop = True

    def _release(self) -> None:
        if self._strategy is not None:
            self._strategy.__dict__.pop("training_step", None)
            self._strategy = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the training step back."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the training step back."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return step, history and the states of the hooks, for the trainer's checkpoint."""
        return self._carried.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Args:
            state_dict: The state.
        """
        self._carried.load_state_dict(state_dict)


def _part(module: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return module
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise Unsupported("LightningHooks", module, why=f"it has no part named {name!r}") from error


def _refuse_all(carried: Carried, why: str, try_: str | None = None) -> None:
    carried.refuse(*carried.events, why=why, try_=try_)
