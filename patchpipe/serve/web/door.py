"""What every request passes before anything of it is read: its name, who sends it, whether there is room."""

from __future__ import annotations

import logging
import re
import secrets
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchpipe.serve.refusals import Refusal
from patchpipe.serve.service import Service
from patchpipe.serve.settings import is_loopback
from patchpipe.serve.spans import TRACEPARENT
from patchpipe.serve.web.answers import refuse

logger = logging.getLogger("patchpipe.serve")

_NAME = re.compile(r"[\w.-]{1,64}")
_GUARDED = ("/v1/", "/metrics")
_PAINTS = ("/v1/images/generations", "/v1/images/edits", "/v1/videos")
_QUIET = ("/healthz", "/readyz", "/metrics", "/v1/state")


class Door:
    """Names every request, turns away who may not come in, and tells the log.

    Args:
        app: What is behind it.
        service: The service.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began, status = Headers(scope=scope), monotonic(), 500
        name = secrets.token_hex(12)
        traceparent = headers.get("traceparent", "")
        scope.setdefault("state", {})["id"] = name
        scope["state"]["traceparent"] = traceparent if TRACEPARENT.fullmatch(traceparent) else None
        asked = headers.get("x-request-id", "")
        shown = asked if _NAME.fullmatch(asked) else f"req_{name}"

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = shown
            await send(message)

        try:
            self._check(scope, headers)
        except Refusal as refusal:
            answer = refuse(refusal)
            if refusal.status == 401:
                answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, named)
        else:
            await self._app(scope, receive, named)
        finally:
            if scope["path"] not in _QUIET:
                fields = {"method": scope["method"], "path": scope["path"], "status": status, "request": name}
                given = {} if shown != asked else {"given": shown}
                logger.info("http", extra={"fields": {**fields, **given, "seconds": monotonic() - began}})

    def _check(self, scope: Scope, headers: Headers) -> None:
        settings, path = self._service.settings, scope["path"]
        if not settings.api_keys:
            _check_host(headers.get("host", ""), settings.host)
            self._check_origin(headers)
        elif path.startswith(_GUARDED) and scope["method"] != "OPTIONS":
            self._check_key(headers)
        length, most = headers.get("content-length", ""), settings.limits.body
        if length.isdigit() and int(length) > most:
            raise Refusal(413, f"the body has {length[:20]} bytes: {most:,} are allowed", code="body_too_large")
        if scope["method"] == "POST" and path in _PAINTS:
            self._service.check_room()

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not self._service.settings.admits(key.strip() if scheme.lower() == "bearer" else None):
            message = "this service needs a key: send Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key")

    def _check_origin(self, headers: Headers) -> None:
        """Without keys, a page from elsewhere in somebody's browser must not paint on this machine."""
        origin = headers.get("origin")
        if origin is None or origin in self._service.settings.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(403, "pages of other origins may not use this service (--cors-origin)", code="wrong_origin")


def _check_host(given: str, host: str) -> None:
    """Without keys, a name that a stranger has pointed at this machine is not this machine's."""
    name = urlsplit(f"//{given}").hostname or ""
    if name != host and not is_loopback(name):
        raise Refusal(421, f"this service is not called {given[:80]!r}", code="wrong_host")
