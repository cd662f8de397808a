"""What the claim on random teachers trains and reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nervure.core import forward, rng
from nervure.core.readout import Readout
from nervure.spec import Data

STAGES = ((1, 16, 1), (16, 32, 1), (32, 64, 0))


def convolutional(draw: torch.Generator) -> nn.Module:
    """Return an encoder of 28x28 images: three strided convolutions with batch norm and ReLU, 576 features.

    Weights are He's, so that its features have the size of the images before any batch norm has seen data.
    """
    layers: list[nn.Module] = []
    with rng.scope("encoder", draw.initial_seed()):
        for before, after, padding in STAGES:
            made = nn.Conv2d(before, after, 3, stride=2, padding=padding, bias=False)
            nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
            layers += [made, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten())


def noise_like(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return Gaussian noise with the mean and the variance of the images."""
    return images.mean() + images.std() * torch.randn(images.shape, generator=draw)


def probed(encoder: nn.Module, data: Data) -> float:
    """Return the test accuracy of a ridge probe fitted on all training samples."""
    readout = Readout(forward.predict(encoder, data.train_x), data.train_y)
    return readout.accuracy(forward.predict(encoder, data.test_x), data.test_y)
