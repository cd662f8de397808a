import asyncio
import json
import re
import threading

import httpx2
import pytest
from starlette.testclient import TestClient

from nervure._kit import UsageError
from nervure.catalogue import entries
from nervure.spec import Job
from nervure.web import server as web
from nervure.web.launcher import Launcher, allowed
from nervure.web.server import Server

CLAIM = "lottery-ticket/winning-ticket"
HOME = "http://127.0.0.1"


@pytest.fixture
def launcher(reports):
    return Launcher(store=None, reports=reports)


@pytest.fixture
def client(library, launcher):
    with TestClient(Server(library, launcher=launcher).app(), base_url=HOME) as opened:
        yield opened


@pytest.fixture
def reader(library):
    with TestClient(Server(library).app(), base_url=HOME) as opened:
        yield opened


@pytest.fixture
def run_id(library):
    return next(run.id for run in library.runs() if run.as_claimed)


def every_page(client):
    found = [
        "/",
        "/runs",
        "/leaderboards",
        "/networks",
        "/feed",
        "/feed?q=x&family=train",
        "/paper/lottery-ticket",
        "/paper/snip",
        "/nothing",
    ]
    runs = sorted(set(re.findall(r"/run/[0-9a-f]{12}", client.get("/runs").text)))
    found += runs + [f"{run}/part" for run in runs]
    found += ["/network/audit-one", "/network/audit-two", "/network/landscape-net"]
    return [*found, "/side?run=audit-one&run=audit-two"]


def test_every_page_answers_and_nothing_from_outside_is_markup(client):
    for address in every_page(client):
        answer = client.get(address)
        assert answer.status_code == (404 if address in ("/nothing", "/paper/snip") else 200), address
        assert "<script>alert" not in answer.text, address
        assert "<img" not in answer.text, address
        assert "Undefined" not in answer.text, address


def test_names_of_others_are_shown_as_text(client):
    assert "&lt;script&gt;alert(1)" in client.get("/network/audit-two").text
    assert r"\u003cscript" not in client.get("/network/landscape-net").text  # the surface is numbers alone


def test_the_catalogue_is_searched_and_filtered(client):
    def shown(**query):
        return re.findall(r'href="/paper/([^"]+)"', client.get("/", params=query).text)

    assert len(shown()) == len(entries())
    assert shown(q="winning tickets")[0] == "lottery-ticket"
    assert {entries()[name].card["family"] for name in shown(family="adapt")} == {"adapt"}
    assert not any(entries()[name].runnable for name in shown(state="not yet"))
    assert "lottery-ticket" in shown(outcome="holds")
    assert "lottery-ticket" not in shown(outcome="void")
    assert client.get("/", params={"family": "x"}).status_code == 400


def test_a_paper_shows_what_was_measured_here_and_by_the_makers(client):
    page = client.get("/paper/lottery-ticket").text
    assert re.search(r"holds</span> here", page)
    assert "with the makers" in page
    assert "LotteryTicket" in page
    assert "<svg" in page
    assert 'href="https://' in page


def test_a_run_is_judged_and_a_rehearsal_is_told_apart(client, run_id):
    page = client.get(f"/run/{run_id}").text
    assert "nervure run lottery-ticket/winning-ticket --seeds 3" in page
    assert "Rehearsal" not in page
    assert sum("Rehearsal" in client.get(address).text for address in every_page(client) if "/run/" in address) == 2


def test_two_runs_stand_side_by_side(client):
    runs = list(dict.fromkeys(re.findall(r"/run/([0-9a-f]{12})", client.get("/runs").text)))
    claims = [run for run in runs if "The checks" in client.get(f"/run/{run}").text]
    page = client.get("/side", params={"run": claims[:2]})
    assert page.status_code == 200
    assert page.text.count("<svg") == 2
    for wrong in ([], claims[:1], ["audit-one", claims[0]], ["nobody", "nothing"]):
        assert client.get("/side", params={"run": wrong}).status_code in (400, 404)


def test_a_page_is_rendered_once_a_change_and_again_after_one(client, store, run_id, recorded, monkeypatch):
    monkeypatch.setattr(web, "_LOOK_SECONDS", 0.05)
    address = f"/run/{run_id}"
    first = client.get(address)
    tag = first.headers["etag"]
    assert client.get(address, headers={"if-none-match": tag}).status_code == 304
    store.add(recorded(3))
    for _ in range(1200):  # a page rests ten times as long as it took to render
        answer = client.get(address, headers={"if-none-match": tag})
        if answer.status_code == 200:
            break
        threading.Event().wait(0.05)
    assert "seeds 0, 1, 2, 3" in answer.text
    assert client.get(address, headers={"accept-encoding": "identity"}).text == answer.text


@pytest.mark.parametrize(
    "address",
    [
        "/static/../server.py", "/static/..%2fserver.py", "/static/%2e%2e/server.py",
        "/network/..%2f..%2faudit-outside", "/network/audit-..%2faudit-outside", "/network/audit-secret of others",
        "/network/audit-outside",         "/run/..%2f..%2fetc%2fpasswd", "/static/page.js%00", "/network/audit-one%00",
    ],
)  # fmt: skip
def test_paths_lead_nowhere_else(client, address):
    answer = client.get(address)
    assert answer.status_code == 404
    assert "class Server" not in answer.text


def test_a_name_that_was_rebound_to_this_machine_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8294"}).status_code == 200
    assert client.get("/", headers={"host": "[::1]:8294"}).status_code == 200
    assert client.get("/", headers={"host": "127.0.0.1.evil.example"}).status_code == 400


def test_browsers_are_told_to_run_and_fetch_nothing_else(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert client.get("/static/page.js").headers["x-content-type-options"] == "nosniff"
    pages = "".join(client.get(address).text for address in every_page(client))
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", pages)
    assert not re.findall(r"<script(?![^>]*(?:src=|application/json))", pages)
    assert not re.findall(r"\son[a-z]+=[\"']", pages)


def test_requests_are_bounded(client):
    assert client.post("/start", content=b"x" * 20_000).status_code == 413
    assert client.get("/?q=" + "x" * 3000).status_code == 414

    def drip():
        for _ in range(40):
            yield b"x" * 1000

    assert client.post("/start", content=drip()).status_code == 413
    assert client.get("/", params={"q": "\"' OR * NEAR( ^ {}"}).status_code == 200


def token(client):
    return re.search(r'name="secret" value="([^"]+)"', client.get("/paper/lottery-ticket").text)[1]


def test_only_this_servers_own_forms_start_something(client):
    good = {"secret": token(client), "what": f"run {CLAIM}", "quick": "yes"}
    for refused in (
        client.post("/start", data={**good, "secret": "guess"}),
        client.post("/start", data={"what": good["what"]}),
        client.post("/start", data=good, headers={"origin": "https://evil.example"}),
        client.post("/start", data=good, headers={"origin": "null"}),
        client.post("/start", data=good, headers={"sec-fetch-site": "cross-site"}),
        client.get("/start", params=good),
    ):
        assert refused.status_code in (403, 405)


@pytest.mark.parametrize(
    "what",
    [
        "", "run", "run nobody/nothing", "run lottery-ticket/winning-ticket --store /etc",
        "compare prune --model a.py:f", "audit x.py:net", "run lottery-ticket/../x", "compare",
        "compare prune; ls", "run ewc\x00",
    ],
)  # fmt: skip
def test_nothing_but_the_catalogue_is_started(client, what):
    answer = client.post("/start", data={"secret": token(client), "what": what})
    assert answer.status_code == 400
    with pytest.raises(UsageError):
        allowed(what)


def test_a_server_that_only_shows_starts_nothing(reader):
    assert 'method="post"' not in reader.get("/paper/lottery-ticket").text
    assert reader.post("/start", data={"secret": "", "what": f"run {CLAIM}"}).status_code == 403
    assert reader.get("/started/abc").status_code == 403


class Said:
    """Stand in for a run's process with what it would print."""

    def __init__(self, lines, code, errors=b""):
        self.stdout, self.stderr, self._code = asyncio.StreamReader(), asyncio.StreamReader(), code
        for line in lines:
            self.stdout.feed_data(line)
        self.stderr.feed_data(errors)
        self.stdout.feed_eof()
        self.stderr.feed_eof()

    async def wait(self):
        return self._code


def event(share, kind="progress"):
    job = Job(target=f"claim:{CLAIM}", arm="*", case="-", seed=0).to_json()
    body = {"kind": kind, "share": share, "seconds_left": 3.0, "job": job, "job_share": 0.5, "text": "seed 0"}
    return json.dumps({**body, "status": None, "error": None}).encode() + b"\n"


def follow(client, monkeypatch, *said):
    words = []

    async def begin(*command, **options):
        words.extend(command)
        return Said(*said)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", begin)
    answer = client.post("/start", data={"secret": token(client), "what": f"run {CLAIM}"}, follow_redirects=False)
    assert answer.status_code == 303
    with client.stream("GET", answer.headers["location"] + "/events") as stream:
        told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    return words, told, answer.headers["location"]


def test_a_started_run_is_followed_to_its_end(client, monkeypatch):
    lines = [b"noise of a library\n", event(0.4), event(1.0, "ended")]
    words, told, page = follow(client, monkeypatch, lines, 0)
    assert words[2:5] == ["nervure.cli", "run", CLAIM]
    assert "--events" in words
    assert told[-1]["state"] == "done"
    assert told[-1]["share"] == 1.0
    assert client.get(told[-1]["run"]).status_code == 200
    assert "See what was measured" in client.get(page).text
    assert "Stop it" not in client.get(page).text


def test_a_run_that_cannot_run_says_why(client, monkeypatch):
    _, told, page = follow(client, monkeypatch, [], 3, b"nervure: no disk <b>\n")
    assert told[-1]["state"] == "could not run"
    assert told[-1]["error"] == "nervure: no disk <b>"
    assert "no disk &lt;b&gt;" in client.get(page).text


def test_a_store_that_fails_is_told_and_the_server_lives(client, library, monkeypatch):
    from nervure._kit import StoreError

    def broken():
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(library, "runs", broken)
        assert client.get("/runs").status_code == 503
    assert client.get("/runs").status_code == 200


def test_many_readers_get_one_rendering(library):
    server = Server(library)
    made = []

    async def read():
        transport = httpx2.ASGITransport(app=server.app())
        async with httpx2.AsyncClient(transport=transport, base_url=HOME) as many:
            answers = await asyncio.gather(*(many.get("/runs") for _ in range(50)))
        return {answer.status_code for answer in answers}

    whole = server._pages.runs
    server._pages.runs = lambda: made.append(1) or whole()
    assert asyncio.run(read()) == {200}
    assert len(made) == 1


def test_a_reader_who_leaves_a_stream_is_noticed(library, run_id, monkeypatch):
    monkeypatch.setattr(web, "_PULSE_SECONDS", 0.05)
    server = Server(library)
    path = f"/run/{run_id}/events"
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"127.0.0.1")],
        "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    sent = []

    async def read():
        pulse, asked = asyncio.Event(), []

        async def receive():
            if not asked:
                asked.append(1)
                return {"type": "http.request", "body": b"", "more_body": False}
            await pulse.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message.get("body", b""))
            if b"still here" in sent[-1]:
                assert server._streams == 1
                pulse.set()

        await asyncio.wait_for(server.app()(scope, receive, send), 20)

    asyncio.run(read())
    assert b"retry: 3000\n\n" in sent
    assert server._streams == 0
