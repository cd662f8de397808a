"""Ask a web server for a feed: politely, within bounds, and no more often than it wishes."""

from __future__ import annotations

import email.utils
import functools
import http.client
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import nervure
from nervure._kit import CouldNotRun, bytes_text, seconds_text
from nervure.feed.address import redirected

AGENT = f"nervure/{nervure.__version__} (+https://nervure.readthedocs.io)"
_DAY = 86400.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
# What a server calls a version of its answer goes back to it as a header: it must be one line.
_ETAG = re.compile(r"[\x21-\x7e]{1,500}")
_DATE = re.compile(r"[\x20-\x7e]{1,60}")


class FeedError(CouldNotRun):
    """Report a feed that cannot be had or read.

    Args:
        what: What went wrong.
        wait: Seconds the server asks not to be visited for.
        options: As in `NervureError`.
    """

    def __init__(self, what: str, *, wait: float = 0.0, **options: Any) -> None:
        self.wait = wait
        super().__init__(what, **options)


@dataclass(frozen=True)
class Fetched:
    """Hold a server's answer.

    Args:
        body: What it sent; None when nothing changed since the last visit.
        charset: The encoding its header names, or empty.
        etag: What to send with the next visit, or empty.
        last_modified: What to send with the next visit, or empty.
        fresh: Seconds for which the answer need not be asked for again.
    """

    body: bytes | None
    charset: str = ""
    etag: str = ""
    last_modified: str = ""
    fresh: float = 0.0


class _Again(Exception):
    """Say that another attempt may help, and after how many seconds the server wants it."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Fetcher:
    """Fetch feeds over http and https, and nothing else.

    Args:
        timeout: Seconds of silence after which a connection is given up.
        deadline: Seconds after which it is given up though the server still drips.
        most: Most bytes of an answer, before and after it is unpacked.
        redirects: How many redirects are followed.
        attempts: How often a server is asked that does not answer, or answers 429 or 5xx.
        base: Seconds before the second attempt; each further one waits twice as long, give or take a half.
        patience: Longest wait before another attempt; where a server wants more, the visit ends.
        pause: Seconds between two requests to one host. arXiv asks for three.
        keep: Seconds for which an answer is kept whatever its server says; it may ask for up to a day.
        sleep: How to wait.
    """

    def __init__(
        self,
        *,
        timeout: float = 20.0,
        deadline: float = 90.0,
        most: int = 8 << 20,
        redirects: int = 5,
        attempts: int = 4,
        base: float = 2.0,
        patience: float = 60.0,
        pause: float = 3.0,
        keep: float = 900.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.timeout, self.deadline, self.most, self.redirects = timeout, deadline, most, redirects
        self.attempts, self.base, self.patience, self.pause, self.keep = attempts, base, patience, pause, keep
        self._sleep = sleep
        self._visits: dict[str, float] = {}
        self._random = random.Random()  # the user's own generator stays as it is

    def get(self, url: str, *, etag: str = "", last_modified: str = "") -> Fetched:
        """Return what a feed says now.

        Args:
            url: Its address, as `source_address` gives it.
            etag: `Fetched.etag` of the last visit.
            last_modified: `Fetched.last_modified` of the last visit.

        Returns:
            The answer.

        Raises:
            FeedError: If there is none that can be used.
        """
        headers = {"User-Agent": AGENT, "Accept": "application/atom+xml, application/json", "Accept-Encoding": "gzip"}
        headers |= {"If-None-Match": etag} if etag else {}
        headers |= {"If-Modified-Since": last_modified} if last_modified else {}
        for attempt in range(self.attempts):
            try:
                return self._follow(url, headers)
            except _Again as again:
                backoff = self.base * 2**attempt * self._random.uniform(0.5, 1.5)
                wait = backoff if again.wait is None else max(again.wait, 0.0)
                if attempt + 1 == self.attempts or wait > self.patience:
                    asked = again.wait or 0.0
                    later = f"again in {seconds_text(asked)}" if asked else "again later"
                    raise FeedError(f"{_host(url)} gives no answer", wait=asked, found=again, try_=later) from again
                self._sleep(wait)
        raise FeedError(f"{_host(url)} was not asked", expected="at least one attempt", found=self.attempts)

    def _follow(self, first: str, headers: dict[str, str]) -> Fetched:
        url = first
        for _ in range(self.redirects + 1):
            with self._open(url, headers) as response:
                if response.status not in _REDIRECTS:
                    return self._answer(url, response)
                there = redirected(first, url, response.headers["Location"])
            if not there:
                raise FeedError(
                    f"{_host(url)} redirects to where nervure does not go",
                    expected="another address of the web, not inside your network, and not off TLS",
                )
            url = there
        raise FeedError(f"{_host(first)} redirects too often", expected=f"at most {self.redirects} redirects")

    @contextmanager
    def _open(self, url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Send one request. Whatever goes wrong until the answer is read becomes `_Again` or `FeedError`.

        Yields:
            The server's answer, whatever its status.

        Raises:
            FeedError: If another attempt cannot help.
            _Again: If it may.
        """
        self._take_turns(_host(url))
        watch = _Watch(self.deadline)
        # Not urllib's own opener, which would also follow file:, ftp: and data:, and any redirect.
        opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler(), _Http(watch), _Https(watch)):
            opener.add_handler(handler)
        try:
            response: Any = opener.open(urllib.request.Request(url, headers=headers), timeout=self.timeout)
            if response is None:
                raise FeedError(f"{_host(url)} cannot be asked", expected="http or https")
            with response:
                yield response
            if watch.over:
                raise _Again(f"it was not done after {seconds_text(self.deadline)}")
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                message = reason.verify_message
                raise FeedError(f"the certificate of {_host(url)} is not trusted", found=message) from error
            over = f"it was not done after {seconds_text(self.deadline)}"
            raise _Again(over if watch.over else _one_line(reason)) from error
        except ValueError as error:  # a host name with an empty or endless part
            raise FeedError(f"{_host(url)} cannot be asked", found=_one_line(error)) from error
        finally:
            watch.end()

    def _take_turns(self, host: str) -> None:
        wait = self._visits.get(host, -self.pause) + self.pause - time.monotonic()
        if host in self._visits and wait > 0:
            self._sleep(wait)
        self._visits[host] = time.monotonic()

    def _answer(self, url: str, response: http.client.HTTPResponse) -> Fetched:
        headers, status = response.headers, response.status
        if status in _LATER:
            raise _Again(f"status {status}", _retry_after(headers["Retry-After"]))
        etag, date = headers["ETag"] or "", headers["Last-Modified"] or ""
        said = Fetched(
            body=None,
            charset=headers.get_content_charset() or "",
            etag=etag if _ETAG.fullmatch(etag) else "",
            last_modified=date if _DATE.fullmatch(date) else "",
            fresh=max(self.keep, _max_age(headers["Cache-Control"] or "")),
        )
        if status == 304:
            return said
        if status != 200:
            raise FeedError(f"{_host(url)} refuses", expected="status 200", found=status, try_="the feed's address")
        return Fetched(self._body(url, response), said.charset, said.etag, said.last_modified, said.fresh)

    def _body(self, url: str, response: http.client.HTTPResponse) -> bytes:
        coding = (response.headers["Content-Encoding"] or "identity").strip().lower()
        if coding not in ("identity", "gzip", "x-gzip"):
            raise FeedError(f"{_host(url)} packs its answer in a way nobody asked for", expected="gzip")
        unpack = None if coding == "identity" else zlib.decompressobj(wbits=31)
        parts: list[bytes] = []
        received = size = 0
        while chunk := response.read1(65536):
            received += len(chunk)
            try:
                part = chunk if unpack is None else unpack.decompress(chunk, self.most - size + 1)
            except zlib.error as error:
                raise FeedError(f"{_host(url)} sends a broken gzip", found=error) from error
            size += len(part)
            if max(size, received) > self.most:
                raise FeedError(f"{_host(url)} sends too much", expected=f"at most {bytes_text(self.most)}")
            parts.append(part)
        if response.length or (unpack is not None and not unpack.eof):
            raise _Again("it ended in the middle of its answer")
        return b"".join(parts)


class _Watch:
    """Cut a connection off at the deadline: a timeout alone never ends for a server that drips."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def add(self, connected: socket.socket) -> None:
        """Watch a connection."""
        self._sockets.append(connected)

    def end(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _cut(self) -> None:
        self.over = True
        for connected in self._sockets:
            try:
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.add(self.sock)


class _HttpsConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, watch: _Watch, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch.add(self.sock)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_HttpConnection, watch=self._watch), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def https_open(self, req: urllib.request.Request) -> Any:
        context = ssl.create_default_context()
        connection: Any = functools.partial(_HttpsConnection, watch=self._watch, context=context)
        return self.do_open(connection, req)


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200] or type(value).__name__


def _retry_after(text: str | None) -> float | None:
    """Return the seconds a server wants us to wait, at most a day."""
    if text is None:
        return None
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        return min(float(text), _DAY)
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(then - time.time(), 0.0), _DAY)


def _max_age(text: str) -> float:
    """Return the seconds for which an answer stays fresh, at most a day."""
    found = re.search(r"(?:\A|[\s,])max-age\s*=\s*\"?([0-9]{1,9})", text.lower())
    kept = found is not None and not re.search(r"no-(?:cache|store)", text.lower())
    return min(float(found[1]), _DAY) if found and kept else 0.0
