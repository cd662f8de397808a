"""Hooks of `nervure.learn.Loop` in a Hugging Face trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nervure._kit import Unsupported, UsageError, require
from nervure.connect._carried import Carried, Hooks
from nervure.connect._state_file import read_state, write_state

_transformers: Any = require("transformers", extra="transformers")
_Callback: Any = _transformers.TrainerCallback
FILE = "nervure-hooks.safetensors"


class TransformersHooks(_Callback):
    """Carry hooks in a Hugging Face trainer: `attach` it, as a callback alone sees neither batch nor loss.

    All six events are carried: ``batch(inputs, labels)``, inputs being the dict without the labels, ``loss`` on what
    `compute_loss` returns, ``gradients`` once an optimizer step and before clipping, ``after_step``, ``metrics`` and
    ``stop`` after an optimizer step and the step of the schedule, when the gradients are gone. Checkpoints get a file
    with step, history and the state of every hook that has `state_dict` and `load_state_dict`; it is read when the
    trainer resumes. Refused are several processes or devices, fp16 (whose scaled steps may be left out), ``batch``
    under accumulation (it is a hook of the whole step's batch), and ``loss`` under accumulation where the model
    divides by the tokens of the whole step.

    Args:
        hooks: Objects with methods of `nervure.learn.Loop`'s hooks, or a function that makes them for the model.
        resume_from: The checkpoint's folder, where it is not in the trainer's output folder.

    Examples:
        >>> class Half:
        ...     def gradients(self, named):
        ...         return {name: 0.5 * gradient for name, gradient in named.items()}
        >>> hooks = TransformersHooks([Half()])  # then hooks.attach(trainer), and trainer.train()
    """

    def __init__(self, hooks: Hooks, *, resume_from: str | Path | None = None) -> None:
        self.resume_from = Path(resume_from) if resume_from is not None else None
        self._carried = Carried(hooks, host="TransformersHooks")
        self._trainer: Any = None
        self._loss: float | Tensor = 0.0

    @property
    def history(self) -> list[dict[str, float]]:
        """Return what the ``metrics`` hooks gave, step by step."""
        return self._carried.history

    def attach(self, trainer: Any) -> TransformersHooks:
        """Join a trainer: as a callback, and around its training step. The model is not touched.

        Args:
            trainer: The trainer.

        Returns:
            This object.

        Raises:
            UsageError: If it, or another of its kind, is attached already.
        """
        if self._trainer is not None or "training_step" in trainer.__dict__:
            raise UsageError("hooks are attached already", try_="one TransformersHooks with all hooks, or detach()")
        self._trainer = trainer
        trainer.add_callback(self)
        trainer.training_step = self._training_step
        return self

    def detach(self) -> None:
        """Leave the trainer as it was before `attach`."""
        if self._trainer is not None:
            self._trainer.__dict__.pop("training_step", None)
            self._trainer.remove_callback(self)
            self._trainer = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Bind the hooks to the model and refuse what this trainer cannot carry.

        Raises:
            UsageError: If nothing is attached.
        """
        carried, trainer = self._carried, self._trainer
        if trainer is None:
            raise UsageError("a callback sees neither batch nor loss", try_="TransformersHooks(...).attach(trainer)")
        carried.bind(trainer.model)
        if args.world_size > 1 or args.n_gpu > 1 or trainer.accelerator.distributed_type != "NO":
            self._refuse_all("the run has several processes or devices")
        if trainer.accelerator.scaler is not None:
            self._refuse_all("steps with a scaled loss may be left out", try_="bf16=True")
        if args.gradient_accumulation_steps > 1:
            why = "it is for the batch of a whole step, and steps are accumulated"
            carried.refuse("batch", why=why, try_="larger batches")
        if len(trainer.label_names) != 1:
            carried.refuse("batch", why=f"the labels are {trainer.label_names}", try_="label_names of one name")
        self._loss, carried.step = 0.0, state.global_step
        carried.history = []
        if state.global_step:
            self._resume(args, state.global_step)

    def _resume(self, args: Any, step: int) -> None:
        folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{step}"
        if (folder / FILE).is_file():
            self._carried.load_state_dict(read_state(folder / FILE))
        elif self._carried.stateful:
            raise Unsupported(
                "TransformersHooks",
                self._carried.stateful[0],
                why=f"the run is resumed at step {step}, and {folder} holds no state of hooks",
                try_="TransformersHooks(hooks, resume_from=the checkpoint's folder)",
            )

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None, *args: Any) -> Tensor:
        """Do what the trainer's `training_step` does, with the hooks let in."""
        carried, trainer = self._carried, self._trainer
        own = type(trainer).training_step
        if carried.has("batch"):
            # The count of labels was taken before; without it the loss is the mean.
            inputs, num_items_in_batch = self._batch(trainer._prepare_inputs(inputs)), None
        with self._around_loss():
            loss = own(trainer, model, inputs, num_items_in_batch, *args)
        self._loss = self._loss + loss.detach()
        if trainer.accelerator.sync_gradients:
            carried.gradients()
        return loss

    def _batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        name = self._trainer.label_names[0]
        if name not in inputs:
            self._carried.refuse("batch", why=f"the batch has no {name!r}")
        rest, labels = self._carried.batch({key: one for key, one in inputs.items() if key != name}, inputs[name])
        return {**rest, name: labels}

    @contextmanager
    def _around_loss(self) -> Iterator[None]:
        """Hand the loss of one training step to the hooks."""
        carried, trainer = self._carried, self._trainer
        if not carried.has("loss"):
            yield
            return
        own = trainer.compute_loss

        def compute_loss(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            if trainer.args.gradient_accumulation_steps > 1 and _divided(trainer, num_items_in_batch):
                carried.refuse(
                    "loss",
                    why="steps are accumulated and the loss is divided by the tokens of a whole step",
                    try_="gradient_accumulation_steps=1",
                )
            return carried.loss(own(*args, num_items_in_batch=num_items_in_batch, **kwargs))

        before = trainer.__dict__.get("compute_loss")
        trainer.compute_loss = compute_loss
        try:
            yield
        finally:
            del trainer.compute_loss
            if before is not None:
                trainer.compute_loss = before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the hooks that a step is done."""
        loss, self._loss = self._loss, 0.0
        if self._carried.stepped(state.global_step, loss):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the states of the hooks beside the trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            write_state(self._carried.state_dict(), folder / FILE)

    def _refuse_all(self, why: str, try_: str | None = None) -> None:
        self._carried.refuse(*self._carried.events, why=why, try_=try_)


def _divided(trainer: Any, items: Any) -> bool:
    """Return whether the loss of a part is its share of the whole step's loss already."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
