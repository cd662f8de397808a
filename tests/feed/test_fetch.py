import email.utils
import gzip
import random
import socket
import ssl
import threading
import time

import pytest

import nervure
from nervure._kit import UsageError
from nervure.feed import FeedError, Fetcher
from nervure.feed.address import redirected, source_address, web_address
from nervure.feed.fetch import _max_age, _retry_after

OK = (200, {}, b"[]")


def test_an_answer_comes_with_what_the_next_visit_needs(feeds, fetcher):
    date = "Sat, 03 Jan 2026 10:00:00 GMT"
    headers = {"ETag": 'W/"a1"', "Last-Modified": date, "Content-Type": "text/xml; charset=ISO-8859-1"}
    url = feeds.say("/feed", (200, headers | {"Cache-Control": "public, max-age=600"}, b"body"), (304, {}, b""))
    first = fetcher.get(url)
    assert (first.body, first.charset, first.fresh) == (b"body", "iso-8859-1", 600)
    again = fetcher.get(url, etag=first.etag, last_modified=first.last_modified)
    assert (again.body, again.fresh) == (None, 0)
    sent = feeds.asked[1][1]
    assert (sent["If-None-Match"], sent["If-Modified-Since"]) == ('W/"a1"', date)
    assert sent["User-Agent"].startswith(f"nervure/{nervure.__version__} (+https://")
    assert "If-None-Match" not in feeds.asked[0][1]


def test_a_validator_that_is_no_header_is_forgotten(feeds, fetcher):
    long = fetcher.get(feeds.say("/long", (200, {"ETag": "x" * 501, "Last-Modified": "y" * 61}, b"")))
    assert (long.etag, long.last_modified) == ("", "")
    folded = fetcher.get(feeds.say("/folded", (200, {"ETag": '"a"\r\n b: c', "Last-Modified": "\x01"}, b"")))
    assert (folded.etag, folded.last_modified) == ("", "")


def test_gzip_is_unpacked(feeds, fetcher):
    url = feeds.say("/", (200, {"Content-Encoding": "gzip"}, gzip.compress(b"hello" * 1000)))
    assert fetcher.get(url).body == b"hello" * 1000
    assert feeds.asked[0][1]["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(feeds, fetcher, slept, status):
    assert fetcher.get(feeds.say("/", (status, {}, b""), (status, {}, b""), OK)).body == b"[]"
    assert 1 <= slept[0] <= 3
    assert 2 <= slept[1] <= 6


def test_it_waits_as_long_as_the_server_wants(feeds, fetcher, slept):
    then = email.utils.formatdate(time.time() + 50, usegmt=True)
    busy = [(429, {"Retry-After": "7"}, b""), (503, {"Retry-After": then}, b""), (503, {"Retry-After": "soon"}, b"")]
    assert fetcher.get(feeds.say("/", *busy, OK)).body == b"[]"
    assert slept[0] == 7
    assert 40 < slept[1] <= 50
    assert 4 <= slept[2] <= 12


def test_it_does_not_sit_and_wait_for_an_hour(feeds, fetcher, slept):
    with pytest.raises(FeedError, match=r"status 429.*again in 1 h 00 min") as error:
        fetcher.get(feeds.say("/", (429, {"Retry-After": "3600"}, b"")))
    assert error.value.wait == 3600
    assert error.value.exit_code == 3
    assert slept == []


def test_it_gives_up_after_four_attempts(feeds, fetcher, slept):
    with pytest.raises(FeedError, match="status 500"):
        fetcher.get(feeds.say("/", (500, {}, b"")))
    assert (len(feeds.asked), len(slept)) == (4, 3)


def test_the_jitter_leaves_the_users_generator_alone(feeds, fetcher):
    before = random.getstate()
    fetcher.get(feeds.say("/", (500, {}, b""), OK))
    assert random.getstate() == before


@pytest.mark.parametrize("status", [201, 204, 400, 401, 403, 404, 410])
def test_what_will_not_change_is_not_asked_again(feeds, fetcher, slept, status):
    with pytest.raises(FeedError, match=f"found {status}"):
        fetcher.get(feeds.say("/", (status, {}, b"")))
    assert slept == []


def test_two_requests_to_one_host_are_three_seconds_apart(feeds, slept):
    polite = Fetcher(sleep=slept.append)
    url = feeds.say("/", OK)
    polite.get(url)
    assert slept == []
    polite.get(url)
    assert 2 < slept[0] <= 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(feeds, fetcher, status):
    feeds.say("/there", OK)
    assert fetcher.get(feeds.say("/", (status, {"Location": "there"}, b""))).body == b"[]"
    assert [path for path, _ in feeds.asked] == ["/", "/there"]


def test_a_loop_of_redirects_ends(feeds, fetcher):
    feeds.say("/b", (302, {"Location": "/a"}, b""))
    with pytest.raises(FeedError, match="redirects too often"):
        fetcher.get(feeds.say("/a", (302, {"Location": "/b"}, b"")))
    assert len(feeds.asked) == 6


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "javascript:x", "http://u:p@127.0.0.1/", "http://[", ""],
)
def test_a_redirect_elsewhere_is_refused(feeds, fetcher, slept, location):
    with pytest.raises(FeedError, match="does not go"):
        fetcher.get(feeds.say("/", (302, {"Location": location}, b"")))
    assert len(feeds.asked) == 1


def test_a_redirect_without_an_address(feeds, fetcher):
    with pytest.raises(FeedError, match="does not go"):
        fetcher.get(feeds.say("/", (302, {}, b"")))


@pytest.mark.parametrize(
    "there",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://10.0.0.1/",
        "http://192.168.1.1/admin",
        "http://169.254.169.254/latest/meta-data",
        "http://0.0.0.0/",
        "http://[fe80::1]/",
        "http://100.64.0.1/",
    ],
)
def test_the_internet_cannot_send_us_into_the_users_network(there, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", _numbers_only)
    assert redirected("http://93.184.216.34/feed", "http://93.184.216.34/feed", there) == ""
    assert redirected("http://127.0.0.1/feed", "http://127.0.0.1/feed", there) == there


def _numbers_only(host, *rest):
    return REAL_GETADDRINFO(host, None, flags=socket.AI_NUMERICHOST)


REAL_GETADDRINFO = socket.getaddrinfo


def test_a_redirect_never_leaves_tls():
    here = "https://93.184.216.34/feed"
    assert redirected(here, here, "http://93.184.216.34/feed") == ""
    assert redirected(here, here, "/other#part") == "https://93.184.216.34/other"


def test_a_huge_answer_is_cut_off(feeds, fetcher):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        for _ in range(10_000):
            handler.wfile.write(b"x" * 10_000)
            sent.append(1)

    with pytest.raises(FeedError, match=r"too much.*100\.0 kB"):
        fetcher.get(feeds.say("/", endless))
    assert len(sent) < 5000
    with pytest.raises(FeedError, match="too much"):
        fetcher.get(feeds.say("/", (200, {}, b"x" * 100_001)))
    assert len(fetcher.get(feeds.say("/", (200, {}, b"x" * 100_000))).body) == 100_000


def test_a_gzip_bomb_does_not_go_off(feeds, fetcher):
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    with pytest.raises(FeedError, match="too much"):
        fetcher.get(feeds.say("/", (200, {"Content-Encoding": "gzip"}, bomb)))
    empty = gzip.compress(b"") * 10_000  # nothing unpacked, yet no end of it
    with pytest.raises(FeedError, match="too much"):
        fetcher.get(feeds.say("/", (200, {"Content-Encoding": "gzip"}, empty)))


def test_broken_packing(feeds, fetcher, slept):
    with pytest.raises(FeedError, match="broken gzip"):
        fetcher.get(feeds.say("/", (200, {"Content-Encoding": "gzip"}, b"not gzip at all")))
    with pytest.raises(FeedError, match="nobody asked for"):
        fetcher.get(feeds.say("/", (200, {"Content-Encoding": "br"}, b"x")))
    assert slept == []
    half = gzip.compress(random.Random(0).randbytes(5000))[:-1000]
    with pytest.raises(FeedError, match="middle of its answer"):
        fetcher.get(feeds.say("/", (200, {"Content-Encoding": "gzip"}, half)))
    assert len(slept) == 3


def test_half_an_answer_is_asked_for_again(feeds, fetcher):
    half = (200, {"Content-Length": "100"}, b"x" * 50)
    assert fetcher.get(feeds.say("/", half, OK)).body == b"[]"

    def chunked(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n64\r\nwor")
        handler.close_connection = True

    assert fetcher.get(feeds.say("/", chunked, OK)).body == b"[]"


def test_what_is_no_web_server(feeds, slept):
    def garbage(handler):
        handler.wfile.write(b"\x00\xff not http\r\n\r\n")
        handler.close_connection = True

    def many_headers(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(1000)) + b"\r\n")
        handler.close_connection = True

    short = Fetcher(timeout=1, attempts=2, pause=0, sleep=slept.append)
    for answer in (garbage, many_headers):
        with pytest.raises(FeedError, match="no answer"):
            short.get(feeds.say("/", answer))
    assert len(slept) == 2


def test_nobody_listens(slept):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FeedError, match=f"127.0.0.1:{port} gives no answer.*refused"):
        Fetcher(attempts=2, pause=0, sleep=slept.append).get(f"http://127.0.0.1:{port}/")
    assert len(slept) == 1


def test_silence_and_dripping_end(feeds, slept):
    over = threading.Event()

    def silent(handler):
        over.wait(10)

    def dripping(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while not over.wait(0.05):
            handler.wfile.write(b"x")

    def dripping_headers(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        handler.close_connection = True
        while not over.wait(0.05):
            handler.wfile.write(b"x")

    impatient = Fetcher(timeout=0.3, deadline=0.6, attempts=1, pause=0, sleep=slept.append)
    try:
        for answer, why in ((silent, "timed out"), (dripping, "not done after"), (dripping_headers, "not done after")):
            start = time.monotonic()
            with pytest.raises(FeedError, match=why):
                impatient.get(feeds.say("/", answer))
            assert time.monotonic() - start < 5
    finally:
        over.set()


def test_a_certificate_nobody_signed_is_refused(keys, slept):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*keys)
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server.accept()[0] as connection, pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_side=True)

    thread = threading.Thread(target=serve)
    thread.start()
    with server, pytest.raises(FeedError, match="certificate of 127.0.0.1.*not trusted"):
        Fetcher(pause=0, sleep=slept.append).get(f"https://127.0.0.1:{server.getsockname()[1]}/")
    thread.join()
    assert slept == []


def test_addresses():
    for good in ("http://example.org", "https://example.org:8443/a?b=c", "https://[2001:db8::1]/x"):
        assert web_address(good) == good
    for bad in (
        "",
        None,
        7,
        "example.org",
        "//example.org",
        "http://",
        "http:///path",
        "ftp://example.org",
        "FILE:///etc/passwd",
        "javascript:alert(1)",
        " https://example.org",
        "https://example.org/a b",
        "https://example.org/\r\nX: y",
        "https://example.org/\u202e",
        "https://user:word@example.org",
        "https://example.org:x/",
        "https://example.org:99999/",
        "https://[::1",
        "https://example.org/" + "a" * 2000,
    ):
        assert web_address(bad) == ""
    assert source_address(" https://example.org/a \n") == "https://example.org/a"
    with pytest.raises(UsageError, match="no feed's address"):
        source_address("file:///etc/passwd")


def test_an_endless_host_name(fetcher):
    with pytest.raises(FeedError, match="cannot be asked|no answer"):
        fetcher.get(f"http://{'a' * 70}.localhost/")


def test_how_long_an_answer_is_fresh():
    assert _max_age("public, max-age=60") == 60
    assert _max_age('Max-Age="5"') == 5
    assert _max_age("max-age=999999999") == 86400
    for nothing in (
        "",
        "s-maxage=60",
        "max-age=-1",
        "no-cache, max-age=60",
        "no-store, max-age=60",
        "max-age=1e9x"[:8],
    ):
        assert _max_age(nothing) == 0
    assert _retry_after("999999999") == 86400
    assert _retry_after("Sat, 03 Jan 1970 10:00:00 GMT") == 0
    for nothing in (None, "-1", "soon", "9" * 400, "Sat, 99 Jan 2026"):
        assert _retry_after(nothing) is None
