"""Optimizers."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("optim")
