"""Estimate the running statistics of batch norms anew, after a network was changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nervure.core import forward


@torch.no_grad()
def reestimate_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set running means and variances to their averages over batches, in place.

    Dropout and everything else stay in eval mode; every batch counts the same.

    Args:
        model: The model.
        batches: Inputs of batches, as for `nervure.core.forward.call`.

    Returns:
        How many norms were estimated; without any, the batches are not looked at.

    Examples:
        >>> net = nn.BatchNorm1d(2)
        >>> reestimate_(net, [torch.randn(1000, 2) + 5])
        1
        >>> bool((net.running_mean - 5).abs().max() < 0.2)
        True
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [module.momentum for module in norms]
    with forward.mode(model, train=False):
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum, module.training = None, True  # None is the plain average over calls
            for inputs in batches:
                forward.call(model, inputs)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum, module.training = momentum, False
    return len(norms)
