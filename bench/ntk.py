"""The empirical NTK of LeNet (61,706 parameters), 256 samples, all 10 outputs: CPU seconds and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.persample import ROOT, fastest, installed, lenet, peers, row
from nervure.kernels.pseudo_ntk import pntk
from nervure.kernels.torchntk import entk, jacobian_entk


def _flat(model: torch.nn.Module, x: Tensor) -> Tensor:
    """Compute the same recipe with one product of whole Jacobians, the variant with the fewest large outputs."""
    values = {name: value.detach() for name, value in model.named_parameters()}

    def output(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (sample[None],))[0]

    found = torch.func.vmap(torch.func.jacrev(output), (None, 0))(values, x)
    J = torch.cat([value.flatten(2) for value in found.values()], 2).flatten(0, 1)
    return J @ J.T


_ARMS = {"ours": lambda m, x: entk(m, x).full, "per parameter": jacobian_entk, "flat": _flat}


def _peak(arm: str) -> float:
    """Return the peak resident bytes of one arm over those of a process that only loaded model and data."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "peak", arm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _measure_peak(arm: str) -> float:
    model, x, _ = lenet()
    # A small warm-up loads the libraries, whose pages are not the method's.
    _ARMS[arm](model, x[:4])
    before = _high_water()
    _ARMS[arm](model, x)
    return _high_water() - before


def _high_water() -> float:
    """Return the peak resident bytes of this process alone (`ru_maxrss` would start from its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> list[dict[str, Any]]:
    model, x, _ = lenet()
    ours, theirs = entk(model, x).full, jacobian_entk(model, x)
    error = float((ours - theirs).norm() / theirs.norm())
    slow = fastest({name: lambda arm=arm: arm(model, x) for name, arm in _ARMS.items()}, rounds=3)
    quick = fastest({"sum": lambda: pntk(model, x).full}, rounds=10)
    best = min(slow["per parameter"], slow["flat"])
    peak = {name: _peak(name) for name in _ARMS}
    lean = min(peak["per parameter"], peak["flat"])
    return [
        row("full NTK against torch.func, best variant", slow["ours"], best, 12.0, note=f"relative error {error:.1e}"),
        row("NTK of summed logits against torch.func", quick["sum"], best, 100.0),
        row("peak memory of the full NTK against torch.func", peak["ours"], lean, 2.5, unit="bytes"),
        *peers(__file__, ["full NTK against nngeometry"]),
    ]


def peer() -> list[dict[str, Any]]:
    name = "full NTK against nngeometry"
    if not installed("nngeometry"):
        return [row(name, None, None, None, note="absent: nngeometry")]
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from torch.utils.data import DataLoader, TensorDataset

    model, x, y = lenet()
    loader = DataLoader(TensorDataset(x, y), batch_size=256)

    def theirs() -> Tensor:
        collection = LayerCollection.from_model(model)
        backend = TorchHooksJacobianBackend(layer_collection=collection, model=model, function=lambda *d: model(d[0]))
        gram: Tensor = backend.get_gram_matrix(loader)
        return gram

    seconds = fastest({"ours": lambda: entk(model, x).full, "theirs": theirs}, rounds=2)
    return [row(name, seconds["ours"], seconds["theirs"], 12.0)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(_measure_peak(sys.argv[2]))
    else:
        print(json.dumps(peer() if sys.argv[1:] == ["peer"] else main()))
