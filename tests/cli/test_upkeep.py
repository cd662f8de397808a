import json
import os
import sqlite3

import pytest

from nervure.cli.main import run
from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store


def record(seed, status=Status.DONE, **params):
    job = Job(target="claim:a/b", arm="*", case="-", seed=seed, params=params)
    points = tuple(Measurement(arm="a", metric="loss", value=1.0, step=float(step)) for step in range(3))
    return Record(job=job, status=status, measurements=points, started="2026-01-01T00:00:00+00:00")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NERVURE_STORE", str(tmp_path / "store.db"))
    monkeypatch.chdir(tmp_path)
    with Store.open() as store:
        store.add(record(0, Status.FAILED))
        store.add(record(0))
        store.add(record(1, quick=True))
    return tmp_path


def test_copy(here, capsys):
    assert run(["store", "copy", "store.db", "sqlite:///copy.db"]) == 0
    assert "records: 3 copied, 0 there already\nread back and equal, sha256 " in capsys.readouterr().out
    assert run(["store", "copy", "store.db", "copy.db", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["added"]["nervure_records"], told["there"]["nervure_records"]) == (0, 3)
    with Store.open("copy.db") as copied, Store.open() as store:
        assert copied.records(history=True) == store.records(history=True)


def test_check(here, capsys):
    assert run(["store", "check"]) == 0
    assert "Nothing is wrong with it: 3 records could be read, schema 0" in capsys.readouterr().out
    raw = sqlite3.connect("store.db")
    raw.execute("UPDATE nervure_records SET body = '{' WHERE id = 2")
    raw.commit()
    raw.close()
    assert run(["store", "check", "store.db"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("record 2 cannot be understood")
    assert "The rest is fine: 2 records" in out
    assert run(["store", "check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["what"].startswith("record 2")


def test_prune(here, capsys):
    for words in (["store", "prune"], ["store", "prune", "store.db", "--failed", "--rehearsals", "--dry-run"]):
        assert run(words) == 0
        out = capsys.readouterr().out
        assert "1 failed attempts" in out
        assert "1 records of rehearsals" in out
        assert "Nothing was removed" in out
        with Store.open() as store:
            assert len(store.records(history=True)) == 3
    assert run(["store", "prune", "--failed", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["removed"] is True
    assert told["parts"][0]["rows"] == 1
    assert run(["store", "prune", "--rehearsals", "--curves-older-than", "0"]) == 0
    assert "The file is" in capsys.readouterr().out
    with Store.open() as store:
        assert store.records(history=True) == [record(0).replace(measurements=())]


@pytest.mark.parametrize(
    "words",
    [
        "store check none.db",
        "store prune deep/none.db --failed",
        "store copy none.db other.db",
        "store copy store.db",
        "store copy store.db store.db",
        "store prune --curves-older-than -1",
        "store check mysql://host/db",
    ],
)
def test_wrong_usage_is_2_and_makes_nothing(here, words, capsys):
    before = sorted(os.listdir())
    assert run(words.split()) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(os.listdir()) == before
