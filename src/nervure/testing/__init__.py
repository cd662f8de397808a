"""The contracts and saboteurs, shipped for plugins."""

from nervure.testing.toy import ToyTask, toy_task

__all__ = ["ToyTask", "toy_task"]
