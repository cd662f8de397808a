"""Time ``nervure find`` as a user meets it: a fresh process, wall seconds, the best of several."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any


def _seconds(words: list[str], *, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> list[dict[str, Any]]:
    """Return find, list and show against their limit, and what importing torch alone would cost."""
    torch = _seconds([sys.executable, "-c", "import torch"], repeats=3)
    rows = []
    for words in (["find", "prune before training"], ["list"], ["show", "lottery-ticket"]):
        ours = _seconds([sys.executable, "-m", "nervure.cli", *words])
        rows.append(
            {
                "name": f"nervure {words[0]} (baseline: import torch)",
                "ours": ours,
                "baseline": torch,
                "ratio": torch / ours,
                "target": torch / 0.15,
                "unit": "s",
                "note": f"limit 0.15 s: {'met' if ours < 0.15 else 'missed'}",
            }
        )
    return rows
