import json
import subprocess
import sys
import time

import pytest

from nervure._kit import BadBudget, CouldNotRun, UsageError
from nervure.app import feeding
from nervure.cli.main import run
from nervure.feed import Fetcher
from nervure.feed.mail import Server
from nervure.spec import Job, Record, Status
from nervure.store import FeedState, Store

PRUNING = {
    "id": "2601.00001",
    "title": "Winning tickets by pruning",
    "summary": "Iterative magnitude pruning with rewinding finds sparse subnetworks.",
    "votes": 5,
}
FORGETTING = {
    "id": "2601.00002",
    "title": "No forgetting",
    "summary": "Continual learning without catastrophic forgetting of old tasks.",
    "votes": 5,
}
KNOWN = {"id": "1803.03635", "title": "The Lottery Ticket Hypothesis", "votes": 99}


def listed(*values, **headers):
    return (200, headers, json.dumps(values).encode())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NERVURE_STORE", str(tmp_path / "store.db"))
    for name in ("HOST", "PORT", "USER", "PASSWORD", "FROM"):
        monkeypatch.delenv(f"NERVURE_SMTP_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store.db"


class Postman:
    """Stand in for a mail server: what went out, and whether it is taken."""

    sender = "me@example.org"

    def __init__(self):
        self.letters, self.fails = [], False

    def send(self, message):
        if self.fails:
            raise CouldNotRun("the server is down")
        self.letters.append(message)


def test_what_is_new_is_stored_placed_and_ranked(feeds, fetcher):
    with Store.open() as store:
        store.add(Record(job=Job(target="claim:ewc/less-forgetting", arm="*", case="-", seed=0), status=Status.DONE))
    url = feeds.say("/", listed(PRUNING, FORGETTING, KNOWN, {"title": "no link"}))
    shares = []
    came = feeding.pull([url], fetcher=fetcher, on_event=lambda event: shares.append(event.share))
    (one,) = came.sources
    assert (one.state, one.new, one.renewed, one.skipped) == ("read", 2, 0, 1)
    assert not came.failed
    assert [(paper.id, paper.family) for paper in came.papers] == [
        ("arxiv:2601.00002", "adapt"),
        ("arxiv:2601.00001", "compress"),
    ]
    assert came.known == (("The Lottery Ticket Hypothesis", "lottery-ticket"),)
    assert feeding.papers() == list(came.papers)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def test_a_second_visit_asks_only_for_what_changed(feeds, fetcher):
    url = feeds.say(
        "/", listed(PRUNING, ETag='"1"'), (304, {}, b""), listed(PRUNING | {"votes": 400}, FORGETTING, ETag='"2"')
    )
    feeding.pull([url], fetcher=fetcher)
    before = feeding.papers()[0]
    assert feeding.pull([url], fetcher=fetcher).sources[0].state == "unchanged"
    third = feeding.pull([url], fetcher=fetcher).sources[0]
    assert (third.state, third.new, third.renewed) == ("read", 1, 1)
    assert [sent.get("If-None-Match") for _, sent in feeds.asked] == [None, '"1"', '"1"']
    after = feeding.papers(query="pruning")[0]
    assert (before.votes, after.votes) == (5, 400)
    assert after.score > before.score
    assert after.first_seen == before.first_seen
    with Store.open() as store:
        assert store.papers.feed(url).etag == '"2"'


def test_a_feed_that_is_fresh_is_left_alone(feeds, slept, here):
    url = feeds.say("/", listed(PRUNING, **{"Cache-Control": "max-age=3600"}))
    for state in ("read", "fresh", "fresh"):
        came = feeding.pull([url], fetcher=Fetcher(pause=0, sleep=slept.append))
        assert came.sources[0].state == state
    assert "asked again in" in came.sources[0].told
    assert len(feeds.asked) == 1
    with Store.open(here) as store:  # a clock that ran ahead does not shut a feed for ever
        store.papers.remember(FeedState(url, fetched=time.time() + 1e6, next_try=time.time() + 2e6))
    assert feeding.pull([url]).sources[0].state == "read"


def test_a_feed_that_fails_does_not_stop_the_others(feeds, fetcher):
    bad = feeds.say("/bad", (200, {"ETag": '"bad"'}, b'[{"title": '))
    down = feeds.say("/down", (429, {"Retry-After": "7200"}, b""))
    good = feeds.say("/good", listed(PRUNING))
    came = feeding.pull([bad, down, good, good], fetcher=fetcher)
    assert [one.state for one in came.sources] == ["failed", "failed", "read"]
    assert "broken JSON" in came.sources[0].told
    assert "2 h 00 min" in came.sources[1].told
    assert len(came.papers) == 1
    assert not came.failed
    with Store.open() as store:
        assert store.papers.feed(bad).etag == ""
    assert feeding.pull([down], fetcher=fetcher).sources[0].state == "fresh"
    assert feeding.pull([bad], fetcher=fetcher).failed


def test_papers_are_stored_before_the_validators_are(feeds, fetcher, monkeypatch):
    url = feeds.say("/", listed(PRUNING, ETag='"1"'))
    monkeypatch.setattr(feeding.Ranker, "place", lambda self, paper: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feeding.pull([url], fetcher=fetcher)
    with Store.open() as store:
        assert store.papers.feed(url).etag == ""


def test_a_hostile_feed_ends_as_harmless_text(feeds, fetcher):
    title = "<script>alert(1)</script>\x1b[2J\u202e pruning"
    url = feeds.say("/", listed({"title": title, "link": "https://example.org/x", "votes": 10**30}))
    (paper,) = feeding.pull([url], fetcher=fetcher).papers
    assert (paper.title, paper.votes) == ("<script>alert(1)</script>[2J pruning", None)
    html = feeding.digest(dry_run=True).digest.html()
    assert "<script" not in html


def test_another_feed_cannot_change_what_a_paper_is(feeds, fetcher):
    feeding.pull([feeds.say("/a", listed(PRUNING))], fetcher=fetcher)
    lie = {"id": "arXiv:2601.00001v9", "title": "Buy now", "link": "https://evil.example", "votes": 7}
    feeding.pull([feeds.say("/b", listed(lie))], fetcher=fetcher)
    (paper,) = feeding.papers()
    assert (paper.title, paper.link, paper.votes) == (PRUNING["title"], "https://arxiv.org/abs/2601.00001", 7)


def test_subscriptions_choose_what_is_mailed_and_nothing_is_mailed_twice(feeds, fetcher):
    feeding.pull([feeds.say("/", listed(PRUNING, FORGETTING))], fetcher=fetcher)
    assert feeding.subscribe("  Prun  ticket ")
    assert not feeding.subscribe("prun ticket")
    postman = Postman()
    first = feeding.digest("Ada@example.org", server=postman)
    assert first.sent
    assert first.digest.queries == ("prun ticket",)
    assert [paper.title for paper in first.digest.papers] == [PRUNING["title"]]
    assert postman.letters[0]["To"] == "Ada@example.org"
    again = feeding.digest("ada@example.org", server=postman)
    assert (again.sent, again.digest.papers) == (False, ())
    assert feeding.digest("eve@example.org", server=postman).sent
    assert feeding.unsubscribe("PRUN ticket")
    assert not feeding.unsubscribe("prun ticket")
    best = feeding.digest("ada@example.org", server=postman)
    assert [paper.title for paper in best.digest.papers] == [FORGETTING["title"]]
    assert len(postman.letters) == 3


def test_what_the_server_did_not_take_was_not_mailed(feeds, fetcher):
    feeding.pull([feeds.say("/", listed(PRUNING))], fetcher=fetcher)
    postman = Postman()
    postman.fails = True
    with pytest.raises(CouldNotRun):
        feeding.digest("ada@example.org", server=postman)
    postman.fails = False
    assert feeding.digest("ada@example.org", server=postman).sent


def test_a_dry_run_sends_and_remembers_nothing(feeds, fetcher):
    feeding.pull([feeds.say("/", listed(PRUNING, FORGETTING))], fetcher=fetcher)
    for address in (None, "ada@example.org"):
        mailed = feeding.digest(address, dry_run=True, limit=1)
        assert (mailed.sent, len(mailed.digest.papers)) == (False, 1)
    assert len(feeding.digest("ada@example.org", server=Postman()).digest.papers) == 2


def test_old_papers_are_not_news(feeds, fetcher, monkeypatch):
    feeding.pull([feeds.say("/", listed(PRUNING))], fetcher=fetcher)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 15 * 86400)
    assert feeding.digest(dry_run=True).digest.papers == ()
    assert len(feeding.digest(dry_run=True, days=16).digest.papers) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: feeding.digest(),
        lambda: feeding.digest("ada@example.org\nBcc: eve@example.org"),
        lambda: feeding.digest("ada@example.org"),
        lambda: feeding.subscribe(""),
        lambda: feeding.subscribe("... !"),
        lambda: feeding.subscribe("word " * 60),
        lambda: feeding.papers(family="no-such"),
        lambda: feeding.papers(limit=0),
        lambda: feeding.digest(dry_run=True, days=0),
        lambda: feeding.pull(["file:///etc/passwd"]),
        lambda: feeding.pull(["http://me:word@127.0.0.1/"]),
    ],
)
def test_wrong_usage(call, feeds, fetcher):
    feeding.pull([feeds.say("/", listed(PRUNING))], fetcher=fetcher)
    with pytest.raises((UsageError, BadBudget)):
        call()


def test_the_usual_feeds_are_asked_when_none_is_named(feeds, fetcher, monkeypatch):
    assert all(feeding.source_address(one) == one for one in feeding.SOURCES)
    monkeypatch.setattr(feeding, "SOURCES", (feeds.say("/", listed(PRUNING)),))
    assert len(feeding.pull(fetcher=fetcher).papers) == 1


def test_the_command_line(feeds, capsys):
    url = feeds.say("/", listed(PRUNING, FORGETTING, KNOWN))
    assert run(["feed", "list"]) == 1
    assert "feed pull" in capsys.readouterr().out
    assert run(["feed", "pull", "--source", url]) == 0
    out = capsys.readouterr().out
    assert f"2 new, 0 known: {url}" in out
    assert "nervure show lottery-ticket" in out
    assert PRUNING["title"] in out
    assert run(["feed", "pull", "--source", url]) == 0
    assert "fresh, asked again in" in capsys.readouterr().out
    assert run(["feed", "list", "prun", "--family", "compress", "--json"]) == 0
    (value,) = json.loads(capsys.readouterr().out)
    assert (value["id"], value["votes"]) == ("arxiv:2601.00001", 5)
    assert run(["feed", "subscribe", "catastrophic", "forgetting"]) == 0
    assert run(["feed", "subscriptions"]) == 0
    assert "catastrophic forgetting  (since 2" in capsys.readouterr().out
    assert run(["feed", "subscriptions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["query"] == "catastrophic forgetting"
    assert run(["feed", "digest", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert FORGETTING["title"] in out
    assert PRUNING["title"] not in out
    assert run(["feed", "unsubscribe", "catastrophic", "forgetting"]) == 0
    assert run(["feed", "unsubscribe", "catastrophic", "forgetting"]) == 1
    assert run(["feed", "digest", "--to", "ada@example.org"]) == 2
    assert "NERVURE_SMTP_HOST" in capsys.readouterr().err


def test_a_feed_that_cannot_be_read_is_3(feeds, capsys):
    url = feeds.say("/", (404, {}, b""))
    assert run(["feed", "pull", "--source", url]) == 3
    assert "status 200; found 404" in capsys.readouterr().err
    assert run(["feed", "pull", "--source", url, "--json"]) == 3
    value = json.loads(capsys.readouterr().out)
    assert (value["sources"][0]["state"], value["papers"]) == ("failed", [])


def test_mail_through_the_command_line(feeds, capsys, monkeypatch):
    run(["feed", "pull", "--source", feeds.say("/", listed(PRUNING))])
    monkeypatch.setenv("NERVURE_SMTP_HOST", "127.0.0.1")
    monkeypatch.setenv("NERVURE_SMTP_FROM", "me@example.org")
    sent = []
    monkeypatch.setattr(Server, "send", lambda self, message: sent.append((self, message)))
    assert run(["feed", "digest", "--to", "ada@example.org"]) == 0
    assert "1 paper mailed to ada@example.org" in capsys.readouterr().out
    assert sent[0][1]["From"] == "me@example.org"
    assert run(["feed", "digest", "--to", "ada@example.org"]) == 0
    assert "Nothing new." in capsys.readouterr().out


def test_the_feed_needs_no_torch():
    code = "import sys, nervure.cli.feeding, nervure.app.feeding; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
