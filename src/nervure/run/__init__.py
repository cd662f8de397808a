"""Floor 6: plans, jobs and executors."""

from nervure.run.crowd import run_crowd
from nervure.run.execute import Event, Executor, Interrupted, Sink, execute
from nervure.run.inline import Inline
from nervure.run.local import Local
from nervure.run.plan import plan_claim
from nervure.run.ray import Ray
from nervure.run.resources import Resources

__all__ = [
    "Event",
    "Executor",
    "Inline",
    "Interrupted",
    "Local",
    "Ray",
    "Resources",
    "Sink",
    "execute",
    "plan_claim",
    "run_crowd",
]
