"""Larger networks with their units in random order: the same function, and matching finds the order again."""

import larger_models
import pytest
import torch

from nervure.core import forward
from nervure.core.matching import weight_matching
from nervure.core.permutation import PermutationGraph, permuted


@pytest.mark.parametrize("name", sorted(larger_models.MODELS))
def test_larger_networks_are_permuted_and_matched_exactly(name):
    make, inputs = larger_models.MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    graph = PermutationGraph.of(model, inputs)
    other = permuted(model, graph, graph.random(seed=1))
    expected, found = (forward.predict(one, inputs) for one in (model, other))
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert len(graph.groups) > 1
    assert weight_matching(model, other, graph, restarts=0).certificate == "exact"
