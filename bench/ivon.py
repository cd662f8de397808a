"""Time IVON's part of a step against drawing its noise, fused AdamW and the reference implementation ivon-opt."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TENSORS, ELEMENTS = 60, 1_000_000
PEER = Path(__file__).parent.parent / ".venv-bench" / "bin" / "python"
_PEER_CODE = """
import json, time, torch, ivon
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.randn({each})) for _ in range({tensors})]
grads = [torch.randn_like(p) for p in params]
optimizer = ivon.IVON(params, lr=0.1, ess=1e4)
best = 1e9
for _ in range({repeats}):
    start = time.process_time()
    with optimizer.sampled_params(train=True):
        for p, g in zip(params, grads):
            p.grad = g
    optimizer.step()
    best = min(best, time.process_time() - start)
print(json.dumps(best))
"""


def _parameters() -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    params = [nn.Parameter(torch.randn(ELEMENTS // TENSORS)) for _ in range(TENSORS)]
    return params, [torch.randn_like(p) for p in params]


def _set(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def _works() -> dict[str, Callable[[], Any]]:
    from nervure.optim.ivon import IVON

    params, grads = _parameters()
    ivon = IVON(params, lr=0.1, ess=1e4)
    others, their_grads = _parameters()
    adamw = torch.optim.AdamW(others, lr=1e-3, fused=True)
    _set(others, their_grads)

    def step() -> None:
        with ivon.sample():
            _set(params, grads)
        ivon.step()

    return {"ivon": step, "noise": lambda: torch.randn(ELEMENTS), "fused AdamW": adamw.step}


def _peer(repeats: int) -> float | None:
    """Return the peer's best seconds a step, or None where it is not installed."""
    if not PEER.exists():
        return None
    code = _PEER_CODE.format(each=ELEMENTS // TENSORS, tensors=TENSORS, repeats=repeats)
    done = subprocess.run([str(PEER), "-P", "-c", code], capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout)) if done.returncode == 0 else None


def main(repeats: int = 60) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = _works()
        best = dict.fromkeys(works, float("inf"))
        for _ in range(repeats):  # interleaved, so that a change of the machine's load meets all of them
            for name, work in works.items():
                start = time.process_time()
                work()
                best[name] = min(best[name], time.process_time() - start)
        peer = _peer(repeats)
    finally:
        torch.set_num_threads(threads)
    ours = best["ivon"] * 1e3
    rows = [
        ("optimizer time against ivon-opt 0.1.3", None if peer is None else peer * 1e3, 4.0),
        ("optimizer time against drawing its noise", best["noise"] * 1e3, 1 / 1.5),
        ("optimizer time against fused AdamW", best["fused AdamW"] * 1e3, None),
    ]
    return [
        {
            "name": name,
            "ours": ours,
            "baseline": baseline,
            "ratio": None if baseline is None else baseline / ours,
            "target": target,
            "unit": "ms per step, 1.0M parameters in 60 tensors, one thread",
            **({"note": "ivon-opt is not installed in .venv-bench"} if baseline is None else {}),
        }
        for name, baseline, target in rows
    ]


if __name__ == "__main__":
    for row in main():
        print(row)
