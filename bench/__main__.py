"""Run the side-by-side benchmarks and print their ratios: ``python -m bench [name ...] [--save]``.

One pinned thread, CPU seconds, warmed up, arms interleaved; the baseline is the best public implementation at hand.
A peer that is not installed in ``.venv-bench`` (``make bench-peers``) is reported as absent. ``--save`` keeps the rows
in ``results/bench.json``, those of other benchmarks as they were, and writes the table of docs/benchmarks.md.
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
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
SAVED, PAGE = HERE.parent / "results" / "bench.json", HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
Row = dict[str, object]


def number(value: object) -> str:
    """Write a number with three significant digits, or a dash."""
    return f"{value:.3g}" if isinstance(value, int | float) else "-"


def run(names: list[str]) -> list[Row]:
    """Run the named benchmarks and print a line a comparison."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows: list[Row] = []
    print(f"{'comparison':<62} {'ours':>9} {'baseline':>9} {'ratio':>7} {'target':>7}  unit")
    for name in names:
        start = time.perf_counter()
        for row in importlib.import_module(f"bench.{name}").main():
            rows.append({"bench": name, **row})
            cells = [number(row.get(key)) for key in ("ours", "baseline", "ratio", "target")]
            note = f"  {row['note']}" if row.get("note") else ""
            label = f"{name}: {row['name']}"
            print(f"{label:<62} {cells[0]:>9} {cells[1]:>9} {cells[2]:>7} {cells[3]:>7}  {row.get('unit', '')}{note}")
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Return the saved rows as a Markdown table; a target that was missed says so."""
    lines = [
        "| `python -m bench` | comparison | ours | baseline | ratio | target | unit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, target = row.get("ratio"), row.get("target")
        missed = isinstance(ratio, float) and isinstance(target, int | float) and ratio < target
        note = f" ({row['note']})" if row.get("note") else ""
        cells = [number(row.get(key)) for key in ("ours", "baseline", "ratio", "target")]
        cells[3] += ", missed" * missed
        lines.append(f"| `{row['bench']}` | {row['name']} | {' | '.join(cells)} | {row.get('unit', '')}{note} |")
    return "\n".join(lines)


def save(rows: list[Row], names: list[str]) -> None:
    """Keep the rows and write the page's table."""
    old = json.loads(SAVED.read_text()) if SAVED.exists() else []
    rows = sorted([*(row for row in old if row["bench"] not in names), *rows], key=lambda row: str(row["bench"]))
    SAVED.write_text(json.dumps(rows, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}")


def main() -> int:
    """Run what the command line names, or everything."""
    words = [word for word in sys.argv[1:] if word != "--save"]
    unknown = [word for word in words if word not in NAMES]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    rows = run(words or NAMES)
    if "--save" in sys.argv:
        save(rows, words or NAMES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
