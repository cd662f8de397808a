"""A run in a process of its own: python parent_for_tests.py STORE LOG JOBS SECONDS WORKERS DO."""

import json
import sys
from pathlib import Path

from nervure.run import Inline, Interrupted, Local, execute, plan_claim
from nervure.store import Store

store, log, jobs, seconds, workers, do = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).parent))
plan = plan_claim("a/b", seeds=int(jobs), params={"log": log, "seconds": float(seconds), "do": do})
executor = Local(int(workers)) if int(workers) else Inline()
try:
    with Store.open(store) as sink:
        ran = [record.job.seed for record in execute(plan, work="jobs_for_tests:work", executor=executor, sink=sink)]
except Interrupted as interrupted:
    print(interrupted, flush=True)
    sys.exit(interrupted.exit_code)
print(json.dumps(ran), flush=True)
