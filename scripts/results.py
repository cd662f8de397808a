"""Measure every claim and keep what came out: ``python scripts/results.py [claim ...]``; ``--table`` only rewrites.

The records under ``results/`` are committed: the tables in README.md and docs/results.md are made of them, and a test
compares their thresholds with the code's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PUBLISHED = ROOT / "src" / "nervure" / "catalogue" / "published.json"
UNMEASURED = RESULTS / "unmeasured.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def claim_ids() -> list[str]:
    """Return the ids of all runnable claims."""
    from nervure.catalogue import entries

    return [f"{entry.id}/{claim['name']}" for entry in entries().values() for claim in entry.claims]


def measure(claim_id: str) -> None:
    """Run one claim in full and write its result file."""
    from nervure import app

    with tempfile.TemporaryDirectory() as folder:
        # A store of its own: what was measured by an older version of the code must not be taken for done.
        ran = app.run(
            claim_id, report=folder, store=Path(folder) / "store.db", say=lambda text: print(text, flush=True)
        )
        data = json.loads(ran.files[0].read_text(encoding="utf-8"))
    for record in data["records"]:
        # Curves stay in the user's store; what a verdict rests on is kept.
        record["measurements"] = [point for point in record["measurements"] if point["step"] is None]
    kept = {"verdict": data["verdict"], "records": data["records"]}
    path = RESULTS / f"{claim_id.replace('/', '.')}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"{claim_id}: {data['verdict']['outcome']}", flush=True)


def unmeasured() -> list[str]:
    """Return the claims that stand in ``results/unmeasured.json``, without those that now have a result."""
    listed = json.loads(UNMEASURED.read_text(encoding="utf-8"))
    left = [claim_id for claim_id in listed if not (RESULTS / f"{claim_id.replace('/', '.')}.json").exists()]
    UNMEASURED.write_text(json.dumps(sorted(left), indent=1) + "\n", encoding="utf-8")
    return sorted(left)


def figures(verdict: dict) -> str:
    """Return each check's interval in one line, bounds on a value in the value's own sign."""
    parts = []
    for check in verdict["checks"]:
        turned = check["control"] is None and check["better"] == "lower"
        ends = [check[key] for key in (("high", "mean", "low") if turned else ("low", "mean", "high"))]
        low, mean, high = ("n/a" if end is None else f"{0.0 - end if turned else end:.4g}" for end in ends)
        asked = f"at most {0.0 - check['margin']:g}" if turned else f"at least {check['margin']:g}"
        parts.append(f"{check['name']}: {mean} [{low}, {high}], {asked}: {check['outcome']}")
    return "; ".join(parts)


def table() -> str:
    """Return the Markdown table of all results."""
    head = "| claim | verdict | checks: mean [95% interval], what is asked: outcome | seeds | minutes |"
    lines = [head, "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        verdict = data["verdict"]
        spent = sum(record["cost"].get("seconds", 0.0) for record in data["records"]) / 60
        void = "".join(f" (sabotage {arm!r} passes)" for arm, out in verdict["sabotage"].items() if out == "holds")
        line = f"| `{verdict['claim']}` | **{verdict['outcome']}**{void} | {figures(verdict)} "
        lines.append(line + f"| {len(verdict['seeds'])} | {spent:.1f} |")
    lines += [f"| `{claim_id}` | not measured in full yet | | | |" for claim_id in unmeasured()]
    return "\n".join(lines)


def published() -> str:
    """Return the verdicts alone, as the package ships them."""
    kept = []
    for path in sorted(RESULTS.glob("*.*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        record = max(data["records"], key=lambda one: one["started"])
        spent = sum(one["cost"].get("seconds", 0.0) for one in data["records"])
        about = {"environment": record["environment"], "started": record["started"], "seconds": round(spent, 1)}
        kept.append({"verdict": data["verdict"], **about})
    return "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False, sort_keys=True) for one in kept) + "\n]\n"


def write_tables() -> None:
    """Put the table between the markers of README.md and docs/results.md, and the verdicts into the package."""
    PUBLISHED.write_text(published(), encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    wanted = [word for word in sys.argv[1:] if word != "--table"]
    if "--table" not in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        for one in wanted or claim_ids():
            measure(one)
    write_tables()
