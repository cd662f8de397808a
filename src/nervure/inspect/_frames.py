"""How near class means are to a frame, and how far the samples stray from them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nervure._kit import BadData
from nervure.core.class_moments import ClassMoments


def variability(moments: ClassMoments) -> float:
    """Return tr(S_W S_B^+) / C.

    Args:
        moments: Of C classes, with covariance.

    Returns:
        At least 0; infinity where all class means are equal.
    """
    # With centred means M = U s V', S_B^+ = C V s^-2 V'.
    _, s, v = torch.linalg.svd(moments.centred(), full_matrices=False)
    kept = s > s.max() * 1e-10
    if not float(s.max()) > 1e-12 * float(moments.means.abs().max()):
        return math.inf
    directions = v[kept] / s[kept, None]
    return float(((directions @ moments.within()) * directions).sum())


def simplex_distance(centred: Tensor) -> float:
    """Return |G / |G| - (I - 1 1' / C) / (C - 1)^0.5|, G being the Gram matrix of the centred means.

    Args:
        centred: Shape (C, F).

    Returns:
        Between 0 and 2; 2 where all means are equal.
    """
    gram, classes = centred @ centred.T, len(centred)
    if classes < 2 or not float(gram.norm()) > 0:
        return 2.0
    simplex = torch.eye(classes, dtype=gram.dtype, device=gram.device) - 1 / classes
    return float((gram / gram.norm() - simplex / simplex.norm()).norm())


def mean_cosine(means: Tensor) -> float:
    """Return the root mean square cosine between different rows; one of length zero is orthogonal to all.

    Args:
        means: Shape (C, F).

    Returns:
        Between 0 and 1.
    """
    classes = len(means)
    rows = F.normalize(means)
    cosines = (rows @ rows.T).fill_diagonal_(0)
    return float((cosines.square().sum() / max(1, classes * (classes - 1))).sqrt())


def duality(moments: ClassMoments, weight: Tensor, span: Tensor) -> float:
    """Return |W / |W| - M / |M||^2 for means M along a span.

    Args:
        moments: Of C classes, along the span.
        weight: Class weights, a row for each label.
        span: Orthonormal columns, as many as the moments are wide.

    Returns:
        Between 0 and 4; 2 where all means are equal.

    Raises:
        BadData: If the last layer has no row for a label.
    """
    most = int(moments.labels.max())
    if most >= len(weight):
        raise BadData("a label has no class weight", expected=f"0 to {len(weight) - 1}", found=most)
    centred = moments.centred()
    scale = float(centred.norm() * weight.norm())
    return 2 - 2 * float((centred * (weight[moments.labels] @ span)).sum()) / scale if scale > 0 else 2.0
