"""Time populations against an honest loop over the members: same thread, same batches, torch's fastest optimizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nervure import zoo
from nervure.core.population import SGD, Population


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _loop(
    networks: list[nn.Module], inputs: Any, targets: torch.Tensor, options: dict[str, bool]
) -> Callable[[], None]:
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, **options) for network in networks]

    def step() -> None:
        for network, optimizer, x, y in zip(networks, optimizers, inputs, targets, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

    return step


def _seconds(work: Callable[[], Any], seconds: float) -> float:
    """Return the CPU seconds of one call, over calls that take about `seconds` together."""
    start, calls = time.process_time(), 0
    while True:
        work()
        calls += 1
        spent = time.process_time() - start
        if spent > seconds:
            return spent / calls


def _case(
    name: str, build: Callable[[], nn.Module], count: int, batch: tuple[int, ...], target: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = [build() for _ in range(count)]
    inputs, targets = torch.randn(count, *batch), torch.randint(4, (count, batch[0]))
    crowd = Population(networks, optimizer=SGD(0.05, momentum=0.9))
    loops = [_loop(networks, inputs, targets, {key: True}) for key in ("foreach", "fused")]
    works = [lambda: crowd.step(inputs, targets), *loops]
    for work in works:
        work()
        work()
    best = [float("inf")] * len(works)
    for _ in range(5):  # interleaved, so that a change of the machine's load meets all of them
        for place, work in enumerate(works):
            best[place] = min(best[place], _seconds(work, 0.15))
    ours, baseline = best[0] * 1e3, min(best[1:]) * 1e3
    return {
        "name": f"{name} ({crowd.backend.name})",
        "ours": ours,
        "baseline": baseline,
        "ratio": baseline / ours,
        "target": target,
        "unit": "ms per step of all members",
    }


def main() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            _case("128 x 64-32-10, batch 32", lambda: _mlp(64, 32, 10), 128, (32, 64), 8.0),
            _case("32 x 64-64-10, batch 64", lambda: _mlp(64, 64, 10), 32, (64, 64), 4.0),
            _case("32 x LeNet-300-100, batch 64", lambda: _mlp(784, 300, 100, 10), 32, (64, 784), 0.95),
            _case("8 x LeNet, batch 64", zoo.case("lenet").make, 8, (64, 1, 28, 28), 0.95),
            _case("4 x residual conv with BatchNorm, batch 64", zoo.case("residual-conv").make, 4, (64, 1, 8, 8), 0.95),
            _case("4 x LSTM, batch 64", zoo.case("lstm").make, 4, (64, 5, 6), 0.95),
        ]
    finally:
        torch.set_num_threads(threads)
    print(f"{'population':55} {'ours ms':>9} {'loop ms':>9} {'ratio':>6} {'target':>6}")
    for row in rows:
        print(f"{row['name']:55} {row['ours']:9.2f} {row['baseline']:9.2f} {row['ratio']:6.2f} {row['target']:6.2f}")
    return rows


if __name__ == "__main__":
    main()
