"""What the claim on intrinsic dimension trains: MLPs of three sizes on digits."""

from __future__ import annotations

import torch
from torch import nn

SIZES = {"small": (48,), "medium": (90, 32), "large": (180, 80)}  # hidden layers: 3.6k, 9.1k and 27k parameters


def mlp(hidden: tuple[int, ...], draw: torch.Generator) -> nn.Sequential:
    """Return a ReLU network 64-hidden-10, drawn by torch's own law from this generator."""
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.no_grad():
        for inputs, width in zip((64, *hidden), (*hidden, 10), strict=True):
            layer = nn.Linear(inputs, width)
            for value in layer.parameters():
                value.copy_((2 * torch.rand(value.shape, generator=draw) - 1) * inputs**-0.5)
            layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def zeroed(model: nn.Sequential) -> nn.Sequential:
    """Set every parameter to zero, in place."""
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    return model
