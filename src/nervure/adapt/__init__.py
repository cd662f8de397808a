"""Continual learning and adaptation."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("adapt")
