"""A training bench for delayed generalisation: small tasks, one loop, and the times at which a run learnt what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nervure._kit import Diverged
from nervure.core import forward, rng
from nervure.core.persample import Loss
from nervure.core.recorder import Event, Measure, Recorder
from nervure.spec import Batch

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Penalty = Callable[[nn.Module], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """Hold what a run trains on, what it is asked, and what counts as learnt.

    Args:
        name: A name.
        train: Inputs and targets of training.
        test: Inputs and targets that are never trained on.
        build: Makes the network from the global random stream.
        loss: From (output, targets) to a scalar.
        score: From (output, targets) to a number, higher is better, 1 is perfect.
        memorised: Score of the training data that counts as learnt.
        generalised: Score of the test data that counts as generalised.
        lr: Learning rate of the task's default optimizer, and of others that scale their steps.
        sgd_lr: Learning rate of plain gradient descent.
        decay: Weight decay that the regulariser ``"decay"`` stands for.
    """

    name: str
    train: Batch
    test: Batch
    build: Callable[[], nn.Module]
    loss: Loss
    score: Score
    memorised: float = 0.99
    generalised: float = 0.95
    lr: float = 1e-2
    sgd_lr: float = 0.5
    decay: float = 1.0


@dataclass(frozen=True)
class Times:
    """Hold when a run memorised and generalised.

    Args:
        memorise: First step at which the training score is reached.
        generalise: First step at which the test score is reached.
        horizon: Steps of the run.
        task: The task.
        recorder: The curves ``"train"`` and ``"test"``.
        model: The trained network.
    """

    memorise: Event
    generalise: Event
    horizon: int
    task: Task
    recorder: Recorder
    model: nn.Module

    @property
    def delay(self) -> float:
        """Return generalise / memorise: a lower bound where only the first is censored, 0 where nothing is learnt."""
        return self.generalise.time / max(1.0, self.memorise.time) if self.memorise.observed else 0.0

    def between(self, name: str) -> float:
        """Return a measure at the first record at which training data are memorised, the last where they never are.

        Args:
            name: The measure.

        Returns:
            Its value.
        """
        place = self.recorder.steps.index(self.memorise.time)
        return float(self.recorder.curve(name)[place].mean())


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Return the share of right answers; classes are the last axis of the output."""
    return (output.argmax(-1) == targets).double().mean()


def explained(output: Tensor, targets: Tensor) -> Tensor:
    """Return one less the mean squared error over the mean square of the targets less their mean."""
    return 1 - F.mse_loss(output, targets) / targets.var(correction=0)


def squared_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error to one-hot targets."""
    return F.mse_loss(output, F.one_hot(targets, output.shape[-1]).to(output))


def class_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy over the last axis, mean over all the others."""
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


class Square(nn.Module):
    """Square its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x^2."""
        return x.square()


class Product(nn.Module):
    """Multiply a linear map of the first element by one of the second: logits(a, b, c) = sum_j u_j(a) v_j(b) w_j(c).

    Args:
        size: Number of elements.
        width: Number of products.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.left = nn.Linear(size, width, bias=False)
        self.right = nn.Linear(size, width, bias=False)
        self.read = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pairs, shape (N, size)."""
        return self.read(self.left(x[:, : self.size]) * self.right(x[:, self.size :]))


def relu_mlp(size: int, width: int = 256) -> nn.Module:
    """Build a network of one hidden layer for pairs of elements, one-hot."""
    return nn.Sequential(nn.Linear(2 * size, width), nn.ReLU(), nn.Linear(width, size))


def quadratic_mlp(size: int, width: int = 256) -> nn.Module:
    """Build f = V (U x)^2 without biases for pairs of elements, one-hot."""
    return nn.Sequential(nn.Linear(2 * size, width, bias=False), Square(), nn.Linear(width, size, bias=False))


def pairs(size: int) -> Tensor:
    """Return all pairs of elements, a row by row over b, one-hot: shape (size^2, 2 size)."""
    eye = torch.eye(size)
    return torch.cat([eye.repeat_interleave(size, 0), eye.repeat(size, 1)], 1)


def split(count: int, share: float, seed: object) -> tuple[Tensor, Tensor]:
    """Cut 0, ..., count - 1 at random into training and test places."""
    order = torch.randperm(count, generator=rng.generator("delayed split", seed))
    return order[: round(share * count)], order[round(share * count) :]


def table_task(
    table: Tensor,
    share: float,
    *,
    seed: object,
    build: Callable[[int], nn.Module] = relu_mlp,
    loss: Loss = class_loss,
    name: str = "table",
) -> Task:
    """Make the task of completing an operation table of which a random share of the cells is seen.

    Args:
        table: [a, b] = the answer, shape (n, n); -1 where the operation is not defined.
        share: Share of the cells to train on, in (0, 1).
        seed: Draws the cells.
        build: From n to a network that takes one-hot pairs.
        loss: From (output, targets) to a scalar.
        name: A name.

    Returns:
        The task.
    """
    defined = table.flatten() >= 0
    x, y = pairs(len(table))[defined], table.flatten()[defined]
    seen, unseen = split(len(y), share, seed)
    return Task(name, (x[seen], y[seen]), (x[unseen], y[unseen]), partial(build, len(table)), loss=loss, score=accuracy)


def shuffled(table: Tensor, seed: object) -> Tensor:
    """Return a table with the same entries in random cells: every answer as often as before, and no rule."""
    order = torch.randperm(table.numel(), generator=rng.generator("shuffled table", seed))
    return table.flatten()[order].view_as(table)


def train(
    task: Task,
    *,
    optimizer: OptimizerFactory | None = None,
    penalty: Penalty | None = None,
    decay: float | None = None,
    seed: object = 0,
    steps: int,
    batch_size: int | None = None,
    until_generalised: bool = False,
    measures: Callable[[nn.Module], dict[str, Measure]] | None = None,
    after_step: Callable[[int], None] | None = None,
    per_decade: int = 20,
) -> Times:
    """Train a task's network, by default on all data at each step; record when it memorised and when it generalised.

    Args:
        task: The task.
        optimizer: From parameters to an optimizer; AdamW at the task's rate by default.
        penalty: Added to the loss.
        decay: Weight decay of the default optimizer; the task's own by default.
        seed: Draws the weights.
        steps: Steps, at least 1.
        batch_size: Samples of a step, drawn anew for each with the seed; all of them by default.
        until_generalised: End at the second record in a row of a generalising network.
        measures: From the network to further measures.
        after_step: Called with the number of the step.
        per_decade: Records between a step and ten times that step.

    Returns:
        The times.

    Raises:
        Diverged: If the loss is not finite.
    """
    with rng.scope("delayed init", seed):
        model = task.build()
    chosen = [value for value in model.parameters() if value.requires_grad]
    rate = task.decay if decay is None else decay
    made = optimizer(chosen) if optimizer else torch.optim.AdamW(chosen, task.lr, weight_decay=rate, fused=True)
    recorder = Recorder(
        {
            "train": _measure(task.score, model, task.train),
            "test": _measure(task.score, model, task.test),
            **(measures(model) if measures else {}),
        },
        per_decade=per_decade,
    )
    recorder.step(0)
    inputs, targets = task.train
    last, draw = steps, rng.generator("delayed batches", seed)
    for step in range(1, steps + 1):
        made.zero_grad()
        if batch_size:
            index = torch.randint(len(task.train[1]), (batch_size,), generator=draw)
            inputs, targets = forward.take(task.train[0], index), task.train[1][index]
        loss = task.loss(forward.outputs(model, inputs), targets)
        whole = loss + penalty(model) if penalty else loss
        whole.backward()
        made.step()
        if after_step:
            after_step(step)
        if recorder.step(step, always=step == steps):
            if not bool(whole.isfinite()):
                raise Diverged(step, float(whole.detach()))
            if until_generalised and recorder.first("test", at_least=task.generalised, lasting=2).observed:
                last = step
                break
    return Times(
        recorder.first("train", at_least=task.memorised),
        recorder.first("test", at_least=task.generalised),
        last,
        task,
        recorder,
        model,
    )


def _measure(score: Score, model: nn.Module, batch: Batch) -> Measure:
    inputs, targets = batch
    return lambda: score(forward.predict(model, inputs), targets)
