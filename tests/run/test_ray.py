"""A real cluster on this machine: a head and a second raylet, each with a process of its own for every CPU."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from nervure._kit import CouldNotRun, MissingExtra, UsageError
from nervure.app.jobs import choose
from nervure.run import Inline, Interrupted, Local, Ray, Resources, execute, plan_claim, run_crowd
from nervure.run import node as on_node
from nervure.run import ray as ray_module
from nervure.search import PBT
from nervure.search.drive import run_trainables
from nervure.search.space import Range
from nervure.spec import Job, Status
from nervure.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
HERE = Path(__file__).parent
WORK = "jobs_for_tests:work"
# Nothing is told to anybody; and the server for drivers elsewhere forks, which gRPC's handlers may hold up.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "GRPC_ENABLE_FORK_SUPPORT": "0"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@contextlib.contextmanager
def ray_starts():
    """Allow what Ray leaves to the garbage collector when it starts and ends its processes: logs, and the processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)
        warnings.filterwarnings("ignore", "subprocess [0-9]+ is still running", ResourceWarning)
        yield
        gc.collect()


class TwoNodes:
    """A head of one CPU with a server for drivers elsewhere, and a second node of one CPU that can be lost."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.client_port = free.getsockname()[1]
        self.cluster = Cluster()
        self.size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        with ray_starts():
            self.cluster.add_node(**self.size, include_dashboard=False, ray_client_server_port=self.client_port)
        self.address = self.cluster.address
        self.second = None

    def end(self):
        with ray_starts():
            self.cluster.shutdown()

    def grow(self):
        if self.second is None:
            with ray_starts():
                self.second = self.cluster.add_node(**self.size)
        return self

    def lose(self):
        """End the second node as a machine's end does: its raylet and its workers at once, without a word."""
        raylet = self.second.all_processes["raylet"][0].process.pid
        for pid in [raylet, *Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()]:
            os.kill(int(pid), signal.SIGKILL)
        self.second = None


@pytest.fixture(scope="module")
def two_nodes():
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    nodes = TwoNodes()
    yield nodes
    nodes.end()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def nodes(two_nodes):
    return two_nodes.grow()


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log")


class Log:
    """What jobs wrote as they began and ended."""

    def __init__(self, path):
        self.path = path

    def lines(self):
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def wait_for(self, word, count):
        end = time.monotonic() + 30
        while sum(line[0] == word for line in self.lines()) < count:
            assert time.monotonic() < end
            time.sleep(0.02)

    def begun(self):
        return Counter(int(line[1]) for line in self.lines() if line[0] == "begin")

    def alive(self):
        return [line[-1] for line in self.lines() if _alive(line[-1])]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _with_jobs():
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def jobs(*kinds, budget=None, **params):
    return [
        Job(target="claim:a/b", arm="*", case="-", seed=seed, params={"do": kind, **params}, budget=budget or {})
        for seed, kind in enumerate(kinds)
    ]


def run(plan, executor, sink, **options):
    return {one.job.seed: one for one in execute(plan, work=WORK, executor=executor, sink=sink, **options)}


def test_records_say_what_happened(nodes, store, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler, events = signal.getsignal(signal.SIGTERM), []
    plan = jobs("", "raise", "diverge", "warn", "environment", log=str(log.path), seconds=0.6)
    records = run(plan, Ray(nodes.address), store, on_event=events.append)
    assert [records[seed].status for seed in range(5)] == ["done", "failed", "diverged", "done", "done"]
    assert records[1].error.startswith("ValueError: this job is broken\n")
    assert records[1].warnings == ()
    assert records[3].warnings == ("a sentence", "RuntimeWarning: mind the gap")
    assert records[4].warnings == (str(tmp_path),)
    assert records[4].cost["threads"] == 1
    assert records[4].environment["threads"] == "1"
    assert log.begun() == Counter(range(5))  # what fails by itself is not done again
    assert len({line[-1] for line in log.lines()}) == 2  # one worker a node, warm
    # On a busy machine the mailbox may open after a short job has ended; progress of some came through.
    assert "working" in {event.text for event in events if event.kind == "progress"}
    assert events[-1].share == 1
    # The store holds what the driver took from the tasks, and no lease is left.
    assert {one.job.seed: one for one in store.records(history=True)} == records
    assert _leases(store) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    import ray

    assert not ray.is_initialized()


def _leases(store):
    with store._engine.connect() as connection:
        return connection.exec_driver_sql("SELECT count(*) FROM nervure_leases").scalar()


def test_a_node_is_lost_in_mid_run(nodes, store, log):
    def lose():
        log.wait_for("begin", 2)
        nodes.lose()

    thread = threading.Thread(target=lose)
    thread.start()
    records = run(jobs(*[""] * 5, log=str(log.path), seconds=1.0), Ray(nodes.address), store)
    thread.join()
    assert [records[seed].status for seed in range(5)] == [Status.DONE] * 5
    assert records[3].measurements[0].value == 3.0
    again = [record for record in records.values() if record.warnings]
    assert len(again) == 1
    assert "begun again, for its worker or node was lost" in again[0].warnings[0]
    assert log.begun()[again[0].job.seed] == 2


def test_a_killed_worker_is_replaced_and_one_that_always_dies_given_up(nodes, store, log, tmp_path):
    plan = jobs("kill once", "kill", "", log=str(log.path), marker=str(tmp_path / "marker"))
    records = run(plan, Ray(nodes.address), store)
    assert [records[seed].status for seed in range(3)] == ["done", "failed", "done"]
    assert len(records[0].warnings) == 1
    assert records[1].error.startswith("lost 3 times, with its worker or node. WorkerCrashedError")
    assert log.begun() == Counter({0: 2, 1: 3, 2: 1})


def test_a_job_that_reports_nothing_is_killed(nodes, store, log):
    start = time.monotonic()
    records = run(jobs("hang", "", budget={"seconds": 0.5}, log=str(log.path)), Ray(nodes.address), store)
    assert [records[seed].status for seed in range(2)] == ["over-budget", "done"]
    assert "killed after 3 times" in records[0].error
    assert 1.5 <= records[0].cost["seconds"] < 5
    assert time.monotonic() - start < 15


def test_leaving_early_leaves_no_task(nodes, store, log):
    import ray

    records = execute(jobs("", *["hang"] * 4, log=str(log.path)), work=WORK, executor=Ray(nodes.address), sink=store)
    next(records)
    log.wait_for("begin", 2)
    records.close()
    assert not ray.is_initialized()
    end = time.monotonic() + 5
    while log.alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert log.alive() == []
    assert _leases(store) == 0
    assert sum(log.begun().values()) == 2


def test_a_signal_ends_the_run(nodes, store, log):
    def stop():
        log.wait_for("begin", 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        run(jobs(*["hang"] * 3, log=str(log.path)), Ray(nodes.address), store)
    thread.join()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert _leases(store) == 0


def test_a_driver_that_is_killed_leaves_no_task(nodes, log, tmp_path):
    code = (
        "import sys; from nervure.run import Ray, execute, plan_claim; from nervure.store import Store\n"
        "store, log, address = sys.argv[1:]\n"
        "plan = plan_claim('a/b', seeds=2, params={'log': log, 'do': 'hang'})\n"
        f"list(execute(plan, work='{WORK}', executor=Ray(address), sink=Store.open(store)))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "store.db"), str(log.path), nodes.address]
    with subprocess.Popen(words, env=_with_jobs()) as driver:
        log.wait_for("begin", 2)
        driver.kill()
    end = time.monotonic() + 20
    while log.alive() and time.monotonic() < end:
        time.sleep(0.1)
    assert log.alive() == []


def test_an_existing_connection_is_used_and_left(nodes, store):
    import ray

    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        assert run(jobs(""), Ray(nodes.address), store)[0].status is Status.DONE
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_from_outside_the_cluster(nodes, store, log):
    events = []
    executor = Ray(f"ray://127.0.0.1:{nodes.client_port}")
    plan = jobs("", "raise", "kill", log=str(log.path), seconds=0.6)
    records = run(plan, executor, store, on_event=events.append)
    assert [records[seed].status for seed in range(3)] == ["done", "failed", "failed"]
    assert "lost 3 times" in records[2].error
    assert any(event.kind == "progress" for event in events)


def test_other_code_is_refused(nodes, store, log, monkeypatch):
    monkeypatch.setattr(ray_module, "code_version", lambda: "0.0.0+other")
    with pytest.raises(CouldNotRun, match=r"runs other code.*Expected 0\.0\.0\+other; found \d"):
        run(jobs("", log=str(log.path)), Ray(nodes.address), store)
    assert log.lines() == []
    assert _leases(store) == 0


@pytest.mark.parametrize("asked", [{"cpus": 2}, {"gpus": 1}, {"memory": 1e6}])
def test_a_job_that_no_node_holds_is_refused_at_once(nodes, store, asked):
    start = time.monotonic()
    with pytest.raises(CouldNotRun, match=r"no node of the cluster holds a job.*found nodes of 1 CPU, 0 GPU"):
        run(jobs(""), Ray(nodes.address, resources=Resources(**asked)), store)
    assert time.monotonic() - start < 5


def test_resources_say_how_many_jobs_run_at_once(nodes, store, log):
    executor = Ray(nodes.address, resources=Resources(cpus=0.5, memory=0.05))
    run(jobs(*["meet"] * 4, log=str(log.path), guests=4), executor, store)
    assert executor.slots == 4
    assert [line[0] for line in log.lines()] == ["begin"] * 4 + ["end"] * 4
    one = Ray(nodes.address, slots=1)
    log.path.unlink()
    run(jobs("", "", log=str(log.path), seconds=0.1), one, store)
    assert [line[0] for line in log.lines()] == ["begin", "end"] * 2


def test_a_job_whose_last_node_is_gone_is_not_waited_for_for_ever(nodes, store, monkeypatch):
    executor = Ray(nodes.address)
    monkeypatch.setattr(ray_module, "NODE_SECONDS", 0.5)
    monkeypatch.setattr(ray_module, "_LOOK_SECONDS", 0.1)
    records = execute(jobs("", "hang"), work=WORK, executor=executor, sink=store)
    next(records)
    executor._nodes = lambda: []
    with pytest.raises(CouldNotRun, match=r"has been there for 0\.5 s"):
        next(records)
    assert _leases(store) == 0


@pytest.mark.slow
def test_the_command(nodes, tmp_path):
    words = ["run", "pbt/toy", "--quick", "--seeds", "2", "--executor", nodes.address]
    words += ["--store", str(tmp_path / "store.db"), "--report", str(tmp_path), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nervure.cli", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["quick"]
    with Store.open(tmp_path / "store.db") as store:
        assert [record.status for record in store.records()] == ["done", "done"]


def test_what_is_no_cluster_is_told(store):
    for wrong in ("ray://", "ray://host", "http://host:1", "host:x", "ray://a@host:1", "ray://host:1/x"):
        with pytest.raises(UsageError, match="no cluster's address"):
            Ray(wrong)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    for scheme in ("", "ray://"):
        with pytest.raises(CouldNotRun, match="nothing answers"):
            run(jobs(""), Ray(f"{scheme}127.0.0.1:{closed}"), store)


def test_ray_may_be_missing(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"nervure\[ray\]"):
        run(jobs(""), Ray(), store)


def test_resources_are_checked():
    for wrong in ({"cpus": 0}, {"cpus": 1.5}, {"cpus": float("nan")}, {"gpus": -1}, {"gpus": 2.5}, {"memory": 0}):
        with pytest.raises(UsageError):
            Resources(**wrong)
    assert str(Resources(cpus=2, gpus=0.5, memory=3)) == "2 CPU, 0.5 GPU, 3 GiB"
    held = Resources(cpus=0.1, gpus=0.25, memory=2)
    assert held.fit({"CPU": 1.0, "GPU": 2.0, "memory": 100 * 2.0**30}) == 8
    assert held.fit({"CPU": 0.3, "GPU": 2.0, "memory": 100 * 2.0**30}) == 3
    assert held.fit({"CPU": 1.0, "GPU": 2.0, "memory": 3 * 2.0**30}) == 1
    assert held.fit({"CPU": 64.0}) == 0
    with pytest.raises(UsageError):
        Ray(slots=0)


def test_who_does_the_jobs():
    assert isinstance(choose("local", jobs=3, workers=2), Local)
    assert isinstance(choose("local", jobs=0, workers=None), Inline)
    assert isinstance(choose("inline", jobs=3, workers=None), Inline)
    assert isinstance(choose("ray", jobs=3, workers=None, resources=Resources(gpus=1)), Ray)
    assert isinstance(choose("ray://host:10001", jobs=3, workers=5), Ray)
    for name, options in {
        "slurm": {},
        "ray": {"workers": 0},
        "inline": {"workers": 2},
        "local": {"resources": Resources(gpus=1)},
    }.items():
        with pytest.raises(UsageError):
            choose(name, jobs=3, **{"workers": None, **options})


def test_the_code_version_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(on_node.nervure, "__file__", str(tmp_path / "__init__.py"))
    version = on_node.code_version.__wrapped__
    first = version()
    assert first.startswith(f"{on_node.nervure.__version__}+")
    assert version() == first
    (tmp_path / "a.py").write_text("x = 2")
    assert version() != first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, version()}) == 2


def test_a_node_ends_a_job_that_nobody_ends(tmp_path, monkeypatch):
    (job,) = plan_claim("a/b", seeds=1, params={"do": "hang"}, seconds=0.1)
    code = (
        "import json, sys; from nervure.run import node; node.GRACE_SECONDS = 0.2\n"
        f"node.serve_text(sys.argv[1], '{WORK}', node.code_version(), '.', [], lambda share, text: None)"
    )
    words = [sys.executable, "-c", code, json.dumps(job.to_json())]
    done = subprocess.run(words, env=_with_jobs(), check=False, timeout=20)
    assert done.returncode == -signal.SIGALRM


def _search(**options):
    return PBT({"rate": Range(0.1, 1.0)}, members=5, share=0.4, seed=3, **options)


def _own(search, member):
    return [at for at, one in enumerate(search.trained) if one["member"] == member]


def _here(intervals):
    search = _search()
    from jobs_for_tests import Walker

    walkers = [Walker(member) for member in range(5)]
    run_trainables(search, walkers, intervals=intervals)
    return search, [walker.state_dict() for walker in walkers]


def test_a_population_on_a_cluster_is_the_one_here(nodes):
    there, heard = _search(), []
    states = run_crowd(
        there, "jobs_for_tests:walker", intervals=4, address=nodes.address, told=lambda *one: heard.append(one)
    )
    here, expected = _here(4)
    assert there.trained == here.trained
    assert states == expected
    assert len(heard) == 20
    assert any(
        node["from"] is not None and there.trained[node["from"]]["member"] != node["member"] for node in there.trained
    )


def test_an_asynchronous_population_trains_every_interval_once(nodes):
    search = _search(asynchronous=True)
    states = run_crowd(search, "jobs_for_tests:walker", intervals=3, address=nodes.address)
    assert Counter(node["member"] for node in search.trained) == dict.fromkeys(range(5), 3)
    for member, state in enumerate(states):
        assert [step["rate"] for step in search.schedule(member)] == state["path"][1:]


def test_a_population_outlives_a_node(nodes):
    there, heard = _search(), []

    def told(*one):
        heard.append(one)
        if len(heard) == 7:
            nodes.lose()

    states = run_crowd(there, "jobs_for_tests:slow_walker", intervals=4, address=nodes.address, told=told)
    here, expected = _here(4)
    assert there.trained == here.trained
    assert states == expected


def test_a_member_that_fails_is_told_and_one_that_dies_again_and_again_is_given_up(nodes):
    broken = PBT({"rate": Range(-2.0, -1.0)}, members=2, seed=0)
    with pytest.raises(CouldNotRun, match="this member is broken"):
        run_crowd(broken, "jobs_for_tests:walker", intervals=1, address=nodes.address)
    with pytest.raises(CouldNotRun, match="was lost 3 times"):
        run_crowd(
            PBT({"rate": Range(1.0, 2.0)}, members=2), "jobs_for_tests:dying_walker", intervals=1, address=nodes.address
        )
    with pytest.raises(CouldNotRun):
        run_crowd(_search(), "jobs_for_tests:nothing", intervals=1, address=nodes.address)
    with pytest.raises(UsageError):
        run_crowd(_search(), "jobs_for_tests:walker", intervals=0, address=nodes.address)
