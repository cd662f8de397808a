import errno
import json
import math
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from nervure import store as package
from nervure._kit import StoreError, UsageError
from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store, default_path, leases, schema

OLD = Path(__file__).parent / "assets" / "0001.db"


def job(seed=0, **params):
    return Job(target="claim:a/b", arm="*", case="lenet", seed=seed, params=params)


def record(seed=0, status=Status.DONE, **changes):
    full = Record(
        job=job(seed, lr=0.1, layers=[1, 2]),
        status=status,
        measurements=(
            Measurement(arm="ours", metric="accuracy", value=0.1 + 0.2),
            Measurement(arm="ours", metric="loss", value=math.inf),
            Measurement(arm="ours", metric="loss", value=-math.inf, step=0.5),
            Measurement(arm="überarm", metric="loss", value=5e-324, step=1e300),
        ),
        cost={"seconds": 1.25, "rss": math.inf},
        warnings=("careful \ud800 \x00", "two"),
        error=None if status is Status.DONE else "RuntimeError: no\n\x00",
        environment={"torch": "2.13"},
        started="2026-01-01T00:00:00+00:00",
    )
    return full.replace(**changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "store.db"


def test_records_come_back_as_they_were(store, where):
    written = [record(0), record(2**63 - 1, Status.DIVERGED), record(1, measurements=())]
    assert [store.add(one) for one in written] == [True, True, True]
    assert store.records() == written
    with Store.open(where) as again:
        assert again.records(target="claim:a/b") == written
        assert again.records(target="other") == []
        assert again.records(job_ids=[written[1].job.id, "unknown"]) == [written[1]]
        assert again.records(job_ids=[]) == []


def test_nan_comes_back_as_nan(store):
    store.add(record(measurements=(Measurement(arm="a", metric="m", value=math.nan),)))
    assert math.isnan(store.records()[0].measurements[0].value)


def test_many_ids_and_many_points(store):
    points = tuple(Measurement(arm="a", metric="m", value=float(i), step=float(i)) for i in range(1500))
    store.add(record(0, measurements=points))
    ids = [job(seed, lr=0.1, layers=[1, 2]).id for seed in range(2000)]
    assert store.done(ids) == {ids[0]}
    assert store.records(job_ids=ids)[0].measurements == points


def test_a_done_job_is_never_stored_twice_and_a_failed_one_may_be_retried(store):
    failed = record(0, Status.FAILED)
    assert store.add(failed)
    assert store.add(failed.replace(error="again"))
    assert store.done([failed.job.id]) == set()
    assert [one.error for one in store.records()] == ["again"]
    assert store.add(record(0))
    assert not store.add(record(0, cost={}))
    assert store.add(failed)
    assert store.records() == [record(0)]
    assert [one.status for one in store.records(history=True)] == ["failed", "failed", "done", "failed"]
    assert store.done([failed.job.id]) == {failed.job.id}


def test_leases(where):
    with Store.open(where) as one, Store.open(where) as two:
        assert one.lease("a")
        assert one.lease("a")
        assert not two.lease("a")
        two.release(["a"])
        assert not two.lease("a")
        one.release(["a"])
        assert two.lease("a")
        two.close()
        assert one.lease("a")
        two.close()


def test_no_lease_on_a_job_that_is_done_and_adding_gives_it_back(where):
    with Store.open(where) as one, Store.open(where) as two:
        assert one.lease(record(0).job.id)
        one.add(record(0, Status.FAILED))
        assert two.lease(record(0).job.id)
        two.add(record(0))
        assert not one.lease(record(0).job.id)
        assert not two.lease(record(0).job.id)


def test_a_silent_lease_is_taken_over_and_a_renewed_one_is_not(where):
    with Store.open(where) as one, Store.open(where) as two:
        one._silence = two._silence = 0.4
        assert one.lease("a")
        waits = [threading.Event().wait(0.3) or two.lease("a") for _ in range(4)]
        assert waits == [False] * 4
        one._stop.set()
        one._beat.join()
        threading.Event().wait(0.5)
        assert two.lease("a")


LEASE_AND_WAIT = """
import sys, time
from nervure.store import Store
store = Store.open(sys.argv[1])
print(store.lease("a"), flush=True)
time.sleep(60)
"""


def test_the_lease_of_a_killed_process_is_free_at_once(where):
    holder = subprocess.Popen([sys.executable, "-c", LEASE_AND_WAIT, str(where)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "True\n"
        with Store.open(where) as store:
            assert not store.lease("a")
            holder.kill()
            holder.wait()
            assert store.lease("a")


def test_a_number_given_to_a_new_process_does_not_keep_a_lease(where):
    with Store.open(where) as one, Store.open(where) as two:
        one.lease("a")
        with one._engine.begin() as connection:
            connection.execute(schema.leases.update().values(born="1"))
        assert two.lease("a")


def test_a_lease_of_another_machine_lives_until_it_is_silent(where):
    with Store.open(where) as one, Store.open(where) as two:
        one.lease("a")
        with one._engine.begin() as connection:
            connection.execute(schema.leases.update().values(machine="other", pid=2**22 + 1))
        assert not two.lease("a")


def test_a_store_nobody_closed_stops_its_thread(where):
    store = Store.open(where)
    store.lease("a")
    beat, engine = store._beat, store._engine
    del store
    beat.join(5)
    assert not beat.is_alive()
    engine.dispose()


def hammer(path, barrier, queue):
    barrier.wait()
    with Store.open(path) as store:
        won = sum(store.add(record(seed)) for seed in range(40))
        won_leases = sum(store.lease(f"lease-{seed}") for seed in range(40))
        barrier.wait()
    queue.put((won, won_leases))


def test_four_processes_create_one_store_together_and_nothing_is_lost_or_doubled(where):
    spawn = multiprocessing.get_context("spawn")
    barrier, queue = spawn.Barrier(4), spawn.Queue()
    workers = [spawn.Process(target=hammer, args=(where, barrier, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    won = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    queue.close()
    queue.join_thread()
    assert [sum(column) for column in zip(*won, strict=True)] == [40, 40]
    with Store.open(where) as store:
        assert sorted(one.job.seed for one in store.records(history=True)) == list(range(40))
        assert store.records()[0] == record(store.records()[0].job.seed)


def test_a_store_of_the_first_revision_is_upgraded_with_its_records(tmp_path):
    mine = tmp_path / "old.db"
    shutil.copy(OLD, mine)
    with sqlite3.connect(mine) as raw:
        assert raw.execute("SELECT version_num FROM nervure_version").fetchone() == ("0001",)
        assert not raw.execute("SELECT name FROM sqlite_master WHERE name = 'nervure_leases'").fetchone()
    raw.close()
    with Store.open(mine) as store:
        old = store.records()
        assert [one.status for one in old] == ["failed", "done", "done"]
        assert [one.job.seed for one in old] == [0, 1, 2]
        assert old[1].measurements == (Measurement(arm="ours", metric="accuracy", value=1.5),)
        assert math.isnan(old[2].measurements[0].value)
        assert store.done(one.job.id for one in old) == {old[1].job.id, old[2].job.id}
        assert store.lease("a")
        assert store.add(record(0))
    with Store.open(mine) as store:
        assert len(store.records()) == 4


@pytest.mark.parametrize("again", [False, True])
def test_a_store_of_the_second_revision_is_upgraded_with_its_records(tmp_path, again):
    mine = tmp_path / "old.db"
    shutil.copy(OLD.with_name("0002.db"), mine)
    written = json.loads(OLD.with_name("0002.json").read_text())
    with sqlite3.connect(mine) as raw:
        assert raw.execute("SELECT version_num FROM nervure_version").fetchone() == ("0002",)
    raw.close()
    if again:
        Store.open(mine).close()
    with Store.open(mine) as store:
        assert [one.to_json() for one in store.records(history=True)] == written
        assert [one["status"] for one in written] == ["failed", "done", "diverged", "done", "over-budget"]
        assert len(written[0]["measurements"]) == 24
        # The process that had it is long silent.
        assert store.lease("0123456789abcdef0123")
        assert store.papers.ranked() == []
        assert store.add(record(0))
        with store._engine.connect() as connection:
            assert schema.revision(connection) == schema.HEAD


def test_the_tables_of_the_code_are_those_of_the_migrations(store):
    scripts = ScriptDirectory(str(Path(package.__file__).parent / "migrations"))
    assert scripts.get_current_head() == schema.HEAD
    inspector, dialect = sa.inspect(store._engine), store._engine.dialect
    assert set(inspector.get_table_names()) == {*schema.metadata.tables, schema.VERSION_TABLE}
    for table in schema.metadata.tables.values():
        there = {column["name"]: column for column in inspector.get_columns(table.name)}
        assert list(there) == [column.name for column in table.columns]
        for column in table.columns:
            assert there[column.name]["type"].compile(dialect) == column.type.compile(dialect)
            assert there[column.name]["nullable"] == column.nullable
        keys = inspector.get_pk_constraint(table.name)["constrained_columns"]
        assert keys == [column.name for column in table.primary_key]
        links = {
            (*link["constrained_columns"], link["referred_table"]) for link in inspector.get_foreign_keys(table.name)
        }
        assert links == {(link.parent.name, link.column.table.name) for link in table.foreign_keys}


def test_a_newer_store_is_refused_and_not_touched(path):
    Store.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE nervure_version SET version_num = '9999'")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer nervure.*schema 9999.*upgrade nervure"):
        Store.open(path)
    assert path.read_bytes() == before


def test_a_database_of_someone_else_is_refused_and_not_touched(tmp_path):
    path = tmp_path / "photos.db"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE photos (name)")
    raw.close()
    with pytest.raises(StoreError, match=r"not a nervure store.*photos"):
        Store.open(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("photos",)]
    raw.close()


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary. " * 1000)
    with pytest.raises(StoreError, match="not a nervure store"):
        Store.open(path)
    assert path.read_text().startswith("Dear diary.")


def test_a_damaged_store(path):
    with Store.open(path) as store:
        for seed in range(200):
            store.add(record(seed))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises(StoreError, match=r"damaged.*\.recover"), Store.open(path) as store:
        store.records()


def test_a_record_that_is_damaged_is_named(store):
    store.add(record(0))
    with store._engine.begin() as connection:
        connection.execute(schema.records.update().values(body=json.dumps({"job": {}})))
    with pytest.raises(StoreError, match=r"record 1 of the store cannot be read"):
        store.records()


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        Store.open(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=os.strerror(errno.ENOTDIR)):
        Store.open(tmp_path / "file" / "deeper" / "store.db")


def test_a_full_disk_loses_nothing_that_is_stored(path):
    with Store.open(path) as store:
        store.add(record(0))
        pages = path.stat().st_size // 4096 + 16
        sa.event.listen(store._engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count = {pages}"))
        store._engine.dispose()
        huge = record(1, error="x" * 1_000_000)
        with pytest.raises(StoreError, match=r"the disk is full.*free some space"):
            store.add(huge)
        assert store.records() == [record(0)]
        assert store.add(record(2))
    with Store.open(path) as store:
        assert store.add(huge)
        assert [one.job.seed for one in store.records()] == [0, 2, 1]


def test_a_store_that_may_only_be_read(path):
    with Store.open(path) as store:
        store.add(record(0))
    with Store.open(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
        assert store.records() == [record(0)]
        with pytest.raises(StoreError, match="may not be written"):
            store.add(record(1))
        with pytest.raises(StoreError, match="may not be written"):
            store.lease("a")


def test_a_store_another_program_keeps_locked(path, monkeypatch):
    monkeypatch.setattr("nervure.store.place.BUSY_SECONDS", 0.1)
    with Store.open(path) as store:
        raw = sqlite3.connect(path, isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="keeps the store locked"):
            store.add(record(0))
        assert store.records() == []
        raw.close()
        assert store.add(record(0))


def test_addresses(monkeypatch, tmp_path):
    for address in ("sqlite://", "sqlite:///:memory:", "mysql://host/db", "no-driver://x"):
        with pytest.raises(UsageError):
            Store.open(address)
    monkeypatch.setenv("NERVURE_STORE", str(tmp_path / "named.db"))
    Store.open().close()
    assert (tmp_path / "named.db").exists()
    monkeypatch.delenv("NERVURE_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform == "linux":
        assert default_path() == tmp_path / "data" / "nervure" / "store.db"


@pytest.mark.parametrize(
    "address", ["postgresql+psycopg://me:secret@host:5433/runs?sslmode=require", "sqlite:////a/b.db"]
)
def test_an_address_in_the_environment_stays_as_it_is(address, monkeypatch):
    monkeypatch.setenv("NERVURE_STORE", address)
    assert str(default_path()) == address


def test_a_name_that_not_every_database_takes_is_refused(store):
    for name in ("a\0", "a\ud800"):
        with pytest.raises(StoreError, match="databases do not take"):
            store.add(record(measurements=(Measurement(arm="ours", metric=name, value=1.0),)))
    assert store.records() == []


def test_this_process_is_alive_and_a_dead_one_is_not():
    assert leases.born(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert leases.born(child.pid) is None
