"""Build 0002.db and, beside it, what is in it as JSON. Run once, with the code whose newest schema was the second."""

import json
import math
import sqlite3
import sys
from pathlib import Path

from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store


def made(seed, status=Status.DONE, **params):
    curve = [Measurement(arm="ours", metric="loss", value=1 / (step + 1), step=float(step)) for step in range(20)]
    return Record(
        job=Job(target="claim:old/claim", arm="*", case="lenet", seed=seed, params={"lr": 0.1, **params}),
        status=status,
        measurements=(
            Measurement(arm="ours", metric="accuracy", value=0.1 + 0.2),
            Measurement(arm="überarm", metric="loss", value=math.nan),
            Measurement(arm="ours", metric="least", value=5e-324),
            Measurement(arm="ours", metric="worst", value=-math.inf),
            *curve,
        ),
        cost={"seconds": 1.5, "rss": math.inf},
        warnings=("a zero byte \x00 and half a pair \ud800",),
        error=None if status is Status.DONE else "RuntimeError: no\n\x00",
        environment={"torch": "2.13"},
        started="2026-01-01T00:00:00+00:00",
    )


def build(path):
    with Store.open(path) as store:
        store.add(made(0, Status.FAILED))
        store.add(made(0))
        store.add(made(2**63 - 1, Status.DIVERGED))
        store.add(made(1, quick=True))
        store.add(made(2, Status.OVER_BUDGET))
        Path(path).with_suffix(".json").write_text(
            json.dumps([record.to_json() for record in store.records(history=True)], indent=1) + "\n"
        )
    # A lease of a process that died, as a power failure leaves it; then one file without a log beside it.
    raw = sqlite3.connect(path)
    raw.execute("INSERT INTO nervure_leases VALUES ('0123456789abcdef0123', 'f', 'elsewhere', 1, '1', 1767225600.0)")
    raw.commit()
    raw.execute("PRAGMA journal_mode = DELETE")
    raw.close()


if __name__ == "__main__":
    build(sys.argv[1])
