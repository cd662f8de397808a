"""Time IVON's part of a step against drawing its noise, fused AdamW and the reference implementation ivon-opt."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

TENSORS, ELEMENTS, WARM_UP = 60, 1_000_000, 5
PEER = Path(__file__).parent.parent / ".venv-bench" / "bin" / "python"
_PEER_CODE = """
import sys, time, torch, ivon
torch.set_num_threads(1)
params = [torch.nn.Parameter(torch.randn({each})) for _ in range({tensors})]
grads = [torch.randn_like(p) for p in params]
optimizer = ivon.IVON(params, lr=0.1, ess=1e4)
for _ in sys.stdin:
    start = time.process_time()
    with optimizer.sampled_params(train=True):
        for p, g in zip(params, grads):
            p.grad = g
    optimizer.step()
    print(time.process_time() - start, flush=True)
"""


def _parameters() -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    params = [nn.Parameter(torch.randn(ELEMENTS // TENSORS)) for _ in range(TENSORS)]
    return params, [torch.randn_like(p) for p in params]


def _set(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return seconds


def _ivon(*, fused: bool) -> Callable[[], float]:
    from nervure.optim.ivon import IVON

    params, grads = _parameters()
    optimizer = IVON(params, lr=0.1, ess=1e4, fused=fused)

    def step() -> None:
        with optimizer.sample():
            _set(params, grads)
        optimizer.step()

    return _timed(step)


def _adamw() -> Callable[[], float]:
    params, grads = _parameters()
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    _set(params, grads)
    return _timed(optimizer.step)


@contextmanager
def _peer() -> Iterator[dict[str, Callable[[], float]]]:
    """Run the peer in its own environment, a step at a time; nothing where it is not installed."""
    if not PEER.exists() or subprocess.run([str(PEER), "-P", "-c", "import ivon"], capture_output=True).returncode:
        yield {}
        return
    code = _PEER_CODE.format(each=ELEMENTS // TENSORS, tensors=TENSORS)
    command = [str(PEER), "-P", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def seconds() -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield {"ivon-opt 0.1.3": seconds}


def main(repeats: int = 60) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _peer() as peer:
            noise = _timed(lambda: torch.randn(ELEMENTS))
            works = {"fused": _ivon(fused=True), "eager": _ivon(fused=False), "its noise": noise}
            works |= {"fused AdamW": _adamw(), **peer}
            best = dict.fromkeys(works, float("inf"))
            for turn in range(WARM_UP + repeats):  # interleaved: a change of the machine's load meets all of them
                for name, work in works.items():
                    seconds = work()
                    best[name] = min(best[name], seconds) if turn >= WARM_UP else best[name]
    finally:
        torch.set_num_threads(threads)
    targets = {"ivon-opt 0.1.3": 4.0, "its noise": 1 / 1.5}
    return [
        _row(kind, name, best[kind], best.get(name), targets.get(name) if kind == "fused" else None)
        for kind in ("fused", "eager")
        for name in ("ivon-opt 0.1.3", "its noise", "fused AdamW")
    ]


def _row(kind: str, name: str, ours: float, baseline: float | None, target: float | None) -> dict[str, Any]:
    return {
        "name": f"{kind} step against {name}",
        "ours": ours * 1e3,
        "baseline": None if baseline is None else baseline * 1e3,
        "ratio": None if baseline is None else baseline / ours,
        "target": target,
        "unit": "ms per step, 1.0M parameters in 60 tensors, one thread",
        **({"note": "ivon-opt is not installed in .venv-bench"} if baseline is None else {}),
    }


if __name__ == "__main__":
    for row in main():
        print(row)
