import math
import shutil
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from nervure._kit import StoreError, UsageError
from nervure.spec import Measurement, Paper, Status
from nervure.store import Store, copy, schema
from nervure.store.copying import _others, _set_sequence
from nervure.store.place import connect, writing

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture
def source(tmp_path, made):
    """Fill a file with what is hard to copy: more than a page, failures, curves, NaN, papers, a lease."""
    where = str(tmp_path / "source.db")
    with Store.open(where) as store:
        store.add(made(0, Status.FAILED))
        store.add(made(0, Status.FAILED))
        store.add(made(0))
        for seed in range(1, 130):
            store.add(made(seed, measurements=(Measurement(arm="a", metric="m", value=-0.0, step=float(seed)),)))
        store.add(made(2**63 - 1, Status.DIVERGED, measurements=()))
        store.add(made(300, measurements=(Measurement(arm="a", metric="m", value=math.nan),)))
        paper = Paper(id="arxiv:1", source="https://example.org", title="Ümläut", link="https://example.org/a")
        store.papers.add([paper])
        store.papers.mailed("a@example.org", ["arxiv:1"])
        store.papers.subscribe("pruning")
        store.lease("a-lease")
        engine = connect(where)
        yield engine
        engine.dispose()


def contents(engine):
    with Store(engine) as store:
        every = store.records(history=True)
        found = [one.to_json() for one in every], store.papers.ranked(), store.papers.subscriptions()
    with engine.connect() as connection:
        mailed = connection.execute(schema.mailings.select()).all()
        leases = connection.execute(sa.select(sa.func.count()).select_from(schema.leases)).scalar()
    return *found, [tuple(row) for row in mailed], leases


def test_everything_is_copied_in_order_once_and_back(source, where, tmp_path, made):
    shares = []
    target = connect(where)
    first = copy(source, target, progress=lambda share, text: shares.append(share))
    assert first.added["nervure_records"] == 134
    assert first.added["nervure_mailings"] == first.added["nervure_papers"] == 1
    assert not any(first.there.values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    *expected, leases = contents(source)
    assert leases == 1
    assert contents(target) == (*expected, 0)
    again = copy(source, target)
    assert not any(again.added.values())
    assert again.there == first.added
    assert again.checksum == first.checksum
    # New records get numbers of their own.
    with Store(target) as store:
        assert store.add(made(1000))
        assert store.headers()[-1][0] == max(number for number, _ in store.headers())
    back = connect(tmp_path / "back.db")
    assert copy(target, back).added["nervure_records"] == 135
    assert contents(back)[0] == contents(target)[0]
    assert copy(back, target).added["nervure_records"] == 0
    back.dispose()
    target.dispose()


def test_a_copy_that_was_interrupted_goes_on(source, where):
    target = connect(where)

    class Stop(Exception):
        pass

    def stop(share, text):
        if text.startswith("copying"):
            raise Stop

    with pytest.raises(Stop):
        copy(source, target, progress=stop)
    with Store(target) as store:
        half = len(store.headers())
    assert 0 < half < 134
    came = copy(source, target)
    assert came.added["nervure_records"] == 134 - half
    assert came.there["nervure_records"] == half
    assert contents(target)[0] == contents(source)[0]
    target.dispose()


def test_a_job_done_in_both_is_not_doubled_and_the_target_keeps_its_own(source, where, made):
    target = connect(where)
    with Store(target) as store:
        own = made(0, cost={"seconds": 9.0})
        store.add(own)
        store.add(made(5000))
    target = connect(where)
    came = copy(source, target)
    assert came.added["nervure_records"] == 133
    assert came.there["nervure_records"] == 1
    assert copy(source, target).checksum == came.checksum
    with Store(target) as store:
        assert store.records(job_ids=[own.job.id]) == [own]
        assert [str(one.status) for one in store.records(history=True)][:4] == ["done", "done", "failed", "failed"]
    target.dispose()


def test_an_older_store_is_copied(tmp_path, where):
    shutil.copy(ASSETS / "0002.db", tmp_path / "old.db")
    old, target = connect(tmp_path / "old.db"), connect(where)
    assert copy(old, target).added["nervure_records"] == 5
    assert contents(target)[0] == contents(old)[0]
    old.dispose()
    target.dispose()


def test_a_copy_that_lost_something_is_told(source, where):
    target = connect(where)
    copied = copy(source, target)

    def lose(share, text):
        if text == "checking":
            with writing(target) as connection:
                connection.execute(
                    schema.measurements.update().where(schema.measurements.c.record_id > 110).values(value=7.0)
                )

    with pytest.raises(StoreError, match=r"not what the source is.*missing or different"):
        copy(source, target, progress=lose)
    assert len(copied.checksum) == 64
    target.dispose()


def test_a_store_onto_itself_and_a_zero_byte_that_the_server_does_not_take(source, database):
    with pytest.raises(UsageError, match="onto itself"):
        copy(source, source)
    with writing(source) as connection:
        connection.execute(schema.measurements.update().where(schema.measurements.c.record_id == 4).values(arm="a\0"))
    target = connect(database)
    with pytest.raises(StoreError, match=r"record 4 cannot be copied: its arm has a zero byte"):
        copy(source, target)
    target.dispose()


def test_a_measurement_without_a_record_is_left_behind(source, where):
    raw = sqlite3.connect(source.url.database)
    raw.execute("INSERT INTO nervure_measurements VALUES (150000, 0, 'a', 'm', 1.0, NULL)")
    raw.commit()
    raw.close()
    target = connect(where)
    assert copy(source, target).added["nervure_records"] == 134
    target.dispose()


def test_counted_tables_go_on_after_what_was_copied(database):
    engine, metadata = connect(database), sa.MetaData()
    counted = sa.Table("counted", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("x", sa.Text))
    metadata.create_all(engine)
    with writing(engine) as connection:
        connection.execute(counted.insert().values(id=41, x="copied"))
        _set_sequence(connection, counted)
        assert connection.execute(counted.insert().values(x="new").returning(counted.c.id)).scalar() == 42
    engine.dispose()


def test_no_other_table_speaks_of_records_by_their_number():
    # Their numbers change on the way; a new table that has them needs code of its own.
    named = {link.column.table.name for table in _others() for link in table.foreign_keys}
    assert schema.records.name not in named
