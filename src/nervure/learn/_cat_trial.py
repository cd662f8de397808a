"""What the claim on concatenated features reads them by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nervure.core import forward
from nervure.core.readout import Readout
from nervure.data import Splits
from nervure.spec import Data


def of_classes(data: Data, classes: Sequence[int]) -> Splits:
    """Return the samples of some classes, numbered anew."""
    number = torch.full((data.classes,), -1)
    number[list(classes)] = torch.arange(len(classes))
    train, test = number[data.train_y] >= 0, number[data.test_y] >= 0
    none = data.train_x[:0]
    return Splits(data.name, len(classes), data.train_x[train], number[data.train_y[train]], none, data.train_y[:0],
                  data.test_x[test], number[data.test_y[test]])  # fmt: skip


def probed(features: nn.Module, data: Splits, *, labelled: int = 300, test: int = 2000) -> float:
    """Return the accuracy of a ridge probe fitted on few labelled samples."""
    readout = Readout(forward.predict(features, data.train_x[:labelled]), data.train_y[:labelled])
    return readout.accuracy(forward.predict(features, data.test_x[:test]), data.test_y[:test])
