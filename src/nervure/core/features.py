"""What the layers of a network put out on a batch, as samples or as units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nervure.core import forward, rng, taps

_CHANNELS = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


@torch.no_grad()
def features(model: nn.Module, inputs: Any, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Return what modules put out on a batch, in eval mode.

    Args:
        model: The model; its modes and the global generators are left as they were.
        inputs: The batch's inputs.
        names: Qualified names of modules.

    Returns:
        Name -> one tensor for each call; modules that are not called or give no real numbers are left out.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it runs past the layers' hooks
    try:
        with taps.tap(model, names) as seen, forward.mode(model, train=False), rng.scope("features"):
            forward.call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {name: calls for name, calls in seen.items() if calls and calls[0].is_floating_point()}


def layers(model: nn.Module, inputs: Any) -> list[str]:
    """Return the modules that hold weights and put out units for each sample, in the order they are called.

    Args:
        model: The model.
        inputs: A batch's inputs.

    Returns:
        Their names; those used inside torch's own attention are not called and not among them.

    Examples:
        >>> layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.ones(4, 3))
        ['0', '2']
    """
    owners = [name for name, one in model.named_modules() if any(True for _ in one.parameters(recurse=False))]
    order = {name: place for place, name in enumerate(taps.execution_order(model, inputs))}
    count = forward.batch_size(inputs)
    fitting = owners
    for size in {count, max(1, count - 1)}:  # an axis that is as long by chance does not follow
        seen = features(model, forward.take(inputs, slice(0, size)), fitting)
        fitting = [name for name, calls in seen.items() if all(one.ndim > 1 and len(one) == size for one in calls)]
    return sorted(fitting, key=lambda name: order.get(name, len(order)))


def samples(calls: Sequence[Tensor]) -> Tensor:
    """Return features with a row for each sample.

    Args:
        calls: As `features` gives them for one module.

    Returns:
        Shape (N, ...).
    """
    return torch.cat([one.flatten(1) for one in calls], 1)


def units(calls: Sequence[Tensor], module: nn.Module) -> Tensor:
    """Return features with a column for each unit: every position counts as a sample.

    The units are the channels of convolutions, norms of images and pools, and the last axis of everything else.

    Args:
        calls: As `features` gives them for one module.
        module: The module.

    Returns:
        Shape (samples times positions, units).
    """
    axis = 1 if isinstance(module, _CHANNELS) else -1
    return torch.cat([one.movedim(axis, -1).flatten(0, -2) for one in calls])
