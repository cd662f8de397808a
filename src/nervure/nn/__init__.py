"""Layers and architectures."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("nn")
