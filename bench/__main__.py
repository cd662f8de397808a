"""Run the side-by-side benchmarks and print their ratios: ``python -m bench [name ...]``.

One pinned thread, CPU seconds, warmed up, arms interleaved; the baseline is the best public implementation at hand.
A peer that is not installed in ``.venv-bench`` (see ``bench/README.md``) is reported as absent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_") and "peer" not in path.stem)


def number(value: float | None) -> str:
    """Write a number with three significant digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def run(names: list[str]) -> list[dict[str, object]]:
    """Run the named benchmarks and print a line a comparison."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows: list[dict[str, object]] = []
    print(f"{'comparison':<58} {'ours':>9} {'baseline':>9} {'ratio':>7} {'target':>7}  unit")
    for name in names:
        start = time.perf_counter()
        for row in importlib.import_module(f"bench.{name}").main():
            rows.append({"bench": name, **row})
            cells = [number(row.get(key)) for key in ("ours", "baseline", "ratio", "target")]
            note = f"  {row['note']}" if row.get("note") else ""
            label = f"{name}: {row['name']}"
            print(f"{label:<58} {cells[0]:>9} {cells[1]:>9} {cells[2]:>7} {cells[3]:>7}  {row.get('unit', '')}{note}")
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    return rows


def main() -> int:
    """Run what the command line names, or everything; write ``results/bench.json`` when asked by ``--save``."""
    words = [word for word in sys.argv[1:] if word != "--save"]
    unknown = [word for word in words if word not in NAMES]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    rows = run(words or NAMES)
    if "--save" in sys.argv:
        folder = HERE.parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
