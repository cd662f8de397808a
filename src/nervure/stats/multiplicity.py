"""Many comparisons with one baseline, and the sign test."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from nervure.stats.intervals import Array


def holm(p_values: ArrayLike) -> Array:
    r"""Return Holm's adjusted p values: the family-wise error stays below any level they are compared with.

    In ascending order, :math:`\tilde p_{(i)} = \max_{j \le i} \min(1, (m-j+1)\, p_{(j)})`.

    Args:
        p_values: The p values of one family, shape (m,).

    Returns:
        The adjusted p values, in the same order.

    Examples:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, float)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def sign_test(differences: ArrayLike, margin: float = 0.0) -> Array:
    """Return the one-sided p value of the sign test that the median difference exceeds the margin.

    Args:
        differences: Paired differences, shape (..., n); those equal to the margin are left out.
        margin: The median under the null hypothesis.

    Returns:
        The p values, shape (...); 1 where nothing is left.

    Examples:
        >>> float(sign_test([0.1, 0.2, 0.3, 0.1, 0.4]))
        0.03125
    """
    values = np.asarray(differences, float)
    above, below = (values > margin).sum(-1), (values < margin).sum(-1)
    # P(X >= above) of a fair binomial; bdtrc(k, n, p) is P(X > k), and bdtrc(-1, ...) is 1.
    return np.asarray(special.bdtrc(above - 1.0, above + below, 0.5), float)
