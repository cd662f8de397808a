"""Remedies for shortcuts behind one signature and one training loop, at equal numbers of gradient evaluations.

Each is called as ``fix(build, (inputs, targets), steps=..., seed=...)`` and returns a classifier. Steps count every
forward and backward pass of a batch through a network, in discovery rounds, members and heads alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nervure._kit import BadBudget
from nervure.core import forward, rng
from nervure.learn.cat_representations import Concat
from nervure.learn.loop import Loop, cross_entropy
from nervure.learn.rfc_bonsai import Discovery, discover, synthesise
from nervure.losses.environments import group_dro
from nervure.losses.spectral_decoupling import decoupled_loss

Build = Callable[[], nn.Module]
Data = tuple[Any, Tensor]


def erm(
    build: Build,
    data: Data,
    *,
    steps: int,
    seed: int = 0,
    lr: float = 1e-3,
    batch_size: int = 64,
    decay: float = 0.0,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    hooks: Sequence[object] = (),
) -> nn.Module:
    """Train one network by Adam: the loop all other remedies use.

    Args:
        build: Builds a classifier; its weights are drawn by the seed.
        data: Inputs and classes, shape (N,).
        steps: Gradient evaluations.
        seed: Draws weights and batches.
        lr: Learning rate.
        batch_size: Samples a step.
        decay: L2 penalty on the weights.
        loss: From outputs and targets to a scalar.
        hooks: Hooks of the loop.

    Returns:
        The network.
    """
    with rng.scope("weights", seed):
        model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
    Loop(model, optimizer, data, loss=loss, batch_size=batch_size, hooks=hooks, seed=seed).run(steps)
    return model


def weight_decay(
    build: Build, data: Data, *, steps: int, seed: int = 0, decay: float = 0.01, **options: Any
) -> nn.Module:
    """Train one network with an L2 penalty on its weights.

    Args:
        build: As in `erm`.
        data: As in `erm`.
        steps: Gradient evaluations.
        seed: As in `erm`.
        decay: The penalty.
        **options: Of `erm`.

    Returns:
        The network.
    """
    return erm(build, data, steps=steps, seed=seed, decay=decay, **options)


def spectral_decoupling(
    build: Build, data: Data, *, steps: int, seed: int = 0, strength: float = 0.2, **options: Any
) -> nn.Module:
    """Train one network with a penalty on its logits; see `nervure.losses.SpectralDecoupling`.

    Args:
        build: As in `erm`.
        data: As in `erm`.
        steps: Gradient evaluations.
        seed: As in `erm`.
        strength: Of the penalty.
        **options: Of `erm`.

    Returns:
        The network.
    """

    def loss(output: Any, targets: Tensor) -> Tensor:
        return decoupled_loss(forward.logits(output), targets, strength=strength)

    return erm(build, data, steps=steps, seed=seed, loss=loss, **options)


class _Best:
    """Keep the weights of the least held-out loss; stop after so many looks without a lower one."""

    def __init__(self, held: Data, every: int, patience: int) -> None:
        self.held, self.every, self.patience = held, every, patience
        self.least, self.since, self.weights = float("inf"), 0, {}  # type: ignore[var-annotated]
        self.model = nn.Module()

    def loss(self, loss: Tensor, model: nn.Module) -> Tensor:
        self.model = model
        return loss

    def stop(self, step: int, loss: float) -> bool:
        if step % self.every:
            return False
        found = float(cross_entropy(forward.predict(self.model, self.held[0]), self.held[1]))
        self.since += 1
        if found < self.least:
            self.least, self.since, self.weights = found, 0, copy.deepcopy(self.model.state_dict())
        return self.since >= self.patience


def early_stopping(
    build: Build,
    data: Data,
    *,
    steps: int,
    seed: int = 0,
    share: float = 0.2,
    every: int = 10,
    patience: int = 10,
    **options: Any,
) -> nn.Module:
    """Train one network and return it as it was at its least cross-entropy on samples held out.

    Args:
        build: As in `erm`.
        data: As in `erm`; a share of it is held out.
        steps: Gradient evaluations at most.
        seed: As in `erm`.
        share: Of the samples, held out.
        every: Steps between two looks.
        patience: Looks without a lower loss before it stops.
        **options: Of `erm`.

    Returns:
        The network.
    """
    inputs, targets = data
    order = torch.randperm(len(targets), generator=rng.generator("held out", seed))
    held, rest = order[: round(share * len(order))], order[round(share * len(order)) :]
    best = _Best((forward.take(inputs, held), targets[held]), min(every, max(1, steps)), patience)
    model = erm(build, (forward.take(inputs, rest), targets[rest]), steps=steps, seed=seed, hooks=[best], **options)
    if best.weights:
        model.load_state_dict(best.weights)
    return model


class Mean(nn.Module):
    """Answer by the log of the mean probability of several classifiers.

    Args:
        members: The classifiers.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return log probabilities."""
        parts = [forward.logits(member(*args, **kwargs)).log_softmax(-1) for member in self.members]
        return torch.stack(parts).logsumexp(0) - torch.tensor(float(len(parts))).log()


def ensemble(build: Build, data: Data, *, steps: int, seed: int = 0, members: int = 4, **options: Any) -> nn.Module:
    """Train several networks that share the steps, and average their probabilities.

    Args:
        build: As in `erm`.
        data: As in `erm`.
        steps: Gradient evaluations of all members together.
        seed: As in `erm`.
        members: How many.
        **options: Of `erm`.

    Returns:
        The networks as one.
    """
    return Mean(_members(build, data, steps, seed, members, options))


def _members(build: Build, data: Data, steps: int, seed: int, count: int, options: dict[str, Any]) -> list[nn.Module]:
    if not 1 <= count <= steps:
        raise BadBudget("too few steps for the members", expected=f"1 to {steps} members", found=count)
    shares = [steps // count + (number < steps % count) for number in range(count)]
    seeds = [rng.seed_for("member", seed, number) for number in range(count)]
    return [erm(build, data, steps=share, seed=one, **options) for share, one in zip(shares, seeds, strict=True)]


class Headed(nn.Module):
    """Put a linear head on features.

    Args:
        features: From inputs to a row of features a sample.
        head: The head.
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return class scores."""
        scores: Tensor = self.head(self.features(*args, **kwargs))
        return scores


def _headed(features: nn.Module, data: Data, loss: Callable[[Any, Any], Tensor], **options: Any) -> nn.Module:
    """Train a linear head on features that stay; the loss gets the numbers of the samples as targets."""
    inputs, targets = data
    rows = forward.predict(features, inputs)
    build = partial(nn.Linear, rows.shape[1], int(targets.max()) + 1)
    return Headed(features, erm(build, (rows, torch.arange(len(targets))), loss=loss, **options))


def cat(
    build: Build, data: Data, *, steps: int, seed: int = 0, members: int = 4, head: float = 0.1, **options: Any
) -> nn.Module:
    """Train several networks that share the steps, and a linear head on their features side by side.

    Args:
        build: As in `erm`.
        data: As in `erm`.
        steps: Gradient evaluations of all members and the head together.
        seed: As in `erm`.
        members: How many.
        head: The head's share of the steps.
        **options: Of `erm`.

    Returns:
        The networks as one.
    """
    last, targets = round(head * steps), data[1]
    features = Concat(_members(build, data, steps - last, seed, members, options), forward.take(data[0], slice(0, 4)))

    def loss(scores: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets[index])

    return _headed(features, data, loss, steps=last, seed=seed, **options)


def bonsai(
    build: Build,
    data: Data,
    *,
    steps: int,
    seed: int = 0,
    shares: Sequence[float] = (0.15, 0.375, 0.375, 0.1),
    lr: float = 1e-3,
    batch_size: int = 64,
) -> nn.Module:
    """Construct rich features, and train a linear head on them by the worst of the samples the rounds told apart.

    Args:
        build: As in `erm`; its features are the inputs of its last linear layer.
        data: As in `erm`.
        steps: Gradient evaluations of all phases together.
        seed: As in `erm`.
        shares: Of the steps: those of each round, of the synthesis and of the head.
        lr: Learning rate.
        batch_size: Samples a step.

    Returns:
        The features under the head.

    Raises:
        BadBudget: If there are fewer than three phases, or the shares are more than all.
    """
    if len(shares) < 3 or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise BadBudget("these are no shares", expected="three or more, positive, at most 1 in all", found=list(shares))
    few = forward.take(data[0], slice(0, 4))
    counts = [int(share * steps) for share in shares[:-1]]
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed}

    def extractor() -> nn.Module:
        return Concat([build()], few)

    found = discover(extractor, data, steps=counts[:-1], **options)
    made = synthesise(extractor, data, found, steps=counts[-1], **options)
    loss = partial(_worst, found, data[1])
    return _headed(made.extractor, data, loss, steps=steps - sum(counts), **options)


def _worst(found: Discovery, targets: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    losses = F.cross_entropy(scores, targets[index], reduction="none")
    rounds = torch.arange(len(found.right) - 1 or 1, device=targets.device).unsqueeze(1)
    groups = 2 * rounds + found.right[: len(rounds)][:, index].long()
    return group_dro(losses.expand_as(groups).flatten(), groups.flatten())


FIXES: dict[str, Callable[..., nn.Module]] = {
    "erm": erm,
    "weight-decay": weight_decay,
    "early-stopping": early_stopping,
    "spectral-decoupling": spectral_decoupling,
    "rfc-bonsai": bonsai,
    "cat-representations": cat,
    "ensemble": ensemble,
}
