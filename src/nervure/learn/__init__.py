"""Training loops and training rules."""

from nervure.catalogue import exports
from nervure.learn.loop import Loop, accuracy, cross_entropy

__all__ = ["Loop", "accuracy", "cross_entropy"]
__getattr__, __dir__ = exports("learn")
