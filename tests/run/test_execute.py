import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nervure._kit import StoreError, UsageError
from nervure.run import Inline, Interrupted, Local, execute, plan_claim
from nervure.spec import Job, Record, Status

WORK = "jobs_for_tests:work"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


class Memory:
    """The smallest sink: what execute asks of a store, in a list."""

    def __init__(self):
        self.stored, self.held = [], set()

    def done(self, job_ids):
        wanted = set(job_ids)
        return {record.job.id for record in self.stored if record.status is Status.DONE} & wanted

    def lease(self, job_id):
        self.held.add(job_id)
        return True

    def release(self, job_ids):
        self.held -= set(job_ids)

    def add(self, record):
        self.stored.append(record)
        self.held.discard(record.job.id)
        return True


def jobs(*kinds, seconds=None, **params):
    budget = {} if seconds is None else {"seconds": seconds}
    return [
        Job(target="claim:a/b", arm="*", case="-", seed=seed, params={"do": kind, **params}, budget=budget)
        for seed, kind in enumerate(kinds)
    ]


def run(plan, executor=None, sink=None, **options):
    return list(execute(plan, work=WORK, executor=executor or Local(1), sink=sink or Memory(), **options))


@pytest.fixture(params=["inline", "local"])
def executor(request):
    return Inline() if request.param == "inline" else Local(2)


def test_records_say_what_happened(executor):
    sink = Memory()
    records = {r.job.params["do"]: r for r in run(jobs("", "raise", "diverge", "warn"), executor, sink)}
    assert {kind: record.status for kind, record in records.items()} == {
        "": Status.DONE,
        "raise": Status.FAILED,
        "diverge": Status.DIVERGED,
        "warn": Status.DONE,
    }
    assert records["raise"].error.startswith("ValueError: this job is broken\n")
    assert "jobs_for_tests.py" in records["raise"].error
    assert records["raise"].measurements[0].value == 1.0
    assert records["diverge"].error.startswith("Diverged: the loss became nan at step 3")
    assert records["warn"].warnings == ("a sentence", "RuntimeWarning: mind the gap")
    for record in records.values():
        assert record.environment["nervure"]
        assert record.environment["cpu"]
        assert record.cost["peak_rss"] > 1e6
        assert 0 <= record.cost["seconds"] < 10
        assert record.started.endswith("+00:00")
        assert Record.from_json(record.to_json()) == record
    assert sink.held == set()
    assert len(sink.stored) == 4


def test_done_jobs_are_skipped_and_failed_ones_tried_again(executor):
    sink = Memory()
    plan = jobs("", "raise", "")
    assert len(run([*plan, *plan], executor, sink)) == 3
    assert [record.job.params["do"] for record in run(plan, executor, sink)] == ["raise"]


def test_no_jobs(executor):
    assert run([], executor) == []


def test_workers_stay_warm_and_have_one_thread():
    records = run(jobs("remember", "remember", "remember", "environment"))
    assert [record.cost.get("calls") for record in records] == [0, 1, 2, None]
    assert records[3].cost["threads"] == 1
    assert records[3].environment["threads"] == "1"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("segfault", "SIGSEGV"), ("exit", "exit code 7"), ("kill", "SIGKILL, as a system short"), ("orphan", "code 9")],
)
def test_a_crash_fails_its_own_job_only(kind, words):
    records = {record.job.seed: record for record in run(jobs("", kind, "", ""), Local(2))}
    assert [records[seed].status for seed in range(4)] == ["done", "failed", "done", "done"]
    assert words in records[1].error
    if kind == "segfault":
        assert "ctypes" in records[1].error


@pytest.mark.parametrize("local", [True, False])
def test_a_job_over_its_seconds_ends_itself(local):
    (record,) = run(_timed(0.3, 5), Local(1) if local else Inline())
    assert record.status is Status.OVER_BUDGET
    assert "at most 0.3 s" in record.error
    assert record.cost["seconds"] < 1
    assert record.measurements


def _timed(budget, seconds):
    return [Job(target="claim:a/b", arm="*", case="-", seed=0, params={"seconds": seconds}, budget={"seconds": budget})]


def test_a_job_that_reports_nothing_is_killed():
    start = time.monotonic()
    records = run(jobs("hang", "", seconds=0.5), Local(1))
    assert [record.status for record in records] == ["over-budget", "done"]
    assert "killed after 3 times" in records[0].error
    assert time.monotonic() - start < 10


def test_progress_and_time_left(executor):
    events = []
    run(_timed(60, 0.6) + jobs(""), executor, on_event=events.append)
    assert events[0].kind == "planned"
    assert events[0].share == 0
    assert [event.kind for event in events].count("started") == 2
    assert [event.kind for event in events].count("ended") == 2
    shares = [event.job_share for event in events if event.kind == "progress" and event.job.params.get("seconds")]
    assert len(shares) >= 3
    assert shares == sorted(shares)
    assert events[-1].share == 1
    assert events[-1].seconds_left == 0
    assert all(event.seconds_left >= 0 for event in events if event.seconds_left is not None)


def test_much_progress_does_not_block(executor):
    assert [record.status for record in run(jobs("chatter", "chatter", "chatter"), executor)] == ["done"] * 3


def test_work_that_cannot_be_imported_is_a_record(executor):
    (record,) = execute(jobs(""), work="no_such_module:work", executor=executor, sink=Memory())
    assert record.status is Status.FAILED
    assert "cannot be imported" in record.error


def test_a_sink_that_fails_ends_the_run_and_gives_jobs_back(executor):
    class Full(Memory):
        def add(self, record):
            raise StoreError("the disk is full")

    sink = Full()
    with pytest.raises(StoreError):
        run(jobs("", "", ""), executor, sink)
    assert sink.held == set()


def test_leaving_early_kills_the_workers(executor):
    sink = Memory()
    before = signal.getsignal(signal.SIGINT)
    records = execute(jobs("", "hang" if isinstance(executor, Local) else ""), work=WORK, executor=executor, sink=sink)
    next(records)
    records.close()
    assert sink.held == set()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(sink.stored) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_this_process(executor, signum):
    sink = Memory()
    before = signal.getsignal(signum)
    timer = threading.Timer(1.0, signal.pthread_kill, [threading.main_thread().ident, signum])
    timer.start()
    with pytest.raises(Interrupted, match="start again") as caught:
        run(jobs("", "hang"), executor, sink)
    timer.join()
    assert caught.value.exit_code == 128 + signum
    assert isinstance(caught.value, KeyboardInterrupt)
    assert sink.held == set()
    assert signal.getsignal(signum) is before
    assert len(sink.stored) == 1


def test_a_job_taken_elsewhere_is_waited_for_or_taken_over():
    class Shared(Memory):
        tries = 0

        def lease(self, job_id):
            self.tries += 1
            if job_id == plan[0].id and self.tries < 4:
                return False
            if job_id == plan[1].id:
                if not any(record.job.id == job_id for record in self.stored):
                    self.stored.append(Record(job=plan[1], status=Status.DONE))
                return False
            return super().lease(job_id)

    plan, sink, events = jobs("", "", ""), Shared(), []
    records = run(plan, Inline(), sink, on_event=events.append)
    assert sorted(record.job.seed for record in records) == [0, 2]
    kinds = [(event.kind, event.job.seed) for event in events if event.kind in ("waiting", "elsewhere")]
    assert sorted(kinds) == [("elsewhere", 1), ("waiting", 0), ("waiting", 1)]
    assert events[-1].share == 1


def test_it_runs_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(run(jobs("", ""))))
    thread.start()
    thread.join()
    assert [record.status for record in found] == ["done", "done"]


def test_plan():
    plan = plan_claim("a/b", seeds=[4, 2, 4], params={"quick": True}, seconds=60)
    assert [(job.target, job.arm, job.seed, job.budget) for job in plan] == [
        ("claim:a/b", "*", 4, {"seconds": 60.0}),
        ("claim:a/b", "*", 2, {"seconds": 60.0}),
    ]
    for wrong in ({"seeds": 0}, {"seeds": 1, "seconds": 0}):
        with pytest.raises(UsageError):
            plan_claim("a/b", **wrong)
    with pytest.raises(UsageError):
        Local(0)


def test_torch_is_not_loaded_by_the_parent():
    code = "import sys, nervure.run, nervure.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
