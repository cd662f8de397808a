"""Initialisers."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("init")
