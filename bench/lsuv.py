"""Time LSUV's one pass against the published layer-by-layer algorithm, over depth."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

WIDTH, BATCH = 256, 256


def _plain(depth: int) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])


@torch.no_grad()
def _layer_by_layer(net: nn.Sequential, x: torch.Tensor, tol: float = 0.1, tries: int = 10) -> None:
    """Draw orthonormal weights, then run the network once for each layer and try, as published."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    seen: list[torch.Tensor] = []
    for layer in layers:
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        for _ in range(tries):
            seen.clear()
            net(x)
            std = seen[0].std()
            if abs(float(std) ** 2 - 1) <= tol:
                break
            layer.weight /= std
        handle.remove()


def main(repeats: int = 3) -> list[dict[str, Any]]:
    from nervure.init.lsuv import lsuv_

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for depth in (5, 20, 50):
            net, x = _plain(depth), torch.randn(BATCH, WIDTH)
            works = {"ours": lambda net, x: lsuv_(net, x), "baseline": _layer_by_layer}
            best = dict.fromkeys(works, float("inf"))
            for _ in range(repeats):
                for name, work in works.items():
                    twin = copy.deepcopy(net)
                    start = time.process_time()
                    work(twin, x)
                    best[name] = min(best[name], time.process_time() - start)
            rows.append(
                {
                    "name": f"LSUV of {depth} layers against layer by layer",
                    "ours": best["ours"] * 1e3,
                    "baseline": best["baseline"] * 1e3,
                    "ratio": best["baseline"] / best["ours"],
                    "target": None,
                    "unit": f"ms, width {WIDTH}, batch {BATCH}, one thread",
                }
            )
    finally:
        torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    for row in main():
        print(row)
