"""CKA of all pairs of layers, and weight matching: one thread, CPU seconds, arms interleaved."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from bench.persample import fastest, installed, peers, row
from nervure.core.features import features, samples
from nervure.core.matching import weight_matching
from nervure.core.permutation import PermutationGraph, permuted
from nervure.core.similarity import MinibatchCKA

_LAYERS = [str(place) for place in range(0, 14, 2)]
_CKA = "CKA of 7 x 7 layers, 1024 samples, against torch_cka"


def _problem() -> tuple[list[nn.Module], list[Tensor]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    nets = []
    for _ in range(2):
        parts = [nn.Linear(64, 256), nn.ReLU()]
        for _ in range(5):
            parts += [nn.Linear(256, 256), nn.ReLU()]
        nets.append(nn.Sequential(*parts, nn.Linear(256, 10)).eval())
    return nets, list(torch.randn(1024, 64).split(128))


def _ours(nets: list[nn.Module], batches: list[Tensor]) -> Tensor:
    seen = MinibatchCKA()
    for x in batches:
        sides = [features(net, x, _LAYERS) for net in nets]
        seen.update(*([samples(side[name]) for name in _LAYERS] for side in sides))
    return seen.matrix("unbiased")


def _matching() -> dict[str, Any]:
    """Compare with what cannot be saved: the two assignments of the right size, solved once each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    graph = PermutationGraph.of(net, torch.ones(2, 64))
    other = permuted(net, graph, graph.random(seed=1))
    found = weight_matching(net, other, graph)
    costs = [net[place].weight.detach().double() @ other[place].weight.detach().double().T for place in (0, 2)]

    def assignments() -> None:
        for cost in costs:
            linear_sum_assignment(cost.numpy(), maximize=True)

    seconds = fastest({"ours": lambda: weight_matching(net, other, graph), "theirs": assignments}, rounds=5)
    note = f"{found.certificate}, {found.sweeps} passes"
    return row("matching of 2 x 256 units against two assignments", seconds["ours"], seconds["theirs"], None, note=note)


def main() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [_matching(), *peers(__file__, [_CKA])]


def peer() -> list[dict[str, Any]]:
    if not installed("torch_cka"):
        return [row(_CKA, None, None, None, note="absent: torch_cka")]
    nets, batches = _problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_against(nets, batches)]


def _against(nets: list[nn.Module], batches: list[Tensor]) -> dict[str, Any]:
    from torch.utils.data import DataLoader, TensorDataset
    from torch_cka import CKA

    data = torch.cat(batches)
    loader = DataLoader(TensorDataset(data, torch.zeros(len(data))), batch_size=128)

    def theirs() -> Tensor:
        compared = CKA(*nets, model1_layers=_LAYERS, model2_layers=_LAYERS, device="cpu")
        compared.compare(loader)
        return compared.export()["CKA"]

    apart = float((_ours(nets, batches) - theirs()).abs().max())
    seconds = fastest({"ours": lambda: _ours(nets, batches), "theirs": theirs}, rounds=5)
    return row(
        _CKA, seconds["ours"], seconds["theirs"], 2.0, note=f"ours in float64; theirs in float32, off by {apart:.2g}"
    )


if __name__ == "__main__":
    print(json.dumps(peer() if sys.argv[1:] == ["peer"] else main()))
