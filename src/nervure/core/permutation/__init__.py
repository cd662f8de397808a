"""Which units of a network may change places without changing what it computes, and networks with them permuted."""

from nervure.core.permutation.graph import PermutationGraph, Permutations, permuted
from nervure.core.permutation.units import Orders, Place, Units, compose

__all__ = ["Orders", "PermutationGraph", "Permutations", "Place", "Units", "compose", "permuted"]
