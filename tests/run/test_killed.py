"""Real parents, really killed: nothing stored is lost, nothing is left running, a second start does what is missing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nervure.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are looked for in /proc")
HERE = Path(__file__).parent


class Lab:
    """A folder with a store, a log, and parents that run on them."""

    def __init__(self, folder):
        self.store, self.log = folder / "store.db", folder / "log"

    def start(self, jobs, seconds, workers=2, do=""):
        command = [sys.executable, HERE / "parent_for_tests.py", self.store, self.log, jobs, seconds, workers, do]
        return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)

    def lines(self):
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def ended(self):
        return Counter(int(line[1]) for line in self.lines() if line[0] == "end")

    def processes(self):
        return {int(line[-1]) for line in self.lines()}

    def wait_for(self, word, count):
        end = time.monotonic() + 20
        while sum(line[0] == word for line in self.lines()) < count:
            assert time.monotonic() < end
            time.sleep(0.01)

    def seeds(self):
        with Store.open(self.store) as store:
            return sorted(record.job.seed for record in store.records(history=True))

    def leases(self):
        with Store.open(self.store) as store, store._engine.connect() as connection:
            return connection.exec_driver_sql("SELECT count(*) FROM nervure_leases").scalar()


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_gives_back_its_jobs_and_is_resumed(lab, signum, workers):
    parent = lab.start(6, 0.4, workers)
    lab.wait_for("begin", 3)
    workers_then = children(parent.pid)
    start = time.monotonic()
    parent.send_signal(signum)
    out, _ = parent.communicate(timeout=10)
    assert time.monotonic() - start < 2
    assert parent.returncode == 128 + signum
    assert f"interrupted by {signal.Signals(signum).name}" in out
    assert len(workers_then) == workers
    assert gone(workers_then, 1)
    assert lab.leases() == 0
    before = lab.seeds()
    assert len(before) >= 1
    out, _ = lab.start(6, 0.4, workers).communicate(timeout=30)
    assert sorted(json.loads(out) + before) == lab.seeds() == list(range(6))
    # Done once; a job under way when the signal came may have ended without its record being taken.
    assert all(lab.ended()[seed] == 1 for seed in before)


@pytest.mark.parametrize("moment", ["begin 1", "end 1", "end 3", 0.05, 0.3])
def test_a_run_killed_at_any_moment_leaves_no_process_and_is_resumed(lab, moment):
    parent = lab.start(6, 0.3)
    if isinstance(moment, str):
        word, count = moment.split()
        lab.wait_for(word, int(count))
    else:
        time.sleep(moment)
    workers_then = children(parent.pid)
    parent.kill()
    parent.communicate()
    assert gone(workers_then, 3)
    assert gone(lab.processes(), 3)
    before = lab.seeds()
    assert len(lab.ended()) - len(before) <= 2
    out, _ = lab.start(6, 0.3).communicate(timeout=30)
    assert sorted(json.loads(out) + before) == lab.seeds() == list(range(6))
    assert all(lab.ended()[seed] == 1 for seed in before)
    assert lab.leases() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_hang_and_what_they_started_end_too(lab, signum):
    parent = lab.start(2, 600, do="child")
    lab.wait_for("child", 2)
    pids = lab.processes()
    assert len(pids) == 4
    assert all(map(alive, pids))
    parent.send_signal(signum)
    parent.communicate(timeout=10)
    try:
        workers = {int(line[-1]) for line in lab.lines() if line[0] == "begin"}
        assert gone(workers, 3)
        assert gone(pids, 3)
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_two_parents_on_one_store_do_every_job_once(lab):
    parents = [lab.start(12, 0.1, workers=1) for _ in range(2)]
    ran = [json.loads(parent.communicate(timeout=40)[0]) for parent in parents]
    assert [parent.returncode for parent in parents] == [0, 0]
    assert sorted(ran[0] + ran[1]) == lab.seeds() == list(range(12))
    assert min(map(len, ran)) >= 1
    assert lab.ended() == Counter(range(12))
    assert sum(line[0] == "begin" for line in lab.lines()) == 12


def test_the_other_parent_takes_over_the_jobs_of_one_that_is_killed(lab):
    first = lab.start(4, 1.0)
    lab.wait_for("begin", 2)
    second = lab.start(4, 1.0)
    time.sleep(0.2)
    first.kill()
    first.communicate()
    out, _ = second.communicate(timeout=30)
    assert sorted(json.loads(out)) == lab.seeds() == [0, 1, 2, 3]
