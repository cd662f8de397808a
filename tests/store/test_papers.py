import dataclasses
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from nervure._kit import StoreError
from nervure.spec import Job, Paper, Record, Status
from nervure.store import FeedState, Store, Subscription, schema
from nervure.store.papers import stamp
from nervure.store.place import _on_begin, _on_connect, writing

OLD = Path(__file__).parent / "assets" / "0001.db"


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store.db") as opened:
        yield opened


def paper(number=0, **more):
    base = {"id": f"arxiv:{number}", "source": "https://example.org/feed", "title": f"Ünï {number}"}
    full = {
        **base,
        "link": f"https://example.org/{number}",
        "summary": "神経 \u200c",
        "published": "2026-01-01T00:00:00Z",
    }
    return Paper(**{**full, "votes": 3, "family": "compress", "score": 0.1 + 0.2, **more})


def undated(papers):
    return [dataclasses.replace(one, first_seen="") for one in papers]


def test_papers_come_back_as_they_were(store):
    written = [paper(0), paper(1, votes=None, score=0.0, family="", summary="", published="")]
    assert store.papers.add(written) == ["arxiv:0", "arxiv:1"]
    found = store.papers.ranked()
    assert undated(found) == written
    assert all(stamp(60) <= one.first_seen <= stamp() for one in found)
    assert store.papers.get(["arxiv:1", "no"]) == {"arxiv:1": found[1]}
    assert store.papers.add([]) == []


def test_what_was_told_first_stays_and_votes_and_score_change(store):
    store.papers.add([paper()])
    changed = paper(
        title="other", link="https://evil.example", summary="other", source="other", votes=9, score=0.9, family="adapt"
    )
    assert store.papers.add([changed, paper(1)]) == ["arxiv:1"]
    now = store.papers.get(["arxiv:0"])["arxiv:0"]
    assert undated([now]) == [paper(votes=9, score=0.9, family="adapt")]
    store.papers.add([paper(votes=None)])
    assert store.papers.get(["arxiv:0"])["arxiv:0"].votes == 9


def test_ranking_and_choosing(store):
    store.papers.add([paper(n, score=n % 5 / 10, family=("compress", "adapt")[n % 2]) for n in range(1200)])
    found = store.papers.ranked()
    assert len(found) == 1200
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert len(store.papers.ranked(limit=7)) == 7
    assert {one.family for one in store.papers.ranked(family="adapt")} == {"adapt"}
    assert [one.id for one in store.papers.ranked(limit=2, keep=lambda one: one.id.endswith("99"))] == [
        "arxiv:1099",
        "arxiv:1199",
    ]
    assert store.papers.ranked(since="9999") == []
    assert len(store.papers.ranked(since=stamp(60))) == 1200
    assert len(store.papers.get(f"arxiv:{n}" for n in range(2000))) == 1200


def test_what_was_mailed_is_remembered_by_address(store):
    store.papers.add([paper(0), paper(1)])
    store.papers.mailed("ada@example.org", ["arxiv:0"])
    store.papers.mailed("ada@example.org", ["arxiv:0"])
    assert [one.id for one in store.papers.ranked(not_mailed_to="ada@example.org")] == ["arxiv:1"]
    assert len(store.papers.ranked(not_mailed_to="eve@example.org")) == 2
    with pytest.raises(StoreError):
        store.papers.mailed("ada@example.org", ["no-such"])


def test_subscriptions(store):
    assert store.papers.subscribe("pruning")
    assert not store.papers.subscribe("pruning")
    assert store.papers.subscribe("lora")
    assert [one.query for one in store.papers.subscriptions()] == ["lora", "pruning"]
    assert store.papers.unsubscribe("lora")
    assert not store.papers.unsubscribe("lora")
    ((query, since),) = [dataclasses.astuple(one) for one in store.papers.subscriptions()]
    assert Subscription(query, since) == store.papers.subscriptions()[0]
    assert (query, stamp(60) <= since) == ("pruning", True)


def test_the_state_of_a_feed(store):
    url = "https://example.org/feed"
    assert store.papers.feed(url) == FeedState(url)
    for state in (FeedState(url, '"a"', "date", 1.5, 2.5), FeedState(url, "", "", 3.5, 1e12)):
        store.papers.remember(state)
        assert store.papers.feed(url) == state


def test_the_targets_that_were_run(store):
    assert store.targets() == []
    for target in ("claim:b/c", "arena:prune", "claim:b/c"):
        store.add(Record(job=Job(target=target, arm="*", case="-", seed=0), status=Status.DONE))
    assert store.targets() == ["arena:prune", "claim:b/c"]


def test_a_store_of_the_second_revision_is_upgraded_and_keeps_its_leases(tmp_path):
    path = tmp_path / "old.db"
    shutil.copy(OLD, path)
    engine = sa.create_engine(f"sqlite:///{path}")
    sa.event.listen(engine, "connect", _on_connect)
    sa.event.listen(engine, "begin", _on_begin)
    with writing(engine) as connection:
        schema.upgrade(connection, "0002")
        connection.exec_driver_sql("INSERT INTO nervure_leases VALUES ('a', 'me', 'other machine', 1, '1', 1e12)")
    engine.dispose()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM nervure_version").fetchone() == ("0002",)
        assert not raw.execute("SELECT name FROM sqlite_master WHERE name LIKE 'nervure_p%'").fetchone()
    raw.close()
    with Store.open(path) as store:
        assert len(store.records()) == 3
        assert not store.lease("a")
        assert store.papers.add([paper()]) == ["arxiv:0"]
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM nervure_version").fetchone() == (schema.HEAD,)
    raw.close()


def test_papers_in_postgresql(database):
    with Store.open(database) as store:
        number = os.getpid()
        assert store.papers.add([paper(number)]) == [f"arxiv:{number}"]
        assert store.papers.add([paper(number, votes=5)]) == []
        assert store.papers.get([f"arxiv:{number}"])[f"arxiv:{number}"].votes == 5
        store.papers.mailed("ada@example.org", [f"arxiv:{number}"])
        assert f"arxiv:{number}" not in [one.id for one in store.papers.ranked(not_mailed_to="ada@example.org")]
        query = f"pruning {number}"
        assert store.papers.subscribe(query)
        assert not store.papers.subscribe(query)
        assert store.papers.unsubscribe(query)
        state = FeedState(f"https://example.org/{number}", "a", "b", 1.0, 2.0)
        store.papers.remember(state)
        store.papers.remember(state)
        assert store.papers.feed(state.url) == state
