"""The server: routes, guards, and pages that are rendered once a change and served from memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import hashlib
import hmac
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from nervure._kit import NervureError, UnknownId, UsageError
from nervure.app.library import Library
from nervure.web import statics
from nervure.web.guard import Guard, Refused
from nervure.web.launcher import Launcher
from nervure.web.pages import Pages

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_MOST_PAGES = 512
_MOST_STREAMS = 256
_LOOK_SECONDS = 1.0
_PULSE_SECONDS = 15.0
# How long a reader waits for the newest version of a page before getting the one before.
_PATIENCE = 0.05
# A page rests ten times as long as it took to render: 200 readers then wait for the renderer a tenth of the time.
_RESTS = 10.0
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Rendered:
    """Hold a page as it is sent.

    Args:
        plain: The bytes.
        packed: The bytes, gzipped.
        tag: Names them.
        version: Of the library they show.
        rest: Until when it is good enough whatever changes, so that rendering takes a small share of the time.
    """

    plain: bytes
    packed: bytes
    tag: str
    version: int
    rest: float = 0.0

    @classmethod
    def of(cls, make: Callable[[], str], *, version: int = 0, rests: float = 0.0) -> Rendered:
        """Render a page and make it ready to be sent.

        Args:
            make: Returns its text.
            version: Of the library it shows.
            rests: How many times as long as it took to make it is good enough.

        Returns:
            The page.
        """
        begun = time.monotonic()
        plain = make().encode()
        packed, tag = gzip.compress(plain, 6, mtime=0), f'"{hashlib.sha256(plain).hexdigest()[:20]}"'
        now = time.monotonic()
        return cls(plain, packed, tag, version, now + rests * (now - begun))


class Server:
    """Answer requests.

    Args:
        library: What there is to show.
        launcher: Starts runs; None where pages may only be read.
        hosts: Names this server may be called by.
    """

    def __init__(
        self, library: Library, *, launcher: Launcher | None = None, hosts: tuple[str, ...] = LOOPBACK
    ) -> None:
        self._library, self._launcher, self._hosts = library, launcher, hosts
        self._secret = secrets.token_urlsafe(24) if launcher is not None else ""
        self._pages = Pages(library, secret=self._secret)
        self._kept: OrderedDict[str, Rendered] = OrderedDict()
        self._rendering: dict[str, asyncio.Task[Rendered]] = {}
        self._version = 0
        self._changed = asyncio.Condition()
        self._streams = 0
        # One at a time: drawing holds the interpreter anyway, and matplotlib's settings belong to no thread.
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nervure-page")

    def app(self) -> Starlette:
        """Return the ASGI application."""
        pages = self._pages
        routes = [
            self._page("/", lambda request: pages.catalogue(**_filters(request))),
            self._page("/paper/{name}", lambda request: pages.paper(request.path_params["name"])),
            self._page("/runs", lambda _: pages.runs()),
            self._page("/run/{name}", lambda request: pages.run(request.path_params["name"])),
            self._page("/run/{name}/part", lambda request: pages.run_part(request.path_params["name"]), rests=0),
            Route("/run/{name}/events", self._run_events),
            self._page("/leaderboards", lambda _: pages.leaderboards()),
            self._page("/networks", lambda _: pages.audits()),
            self._page("/network/{name}", lambda request: pages.network(request.path_params["name"])),
            self._page("/feed", lambda request: pages.feed(**_of_feed(request))),
            self._page("/side", lambda request: pages.side(request.query_params.getlist("run"))),
            Route("/start", self._start, methods=["POST"]),
            Route("/started/{name}", self._started),
            Route("/started/{name}/events", self._started_events),
            Route("/started/{name}/stop", self._stop, methods=["POST"]),
            Route("/static/{name}", self._static),
        ]
        guards = [
            Middleware(Guard),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(self._hosts), www_redirect=False),
        ]
        handlers = {NervureError: self._problem, 404: self._missing}
        return Starlette(routes=routes, middleware=guards, exception_handlers=handlers, lifespan=self._lifespan)  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._version = await asyncio.to_thread(self._look)
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            if self._launcher is not None:
                await self._launcher.close()
            self._renderer.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> int:
        """Return a number that changes when there is something new to show."""
        newest = [self._library.pages(kind) for kind in ("audit", "landscape")]
        return hash((self._library.refresh(), self._library.store.papers.count(), str(newest)))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                version = await asyncio.to_thread(self._look)
            except NervureError:
                continue  # a store that is busy or gone for a moment is asked again; the pages stay as they were
            if version != self._version:
                self._version = version
                async with self._changed:
                    self._changed.notify_all()

    def _page(self, path: str, make: Callable[[Request], str], *, rests: float = _RESTS) -> Route:
        async def answer(request: Request) -> Response:
            key = f"{request.url.path}?{request.url.query}"
            return _respond(request, await self._rendered(key, lambda: make(request), rests))

        return Route(path, answer)

    async def _rendered(self, key: str, make: Callable[[], str], rests: float) -> Rendered:
        """Return a page from memory if nothing has changed, else render it, once for all who wait."""
        kept = self._kept.get(key)
        if kept is not None and (kept.version == self._version or time.monotonic() < kept.rest):
            self._kept.move_to_end(key)
            return kept
        task = self._rendering.get(key)
        if task is None:
            task = asyncio.create_task(self._render(key, make, rests))
            self._rendering[key] = task
        if kept is not None:
            done, _ = await asyncio.wait({task}, timeout=_PATIENCE)
            if not done:
                return kept
        return await asyncio.shield(task)

    async def _render(self, key: str, make: Callable[[], str], rests: float) -> Rendered:
        version = self._version
        try:
            work = asyncio.get_running_loop().run_in_executor
            page = await work(self._renderer, lambda: Rendered.of(make, version=version, rests=rests))
        finally:
            del self._rendering[key]
        self._kept[key] = page
        self._kept.move_to_end(key)
        while len(self._kept) > _MOST_PAGES:
            self._kept.popitem(last=False)
        return page

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        page = _static_files().get(name)
        if page is None:
            raise UnknownId("there is no such file")
        return _respond(request, page, kind=_TYPES[Path(name).suffix], cache="max-age=600")

    async def _start(self, request: Request) -> Response:
        launcher, form = await self._form(request)
        started = launcher.start(form.get("what", ""), quick=form.get("quick") == "yes")
        return RedirectResponse(f"/started/{started.id}", status_code=303)

    async def _stop(self, request: Request) -> Response:
        launcher, _ = await self._form(request)
        name = request.path_params["name"]
        await launcher.stop(name)
        return RedirectResponse(f"/started/{name}", status_code=303)

    async def _started(self, request: Request) -> Response:
        job = self._following().get(request.path_params["name"])
        return _html(self._pages.render("started.html", title=job.title, job=job))

    async def _form(self, request: Request) -> tuple[Launcher, dict[str, str]]:
        """Return the fields of a form this server made itself.

        Raises:
            Refused: If another site, or nobody, made it.
        """
        launcher = self._following()
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        body = await request.body()
        form = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        same = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        if not same or site not in ("same-origin", "none"):
            raise Refused("another site sent this form")
        if not hmac.compare_digest(form.get("secret", "").encode(), self._secret.encode()):
            raise Refused("the form is not this server's, or of an earlier start of it", try_="loading the page again")
        return launcher, form

    def _following(self) -> Launcher:
        if self._launcher is None:
            raise Refused("this server only shows; it starts nothing", try_="nervure run at a terminal")
        return self._launcher

    async def _run_events(self, request: Request) -> Response:
        name = request.path_params["name"]
        known = len((await asyncio.to_thread(self._library.run, name)).headers)

        async def changes() -> AsyncIterator[str]:
            nonlocal known
            while True:
                async with self._changed:
                    await self._changed.wait()
                count = len((await asyncio.to_thread(self._library.run, name)).headers)
                if count != known:
                    known = count
                    yield json.dumps({"jobs": count})

        return self._stream(changes())

    async def _started_events(self, request: Request) -> Response:
        launcher = self._following()
        job = launcher.get(request.path_params["name"])

        async def changes() -> AsyncIterator[str]:
            known = -1
            while True:
                known = await launcher.change(job, known)
                if job.ended:
                    self._version = await asyncio.to_thread(self._look)
                address = f"/run/{job.run}" if job.run else ""
                yield json.dumps({**job.to_json(), "run": address})
                if job.ended:
                    return

        return self._stream(changes())

    def _stream(self, changes: AsyncIterator[str]) -> Response:
        if self._streams >= _MOST_STREAMS:
            return PlainTextResponse("too many pages follow runs", status_code=503)

        async def lines() -> AsyncIterator[str]:
            self._streams += 1
            following = asyncio.ensure_future(anext(changes))
            try:
                yield "retry: 3000\n\n"
                while True:
                    # A reader that has gone is noticed when something is sent.
                    done, _ = await asyncio.wait({following}, timeout=_PULSE_SECONDS)
                    if not done:
                        yield ": still here\n\n"
                        continue
                    try:
                        data = following.result()
                    except StopAsyncIteration:
                        return
                    yield f"data: {data}\n\n"
                    following = asyncio.ensure_future(anext(changes))
            finally:
                following.cancel()
                self._streams -= 1

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _problem(self, request: Request, error: NervureError) -> Response:
        code = error.status if isinstance(error, Refused) else 404 if isinstance(error, UnknownId) else 400
        code = code if isinstance(error, UsageError | UnknownId | Refused) else 503
        return _html(self._pages.problem(str(error)), code=code)

    async def _missing(self, request: Request, error: Exception) -> Response:
        return _html(self._pages.problem("There is no such page."), code=404)


def _filters(request: Request) -> dict[str, str]:
    given = request.query_params
    return {
        "query": given.get("q", ""),
        "family": given.get("family", ""),
        "state": given.get("state", ""),
        "outcome": given.get("outcome", ""),
    }


def _of_feed(request: Request) -> dict[str, str]:
    return {"query": request.query_params.get("q", ""), "family": request.query_params.get("family", "")}


def _respond(request: Request, page: Rendered, *, kind: str = "text/html", cache: str = "no-cache") -> Response:
    headers = {"etag": page.tag, "cache-control": cache, "vary": "accept-encoding"}
    if request.headers.get("if-none-match") == page.tag:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(page.packed, media_type=kind, headers={**headers, "content-encoding": "gzip"})
    return Response(page.plain, media_type=kind, headers=headers)


def _html(text: str, *, code: int = 200) -> Response:
    return Response(text, status_code=code, media_type="text/html", headers={"cache-control": "no-store"})


@functools.cache
def _static_files() -> dict[str, Rendered]:
    """Return the files pages load, read once; only these names are answered."""
    return {name: Rendered.of(partial(str, text)) for name, text in statics.files().items()}
