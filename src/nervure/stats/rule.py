"""The decision rule, vectorised: verdicts and the simulations that judge the rule call the same function."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nervure.spec import Outcome
from nervure.spec.claim import Rule
from nervure.stats.intervals import Interval, anytime_interval, t_interval

# Below five seeds even a perfect score has more than a 1 in 20 chance under the null: 0.5 ** 4 = 0.0625.
FEWEST_FOR_EVERY_SEED = 5
HOLDS, INCONCLUSIVE, DOES_NOT_HOLD = 1, 0, -1
OUTCOMES = {HOLDS: Outcome.HOLDS, INCONCLUSIVE: Outcome.INCONCLUSIVE, DOES_NOT_HOLD: Outcome.DOES_NOT_HOLD}


class Decision(NamedTuple):
    """Hold the intervals and the codes (1 holds, 0 inconclusive, -1 does not hold) of many checks."""

    interval: Interval
    code: NDArray[np.int8]


def decide(
    differences: ArrayLike, margin: ArrayLike = 0.0, *, rule: Rule = "interval", until_decided: bool = False
) -> Decision:
    """Decide checks from their paired differences.

    ``"interval"``: the 95% interval at or above the margin *holds*, below it *does not hold*, else it is inconclusive.
    ``"every-seed"``: one difference below the margin *does not hold*; five or more, all at or above it, *holds*.

    Args:
        differences: Paired differences, shape (..., n) with n >= 1, positive in favour of the method.
        margin: What the difference must reach, of a shape that broadcasts with (...).
        rule: The check's rule.
        until_decided: Use the interval that stays valid when seeds are added until there is a decision.

    Returns:
        Intervals and codes, shape (...).

    Examples:
        >>> decide([[1.0, 1.1, 0.9], [1.0, -1.1, 0.2]]).code.tolist()
        [1, 0]
    """
    values = np.asarray(differences, float)
    bound = np.asarray(margin, float)
    interval = anytime_interval(values) if until_decided else t_interval(values)
    if rule == "every-seed":
        # Adding seeds after a failure cannot undo it, so this rule needs no correction for looking early.
        lowest = values.min(-1)
        holds = (lowest >= bound) & (values.shape[-1] >= FEWEST_FOR_EVERY_SEED)
        fails = lowest < bound
    else:
        holds, fails = interval.low >= bound, interval.high < bound
    return Decision(interval, holds.astype(np.int8) - fails.astype(np.int8))
