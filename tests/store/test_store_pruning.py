import datetime
import math

import pytest
import sqlalchemy as sa

from nervure._kit import UsageError
from nervure.spec import Measurement, Status
from nervure.store import Store, check, prune, schema
from nervure.store.place import bare, connect, writing


def ago(days):
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)).isoformat()


@pytest.fixture
def filled(where, made):
    curve = tuple(Measurement(arm="a", metric="loss", value=1.0, step=float(step)) for step in range(50))
    final = (Measurement(arm="a", metric="accuracy", value=0.5),)
    with Store.open(where) as store:
        store.add(made(0, Status.FAILED, started=ago(40)))
        store.add(made(0, Status.DIVERGED, started=ago(39)))
        store.add(made(0, started=ago(38), measurements=curve + final))
        store.add(made(1, Status.FAILED, started=ago(40)))
        store.add(made(2, params={"quick": True}, started=ago(10), measurements=curve))
        store.add(made(3, params={"quick": False}, started=ago(2), measurements=final + curve))
        store.add(made(4, params={"quick": True}, started=ago(0), measurements=final))
        store.add(made(5, started="", measurements=curve))
        store.add(made(6, started=ago(50)[:19], measurements=curve))
    engine = connect(where)
    yield engine
    engine.dispose()


def seeds(engine):
    with engine.connect() as connection:
        return list(connection.execute(sa.select(schema.records.c.seed).order_by(schema.records.c.id)).scalars())


def points(engine):
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(schema.measurements)).scalar()


def counts(pruned):
    return {part.kind: part.rows for part in pruned.parts}


def test_nothing_goes_unasked_and_a_dry_run_tells_what_would(filled):
    before = seeds(filled), points(filled)
    assert prune(filled).parts == ()
    would = prune(filled, failed=True, rehearsals=True, curves_older_than=30, leases=True, dry_run=True)
    # Seeds 0 and 6 have old curves of fifty points; the failed attempt at seed 1 measured two points.
    assert counts(would) == {"failed": 2, "rehearsals": 2, "curves": 50 + 50 + 2, "leases": 0}
    assert all(part.size > 0 for part in would.parts[:3])
    assert would.freed is None
    assert (seeds(filled), points(filled)) == before


def test_failed_attempts_go_where_the_job_is_done(filled):
    assert counts(prune(filled, failed=True)) == {"failed": 2}
    assert seeds(filled) == [0, 1, 2, 3, 4, 5, 6]
    assert counts(prune(filled, failed=True)) == {"failed": 0}


def test_rehearsals_go(filled):
    assert counts(prune(filled, rehearsals=True)) == {"rehearsals": 2}
    assert seeds(filled) == [0, 0, 0, 1, 3, 5, 6]


def test_rehearsals_of_today_stay_while_a_job_is_in_flight(filled):
    with Store(filled) as other:
        assert other.lease("somebody's")
        assert counts(prune(filled, rehearsals=True)) == {"rehearsals": 1}
        assert 4 in seeds(filled)


def test_old_curves_go_and_final_values_stay(filled):
    finals = sa.select(sa.func.count()).where(schema.measurements.c.step.is_(None))
    with filled.connect() as connection:
        before = connection.execute(finals).scalar()
    assert counts(prune(filled, curves_older_than=39.5)) == {"curves": 50 + 2 + 2}
    assert counts(prune(filled, curves_older_than=1)) == {"curves": 2 + 50 + 50 + 50}
    with filled.connect() as connection:
        assert connection.execute(finals).scalar() == before
    # That of the record which does not say when it began is of no age.
    assert points(filled) == before + 50
    with Store(filled) as store:
        assert [len(one.measurements) for one in store.records()] == [1, 2, 0, 1, 1, 50, 0]


def test_only_dead_leases_go(filled):
    dead = {"job_id": "a", "owner": "b", "machine": "elsewhere", "pid": 1, "born": "1", "renewed": 1.0}
    with Store(filled) as other:
        assert other.lease("living")
        with writing(filled) as connection:
            connection.execute(schema.leases.insert().values(dead))
        assert counts(prune(filled, leases=True)) == {"leases": 1}
        with filled.connect() as connection:
            assert list(connection.execute(sa.select(schema.leases.c.job_id)).scalars()) == ["living"]


def test_the_file_becomes_smaller_and_nothing_is_wrong_with_it(tmp_path, made):
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        for seed in range(40):
            store.add(made(seed, Status.FAILED, error="x" * 20_000))
            store.add(made(seed))
    engine = connect(path)
    before = sum(file.stat().st_size for file in tmp_path.iterdir() if not file.name.endswith("shm"))
    told = prune(engine, failed=True, dry_run=True).parts[0].size
    done = prune(engine, failed=True)
    engine.dispose()
    after = path.stat().st_size
    assert done.freed >= before - after > 0
    assert before - after == pytest.approx(told, rel=0.25)
    engine = bare(path)
    assert check(engine).findings == ()
    engine.dispose()


def test_ages_that_are_none(filled):
    for days in (-1, math.nan, math.inf):
        with pytest.raises(UsageError, match="number of days"):
            prune(filled, curves_older_than=days)
