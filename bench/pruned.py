"""Time networks with half of their multiply-adds cut against the dense ones, batch 64, one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.persample import fastest, row

CASES = ("residual-conv", "deep-conv", "u-net")
WIDER = 8.0


def main() -> list[dict[str, Any]]:
    from nervure import zoo
    from nervure.compress import Spa
    from nervure.core import forward
    from nervure.spec import Budget
    from nervure.testing.toy import ToyTask

    rows = []
    for case in CASES:
        model = zoo.build(case, shape=(1, 28, 28), classes=10, seed=0, scale=WIDER).eval()
        x = torch.randn(64, 1, 28, 28)
        task = ToyTask(x, torch.randint(10, (64,)))
        small = Spa(when="init").fit(model, task, Budget(target=0.5, metric="macs"), seed=0).model.eval()

        def timed(net: nn.Module, x: torch.Tensor = x) -> Any:
            return lambda: forward.predict(net, x)

        best = fastest({"small": timed(small), "dense": timed(model)}, rounds=10)
        name = f"{case}, {WIDER:g} times as wide, half the MACs, against dense"
        rows.append(row(name, best["small"], best["dense"], 1.5))
    return rows


if __name__ == "__main__":
    for one in main():
        print(one)
