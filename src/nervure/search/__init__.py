"""Search over hyper-parameters and architectures."""

from nervure.catalogue import exports

__getattr__, __dir__ = exports("search")
