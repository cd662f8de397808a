"""What a request may bring, and what browsers may do with a page."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nervure._kit import NervureError

_LONGEST_BODY = 16 * 1024
_LONGEST_PATH = 2048
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    # With no referrer at all a browser hides where its own forms come from, too.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Refused(NervureError):
    """Report a request that this server does not answer."""

    status = 403


class Guard:
    """Bound what a request may bring, and tell browsers what a page may do.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        received = 0

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _LONGEST_BODY:
                raise TooLarge("the request is too large", expected=f"at most {_LONGEST_BODY} bytes")
            return message

        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > _LONGEST_BODY:
            await PlainTextResponse("the request is too large", status_code=413)(scope, receive, sending)
        elif len(scope["raw_path"] or b"") + len(scope["query_string"]) > _LONGEST_PATH:
            await PlainTextResponse("the address is too long", status_code=414)(scope, receive, sending)
        else:
            await self._app(scope, receiving, sending)


class TooLarge(Refused):
    """Report a request that is larger than it said."""

    status = 413
