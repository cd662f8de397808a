import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from nervure._kit import UsageError
from nervure.spec import Status
from nervure.store import Store, check, schema
from nervure.store.place import bare, writing

ASSETS = Path(__file__).parent / "assets"


def look(where):
    engine = bare(where)
    try:
        return check(engine)
    finally:
        engine.dispose()


def change(where, *statements):
    engine = bare(where)
    with writing(engine) as connection:
        for statement in statements:
            connection.execute(sa.text(statement) if isinstance(statement, str) else statement)
    engine.dispose()


@pytest.fixture
def filled(where, made):
    with Store.open(where) as store:
        for seed in range(250):
            store.add(made(seed, Status.FAILED if seed % 3 else Status.DONE))
    return where


def test_nothing_is_wrong(filled):
    found = look(filled)
    assert found.findings == ()
    assert (found.fine, found.revision) == (250, schema.HEAD)


def test_unreadable_records_are_named_and_the_rest_is_fine(filled):
    records = schema.records
    change(
        filled,
        records.update().where(records.c.id == 3).values(body="{"),
        records.update().where(records.c.id == 4).values(body=json.dumps({"job": {}})),
        records.update().where(records.c.id == 5).values(job_id="0" * 20),
        records.update().where(records.c.id == 6).values(status="odd"),
        records.update().where(records.c.id == 250).values(seed=7),
    )
    found = look(filled)
    assert found.fine == 245
    names = [one.what.split(" ", 2)[:2] for one in found.findings]
    assert names == [["record", number] for number in ("3", "4", "5", "6", "250")]
    assert "says it is of job 00000000000000000000" in found.findings[2].what


def test_done_twice_lost_measurements_and_leases_nobody_holds(filled):
    values = "SELECT {} FROM nervure_records WHERE id = 1"
    columns = 'job_id, target, arm, "case", seed, status, body'
    link = "ALTER TABLE nervure_measurements DROP CONSTRAINT nervure_measurements_record_id_fkey"
    change(
        filled,
        "DROP INDEX nervure_done_once",
        f"INSERT INTO nervure_records ({columns}) {values.format(columns)}",
        "PRAGMA defer_foreign_keys = 0" if filled.endswith(".db") else link,
        "INSERT INTO nervure_measurements VALUES (9999, 0, 'a', 'm', 1.0, NULL)",
        "INSERT INTO nervure_leases VALUES ('a', 'b', 'elsewhere', 1, '1', 1.0)",
    )
    found = look(filled)
    assert found.fine == 251
    index, lost, twice, lease = (one.what for one in found.findings)
    assert "an index is missing" in index
    assert lost == "1 measurements belong to no record"
    assert twice.endswith("is done 2 times")
    assert "ended without giving it back" in lease


def test_an_older_store_is_told_and_not_upgraded(tmp_path):
    for old, count in (("0001", 3), ("0002", 5)):
        mine = tmp_path / f"{old}.db"
        shutil.copy(ASSETS / f"{old}.db", mine)
        before = mine.read_bytes()
        found = look(mine)
        assert (found.revision, found.fine) == (old, count)
        assert "older nervure" in found.findings[0].what
        assert len(found.findings) == 1 + (old == "0002")
        assert mine.read_bytes() == before


def test_a_newer_store_is_told(where):
    Store.open(where).close()
    change(where, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    (finding,) = look(where).findings
    assert "newer nervure" in finding.what


def test_a_missing_table_and_a_missing_column(where):
    Store.open(where).close()
    change(where, "DROP TABLE nervure_feeds", "ALTER TABLE nervure_papers DROP COLUMN summary")
    assert [one.what for one in look(where).findings] == [
        "the table nervure_papers has no column summary",
        "the table nervure_feeds is missing",
    ]


def test_damaged_pages(tmp_path, made):
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        for seed in range(300):
            store.add(made(seed, error="x" * 2000))
    pages = path.stat().st_size // 4096
    with path.open("r+b") as file:
        for page in range(pages // 2, pages // 2 + 3):
            file.seek(4096 * page)
            file.write(os.urandom(4096))
    found = look(path)
    assert found.findings
    assert 200 < found.fine < 300
    named = [one.what for one in found.findings if one.what.startswith("record ")]
    assert named
    assert any("damaged" in one.what for one in found.findings)


def test_text_that_is_no_text(tmp_path, made):
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        for seed in range(10):
            store.add(made(seed))
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE nervure_records SET body = CAST(x'ff80ff' AS TEXT) WHERE id = 4")
    raw.close()
    found = look(path)
    assert found.fine == 9
    assert [one.what[:24] for one in found.findings] == ["record 4 cannot be read:"]


def test_no_database_and_somebody_elses(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("Dear diary. " * 1000)
    assert "not a nervure store" in look(notes).findings[0].what
    with sqlite3.connect(tmp_path / "photos.db") as raw:
        raw.execute("CREATE TABLE photos (name)")
    raw.close()
    with pytest.raises(UsageError, match="there is no nervure store"):
        look(tmp_path / "photos.db")


def test_numbers_of_a_server_that_are_taken(database, made):
    with Store.open(database) as store:
        store.add(made(0))
    change(
        database, "UPDATE nervure_measurements SET record_id = 1", "SELECT setval('nervure_records_id_seq', 1, false)"
    )
    assert "numbers that are taken" in look(database).findings[0].what


def test_a_server_that_is_not_there(tmp_path):
    found = look(f"postgresql://me:secret@/x?host={tmp_path}")
    assert found.findings
    assert found.revision is None
    assert not any("secret" in one.what for one in found.findings)
