"""Time the factored output layer's exact SGD step against a dense log-softmax step, one thread, over the classes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FEATURES, BATCH = 128, 64


def _factored(classes: int) -> Callable[[], None]:
    from nervure.losses.spherical import SphericalLinear
    from nervure.losses.z_loss import ZLoss

    head = SphericalLinear(FEATURES, classes, loss=ZLoss().spherical)
    h, target = torch.randn(BATCH, FEATURES, requires_grad=True), torch.randint(classes, (BATCH,))

    def step() -> None:
        h.grad = None
        head(h, target).backward()
        head.step(0.01)

    return step


def _dense(classes: int) -> Callable[[], None]:
    weight = nn.Parameter(torch.randn(classes, FEATURES) / FEATURES**0.5)
    h, target = torch.randn(BATCH, FEATURES, requires_grad=True), torch.randint(classes, (BATCH,))

    def step() -> None:
        weight.grad = h.grad = None
        F.cross_entropy(F.linear(h, weight), target).backward()
        with torch.no_grad():
            weight.add_(weight.grad, alpha=-0.01)

    return step


def _least(work: Callable[[], None], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best * 1e3


def main() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for classes, repeats, target in ((10_000, 20, None), (100_000, 8, 60.0), (793_471, 3, None)):
            ours, baseline = float("inf"), float("inf")
            factored, dense = _factored(classes), _dense(classes)
            for _ in range(3):  # interleaved, so that a change of the machine's load meets both
                ours, baseline = min(ours, _least(factored, 60)), min(baseline, _least(dense, repeats))
            rows.append(
                {
                    "name": f"exact step at {classes:,} classes against log-softmax",
                    "ours": ours,
                    "baseline": baseline,
                    "ratio": baseline / ours,
                    "target": target,
                    "unit": f"ms a step of the output layer, d {FEATURES}, batch {BATCH}, one thread",
                }
            )
            del factored, dense
    finally:
        torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
