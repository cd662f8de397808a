"""Build 0001.db, a store as the first revision of the schema left it. Run once, when there was no second revision."""

import json
import sqlite3
import sys

import sqlalchemy as sa

from nervure.spec import Job
from nervure.store import schema
from nervure.store.place import _on_begin, _on_connect, writing


def build(path):
    engine = sa.create_engine(f"sqlite:///{path}")
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", _on_begin)
    with writing(engine) as connection:
        schema.upgrade(connection, "0001")
        for seed in range(3):
            job = {
                "target": "claim:old/claim",
                "arm": "*",
                "case": "lenet",
                "seed": seed,
                "params": {"lr": 0.1},
                "budget": {},
            }
            rest = {"cost": {"seconds": 1.5}, "warnings": [], "error": None, "environment": {"torch": "2.13"}}
            body = json.dumps({"job": job, **rest, "started": "2026-01-01T00:00:00+00:00"})
            connection.exec_driver_sql(
                'INSERT INTO nervure_records (job_id, target, arm, "case", seed, status, body) VALUES (?,?,?,?,?,?,?)',
                (Job.from_json(job).id, job["target"], "*", "lenet", seed, "done" if seed else "failed", body),
            )
            connection.exec_driver_sql(
                "INSERT INTO nervure_measurements VALUES (?, 0, 'ours', 'accuracy', ?, NULL)",
                (seed + 1, None if seed == 2 else 0.5 + seed),
            )
    engine.dispose()
    # One file without a log beside it.
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA journal_mode = DELETE")
    raw.close()


if __name__ == "__main__":
    build(sys.argv[1])
