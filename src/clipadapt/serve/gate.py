"""What every request passes before a route sees it, and every answer on its way out: an ASGI middleware.

Request id, API key, number of requests, size of headers and body, time for the body; then security headers, one line
in the log and the metrics. Nothing of a body is read before the key and the sizes are known to be right.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipadapt.serve.limits import Settings, is_known
from clipadapt.serve.log import log
from clipadapt.serve.metrics import Metrics

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NEVER_REFUSED = ("/healthz", "/metrics")  # for being busy
_LINGER = 2.0  # seconds in which the rest of a refused body is read and thrown away, so that the answer arrives

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

# The `type` of an error, for programs.
TYPES = {
    401: "authentication_error",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    431: "too_large",
    500: "server_error",
    503: "overloaded",
    504: "timeout",
}


def error_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """{"error": {"message": one sentence, "type": …}}"""
    message = message.encode(errors="replace").decode()  # a lone surrogate, quoted from a request, cannot be sent
    kind = TYPES.get(status, "invalid_request_error")
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


class Gate:
    """See the module's docstring. While `app.state.draining`, every answer closes its connection."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        body = _Body(receive, headers, self.settings)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                outgoing = MutableHeaders(scope=message)
                outgoing["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    outgoing.setdefault(name, value)
                outgoing.setdefault("cache-control", "no-store")
                if scope["app"].state.draining or not body.done:
                    outgoing["connection"] = "close"
            elif not message.get("more_body") and not body.done:
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": "http.response.body"}
            await send(message)

        refusal = self._refusal(scope, headers)
        self.running += 1
        try:
            await (refusal or self.app)(scope, body.receive, answer)
        except Exception:
            log.exception("A request failed; this is a defect.", extra={"fields": {"id": request_id}})
            if not status:
                await error_answer(500, f"Something went wrong; see the log under {request_id}.")(
                    scope, body.receive, answer
                )
        finally:
            self.running -= 1
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.count("clipadapt_requests_total", route=route, status=str(status))
            self.metrics.observe("clipadapt_request_seconds", seconds, route=route)
            fields = {
                "id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round(1000 * seconds, 1),
                "bytes": body.size,
                "client": (scope.get("client") or ["unknown"])[0],
            }
            log.info("request", extra={"fields": fields})

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """The answer to a request that goes no further."""
        settings, path = self.settings, scope["path"]
        if sum(len(name) + len(value) for name, value in headers.raw) > settings.max_headers:
            return error_answer(431, f"The headers have more than {settings.max_headers:,} bytes.")
        needs_key = settings.keys and not (path in ("/", "/healthz") or path.startswith("/page/"))
        if needs_key and not is_known(_key(headers), settings.keys):
            sentence = "An API key is needed, as `Authorization: Bearer KEY`."
            return error_answer(401, sentence, {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return error_answer(400, "The header Content-Length must be a number.")
        if int(length[:20]) > settings.max_body:
            return error_answer(413, _too_large(settings))
        if self.running >= settings.queue and path not in _NEVER_REFUSED:
            return error_answer(503, "The server is busy; try again in a moment.", {"retry-after": "1"})
        return None


class _Body:
    """A request's body, counted and timed while it is read."""

    def __init__(self, receive: Receive, headers: Headers, settings: Settings) -> None:
        self._receive, self._settings = receive, settings
        self._until = asyncio.get_running_loop().time() + settings.deadline
        self.size = 0
        self.done = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self._waits = "expect" in headers  # the client sends nothing unless it is asked to

    async def receive(self) -> Message:
        if self.done:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {self._settings.deadline:g} seconds.") from None
        self.size += len(message.get("body", b""))
        self.done = not message.get("more_body", False)
        if self.size > self._settings.max_body:
            raise HTTPException(413, _too_large(self._settings))
        return message

    async def discard(self) -> None:
        """Read on for a while, since closing a connection with unread bytes would destroy the answer on its way."""
        if self._waits and not self.size:
            return
        try:
            async with asyncio.timeout(_LINGER):
                while not self.done:
                    self.done = not (await self._receive()).get("more_body", False)
        except TimeoutError:
            pass


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _too_large(settings: Settings) -> str:
    return f"The body has more than {settings.max_body / 1e6:g} MB, which is the limit."
