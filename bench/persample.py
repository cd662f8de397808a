"""Per-sample gradients and their norms: LeNet, 256 samples, one thread, CPU seconds, arms interleaved."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from nervure.core.persample import PerSample

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-bench" / "bin" / "python"


def fastest(arms: dict[str, Callable[[], Any]], *, rounds: int = 8) -> dict[str, float]:
    """Return the least CPU seconds of each arm over interleaved rounds, after one warm-up."""
    best = dict.fromkeys(arms, float("inf"))
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if turn:
                best[name] = min(best[name], time.process_time() - started)
    return best


def row(
    name: str, ours: float | None, baseline: float | None, target: float | None, *, unit: str = "CPU s", note: str = ""
) -> dict[str, Any]:
    """Return one line of a benchmark: how many times the baseline costs what ours costs."""
    ratio = None if ours is None or baseline is None else baseline / ours
    return {
        "name": name,
        "ours": ours,
        "baseline": baseline,
        "ratio": ratio,
        "target": target,
        "unit": unit,
        "note": note,
    }


def peers(file: str, names: list[str]) -> list[dict[str, Any]]:
    """Run a benchmark's `peer` function in the peers' environment, or say that it is absent."""
    if not PEERS.exists():
        return [row(name, None, None, None, note="absent: no .venv-bench") for name in names]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PEERS), file, "peer"], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        note = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        return [row(name, None, None, None, note=f"failed: {note}") for name in names]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def installed(package: str) -> bool:
    """Say whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None


def lenet() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    return model, torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,))


def _functional(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (a[None],)), b[None])

    found: dict[str, Tensor] = vmap(grad(loss), (None, 0, 0))(values, x, y)
    return found


def _loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    norms = []
    for a, b in zip(x, y, strict=True):
        g = torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), list(model.parameters()))
        norms.append(sum(v.square().sum() for v in g))
    return torch.stack(norms)


def main() -> list[dict[str, Any]]:
    model, x, y = lenet()
    engine = PerSample(model, (x, y), F.cross_entropy)
    parameters = list(model.parameters())
    seconds = fastest(
        {
            "gradients": lambda: engine.gradients((x, y)),
            "norms": lambda: engine.squared_norms((x, y)),
            "sums": lambda: engine.squared_sums((x, y)),
            "vmap": lambda: _functional(model, x, y),
            "loop": lambda: _loop(model, x, y),
            "batch": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters),
        }
    )
    return [
        row("per-sample gradients against vmap(grad)", seconds["gradients"], seconds["vmap"], 1.0),
        row("per-sample gradients against a loop", seconds["gradients"], seconds["loop"], 3.0),
        row("per-sample norms against vmap(grad)", seconds["norms"], seconds["vmap"], 1.0),
        row("per-sample norms against one batch gradient", seconds["norms"], seconds["batch"], 1 / 2.5, note="LeNet"),
        _dense_norms(),
        row("diagonal Fisher sums against vmap(grad)", seconds["sums"], seconds["vmap"], 1.0),
        *peers(__file__, ["per-sample norms against BackPACK BatchL2Grad"]),
    ]


def _dense_norms() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    x, y = torch.randn(256, 784), torch.randint(0, 10, (256,))
    engine, parameters = PerSample(model, (x, y), F.cross_entropy), list(model.parameters())
    seconds = fastest(
        {
            "norms": lambda: engine.squared_norms((x, y)),
            "batch": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters),
        },
        rounds=40,
    )
    name = "per-sample norms against one batch gradient, linear layers alone"
    return row(name, seconds["norms"], seconds["batch"], 1 / 1.5, note="784-300-100-10")


def peer() -> list[dict[str, Any]]:
    name = "per-sample norms against BackPACK BatchL2Grad"
    if not installed("backpack"):
        return [row(name, None, None, None, note="absent: backpack-for-pytorch")]
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, x, y = lenet()
    engine = PerSample(model, (x, y), F.cross_entropy)
    extended, loss = extend(lenet()[0]), extend(nn.CrossEntropyLoss(reduction="sum"))

    def theirs() -> Tensor:
        extended.zero_grad()
        with backpack(BatchL2Grad()):
            loss(extended(x), y).backward()
        total: Tensor = sum(value.batch_l2 for value in extended.parameters())
        return total

    torch.testing.assert_close(theirs(), engine.squared_norms((x, y)), rtol=1e-3, atol=1e-5)
    seconds = fastest({"ours": lambda: engine.squared_norms((x, y)), "theirs": theirs})
    return [row(name, seconds["ours"], seconds["theirs"], 1.0)]


if __name__ == "__main__":
    print(json.dumps(peer() if sys.argv[1:] == ["peer"] else main()))
