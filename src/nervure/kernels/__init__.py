"""Neural tangent kernels and their relatives."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("kernels")
