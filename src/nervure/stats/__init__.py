"""Floor 2: paired intervals and the verdict rule."""

from nervure.stats.intervals import Interval, anytime_interval, power, t_interval
from nervure.stats.leaderboard import Row, leaderboard
from nervure.stats.multiplicity import holm, sign_test
from nervure.stats.rule import Decision, decide
from nervure.stats.verdict import joint, verdict

__all__ = [
    "Decision",
    "Interval",
    "Row",
    "anytime_interval",
    "decide",
    "holm",
    "joint",
    "leaderboard",
    "power",
    "sign_test",
    "t_interval",
    "verdict",
]
