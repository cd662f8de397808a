"""The tasks, optimizers and regularisers of a comparison of delayed generalisation, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nervure._kit import UnknownId
from nervure.core.group_tables import symmetric
from nervure.inspect._delayed import Penalty, Task, Times, quadratic_mlp, shuffled, squared_loss, table_task, train
from nervure.inspect.grokking import operation
from nervure.inspect.grokking_lazy_rich import quadratic_regression
from nervure.inspect.streaming_parity import stream_task

Decay = Callable[[Task], tuple[float, Penalty | None]]


def _s4(seed: object) -> Task:
    return table_task(symmetric(4).table, 0.8, seed=seed, name="s4")


def _words(seed: object) -> Task:
    return table_task(symmetric(4).word("abA"), 0.8, seed=seed, name="words")


def _random(seed: object) -> Task:
    """The control: a table of no rule, on which nothing can generalise."""
    return table_task(shuffled(symmetric(4).table, seed), 0.8, seed=seed, name="random table")


def _addition(seed: object) -> Task:
    made = table_task(operation("a+b", 53), 0.6, seed=seed, build=quadratic_mlp, loss=squared_loss, name="addition")
    # The loss is a mean over 53 answers, most of them 0, so its gradients are small.
    return replace(made, sgd_lr=50.0)


def _polynomial(seed: object) -> Task:
    return quadratic_regression(seed, samples=200, alpha=1.0)


TASKS: Mapping[str, Callable[[object], Task]] = {
    "addition": _addition,
    "s4": _s4,
    "words": _words,
    "streaming-parity": stream_task,
    "polynomial": _polynomial,
    "random table": _random,
}
# Samples of a step where all of them are too many; None is all.
BATCHES: Mapping[str, int | None] = {"streaming-parity": 256}


def _sum_of(power: int, strength: float) -> Penalty:
    def penalty(model: nn.Module) -> Tensor:
        chosen = [value for value in model.parameters() if value.requires_grad]
        return strength * torch.stack([value.abs().pow(power).sum() for value in chosen]).sum()

    return penalty


# Name -> from a task to the decoupled weight decay and the penalty.
REGULARISERS: Mapping[str, Decay] = {
    "none": lambda task: (0.0, None),
    "decay": lambda task: (1.0, None),
    "strong decay": lambda task: (3.0, None),
    "l2": lambda task: (0.0, _sum_of(2, 1e-4)),
    "l1": lambda task: (0.0, _sum_of(1, 1e-5)),
}


def _adamw(chosen: list[nn.Parameter], task: Task, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(chosen, task.lr, weight_decay=decay, fused=True)


def _sgd(chosen: list[nn.Parameter], task: Task, decay: float) -> torch.optim.Optimizer:
    # Decoupled as in AdamW: there the weights shrink by lr times decay a step whatever the gradient.
    return torch.optim.SGD(chosen, task.sgd_lr, momentum=0.9, weight_decay=decay * task.lr / task.sgd_lr, fused=True)


def _rmsprop(chosen: list[nn.Parameter], task: Task, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(chosen, task.lr, betas=(0.0, 0.99), weight_decay=decay, fused=True)


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter], Task, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
}


def delayed(
    task: str,
    *,
    optimizer: str = "adamw",
    regulariser: str = "none",
    seed: object = 0,
    steps: int,
    after_step: Callable[[int], None] | None = None,
) -> Times:
    """Train a task by name until it generalises, or for so many steps, and return when it memorised and generalised.

    Data and first weights depend on the task and the seed alone.

    Args:
        task: One of `TASKS`.
        optimizer: One of `OPTIMIZERS`.
        regulariser: One of `REGULARISERS`.
        seed: The seed.
        steps: Most steps; a run that did not generalise by then is censored there.
        after_step: Called with the number of the step.

    Returns:
        The times.

    Raises:
        UnknownId: If there is nothing of a name.
    """
    for name, known in ((task, TASKS), (optimizer, OPTIMIZERS), (regulariser, REGULARISERS)):
        if name not in known:
            raise UnknownId(f"there is nothing called {name!r}", expected=", ".join(known))
    made = TASKS[task](("task", seed))
    decay, penalty = REGULARISERS[regulariser](made)

    def build(chosen: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return OPTIMIZERS[optimizer](list(chosen), made, decay)

    return train(
        made,
        optimizer=build,
        penalty=penalty,
        seed=("weights", seed),
        steps=steps,
        batch_size=BATCHES.get(task),
        until_generalised=True,
        after_step=after_step,
    )
