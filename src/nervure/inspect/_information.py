"""Estimates of what features tell of the sample and of the label: binned, and bounds under normal noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nervure._kit import BadData, UsageError

Limits = tuple[float, float] | Literal["range", "quantile"]


@dataclass(frozen=True)
class Information:
    """Hold what a layer tells, in bits.

    Args:
        inputs: I(X; T), between 0 and log2 of the number of samples.
        labels: I(T; Y), between 0 and the entropy of the labels.
    """

    inputs: float
    labels: float


def binned(rows: Tensor, labels: Tensor, *, bins: int, limits: Limits) -> Information:
    """Return the information of binned features.

    Args:
        rows: Shape (N, F), one row an equiprobable symbol.
        labels: Shape (N,).
        bins: Bins of each unit, at least 2.
        limits: As in `layer_information`; values beyond the ends fall into the last bins.

    Returns:
        In bits.

    Raises:
        UsageError: If there are no such bins.
        BadData: If features are not finite.
    """
    x = rows.detach().cpu().double()
    if bins < 2 or (isinstance(limits, tuple) and not limits[0] < limits[1]):
        raise UsageError("no such bins", expected="2 or more, from a lower to a higher end", found=(bins, limits))
    if not bool(x.isfinite().all()):
        raise BadData("the features are not finite", found="NaN or infinity")
    if limits == "quantile":
        # The first place among equal values, so that these fall into one bin.
        ordered = x.T.contiguous().sort(1).values
        places = torch.searchsorted(ordered, x.T.contiguous()).T
        codes = places * bins // len(x)
    else:
        low, high = limits if isinstance(limits, tuple) else (float(x.min()), float(x.max()))
        codes = ((x - low) / max(high - low, 1e-300) * bins).floor().clamp(0, bins - 1)
    symbols = _symbols(codes.long().numpy(), bins)
    y = labels.cpu().numpy()
    every = _entropy(symbols)
    within = sum((y == c).mean() * _entropy(symbols[y == c]) for c in np.unique(y))
    return Information(every, max(0.0, every - float(within)))


def _symbols(codes: np.ndarray, bins: int) -> np.ndarray:
    """Number the different rows of a table of codes below `bins`."""
    width = codes.shape[1]
    if width * math.log2(bins) < 62:
        words: np.ndarray = codes @ (bins ** np.arange(width, dtype=np.int64))
    else:
        words = np.ascontiguousarray(codes).view(np.dtype((np.void, codes.dtype.itemsize * width))).ravel()
    return np.unique(words, return_inverse=True)[1].ravel()


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    p = counts[counts > 0] / len(symbols)
    return float(-(p * np.log2(p)).sum()) + 0.0


def kernel_bounds(rows: Tensor, labels: Tensor, *, noise: float) -> tuple[Information, Information]:
    """Return bounds on the information of features with normal noise (Kolchinsky and Tracey, 2017).

    I(X; T) is at least -mean_i log mean_j exp(-|t_i - t_j|^2 / 8 s^2), and at most the same with 2 s^2. The label's
    information is the difference of such numbers and is itself no bound.

    Args:
        rows: Shape (N, F).
        labels: Shape (N,).
        noise: Deviation s, above 0.

    Returns:
        Lower and upper, in bits.

    Raises:
        UsageError: If the noise is not above 0.
    """
    if not noise > 0:
        raise UsageError("no such noise", expected="above 0", found=noise)
    x, y = rows.detach().double(), labels.to(rows.device)
    groups = [x[y == c] for c in y.unique()]

    def spread(some: Tensor, width: float) -> float:
        logs = [
            torch.logsumexp(-torch.cdist(part, some).square() / width, 1) - math.log(len(some))
            for part in some.split(1024)
        ]
        return -float(torch.cat(logs).mean()) / math.log(2)

    found = []
    for width in (8 * noise**2, 2 * noise**2):
        every = spread(x, width)
        within = sum(len(part) / len(x) * spread(part, width) for part in groups)
        found.append(Information(every, every - within))
    return found[0], found[1]
