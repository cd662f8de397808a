"""What only a server shows: many writers, restarts, migrations there, a run of the command line."""

import math
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from nervure._kit import StoreError, UsageError
from nervure.cli.main import run
from nervure.spec import Job
from nervure.store import Store, schema
from nervure.store.place import bare, connect, exists, writing

SCRIPT = Path(__file__).parent / "writers_for_tests.py"
WRITERS, EACH, SHARED, one = map(runpy.run_path(str(SCRIPT)).get, ("WRITERS", "EACH", "SHARED", "one"))


def test_eight_processes_write_and_a_follower_sees_every_record_in_order(database):
    seen = []
    with Store.open(database) as store, subprocess.Popen([sys.executable, SCRIPT, database]) as writers:
        while writers.poll() is None:
            seen += store.headers(after=seen[-1][0] if seen else 0)
            time.sleep(0.005)
        seen += store.headers(after=seen[-1][0] if seen else 0)
        assert writers.returncode == 0
        expected = {one(writer, number).job.id for writer in range(WRITERS) for number in range(EACH)}
        expected |= {one(99, number).job.id for number in range(SHARED)}
        assert len(seen) == len(expected) == WRITERS * EACH + SHARED
        assert {record.job.id for _, record in seen} == expected
        assert [number for number, _ in seen] == [number for number, _ in store.headers()]
        assert all(record.measurements == one(0, 0).measurements for record in store.records(target="claim:writer/0"))
        with store._engine.connect() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(schema.leases)).scalar() == 0


def test_a_writer_that_stalls_does_not_make_a_follower_miss_its_record(database):
    with Store.open(database) as slow, Store.open(database) as quick:
        inside, go_on = threading.Event(), threading.Event()

        @sa.event.listens_for(slow._engine, "commit")
        def _stall(connection):
            inside.set()
            go_on.wait(10)

        stalled = threading.Thread(target=slow.add, args=(one(1, 1),))
        stalled.start()
        inside.wait(10)
        waiting = threading.Thread(target=quick.add, args=(one(2, 2),))
        waiting.start()
        time.sleep(0.3)
        seen = quick.headers()
        go_on.set()
        stalled.join()
        waiting.join()
        seen += quick.headers(after=max((number for number, _ in seen), default=0))
        assert [record.job.target for _, record in seen] == ["claim:writer/1", "claim:writer/2"]


@pytest.mark.parametrize("old", ["0001", "0002"])
def test_a_database_of_an_older_revision_is_upgraded_with_its_records(database, old, made):
    engine = bare(database)
    body = '{"job": %s, "cost": {}, "warnings": [], "error": null, "environment": {}, "started": ""}'
    job = '{"target": "claim:old/claim", "arm": "*", "case": "-", "seed": 3, "params": {}, "budget": {}}'
    number = Job(target="claim:old/claim", arm="*", case="-", seed=3).id
    with writing(engine) as connection:
        schema.upgrade(connection, old)
        row = {"job_id": number, "target": "claim:old/claim", "arm": "*", "case": "-", "seed": 3}
        connection.execute(schema.records.insert().values(**row, status="done", body=body % job))
        connection.execute(
            schema.measurements.insert().values(record_id=1, position=0, arm="a", metric="m", value=None, step=None)
        )
        assert schema.revision(connection) == old
    engine.dispose()
    with Store.open(database) as store:
        (record,) = store.records()
        assert record.job.id == number
        assert math.isnan(record.measurements[0].value)
        assert store.add(made(1))
        with store._engine.connect() as connection:
            assert schema.revision(connection) == schema.HEAD


def test_a_newer_database_is_refused(database):
    with Store.open(database) as store, writing(store._engine) as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"newer nervure.*9999"):
        Store.open(database)


def test_a_run_outlives_a_restart_of_the_server(database, made):
    with Store.open(database) as store:
        assert store.add(made(0))
        with psycopg.connect(database, autocommit=True) as raw:
            raw.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND datname = current_database()"
            )
        assert store.add(made(1))
        assert len(store.records()) == 2


def test_a_lease_that_is_being_given_back_does_not_hold_up_the_renewal_of_the_others(database):
    with Store.open(database) as store:
        store._silence = 0.2
        assert store.lease("a")
        assert store.lease("b")
        with psycopg.connect(database) as raw:
            raw.execute("SELECT 1 FROM nervure_leases WHERE job_id = 'a' FOR UPDATE")
            before = dict(raw.execute("SELECT job_id, renewed FROM nervure_leases").fetchall())
            time.sleep(0.5)
            after = dict(raw.execute("SELECT job_id, renewed FROM nervure_leases").fetchall())
        assert after["a"] == before["a"]
        assert after["b"] > before["b"]


def test_a_database_that_lacks_characters_is_refused(make_database):
    address = make_database("ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StoreError, match=r"UTF8; found LATIN1.*createdb --encoding UTF8"):
        Store.open(address)
    assert not exists(address)


def test_what_is_told_when_there_is_no_server_or_no_database(server, database, tmp_path):
    with pytest.raises(StoreError, match="the store cannot be used") as told:
        Store.open(f"postgresql://me:secret@/x?host={tmp_path}")
    assert "secret" not in str(told.value)
    with pytest.raises(StoreError, match='database "none" does not exist'):
        Store.open(f"postgresql://nervure@/none?host={server}")
    with pytest.raises(UsageError):
        Store.open("postgresql+asyncpg://host/x")
    with psycopg.connect(database, autocommit=True) as raw:
        raw.execute("CREATE ROLE guest LOGIN")
    Store.open(database).close()
    with pytest.raises(StoreError, match="by this user"):
        Store.open(database.replace("nervure@", "guest@"))


def test_the_short_names_of_the_scheme(database):
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        connect(f"{scheme}://{database.split('://')[1]}").dispose()


def test_a_rehearsal_of_a_claim_into_a_database(database, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NERVURE_STORE", database)
    monkeypatch.chdir(tmp_path)
    words = ["run", "masks-signs-lrr/single-neuron", "--quick", "--seeds", "1", "--workers", "0"]
    assert run(words) in (0, 1)
    with Store.open(database) as store:
        first = store.headers()
        assert [str(record.status) for _, record in first] == ["done"]
    assert run(words) in (0, 1)
    with Store.open() as store:
        assert store.headers() == first
    assert not os.path.exists("postgresql:")
    assert run(["store", "check"]) == 0
    assert "1 records could be read" in capsys.readouterr().out
