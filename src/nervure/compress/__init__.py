"""Pruning and other ways to make a network smaller."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("compress")
