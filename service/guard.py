"""What every request passes before any route: host, origin, size and type of the body; and the headers of every answer.

One ASGI middleware, outermost, so that even an unexpected error leaves as a problem document with all headers.
"""

import logging
from urllib.parse import urlsplit
from uuid import uuid4

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import problem, problem_response
from service.settings import Settings

log = logging.getLogger(__name__)

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": CSP,
}
_MUTATIONS = {"POST", "PUT", "PATCH", "DELETE"}
_BODY_TYPES = {"application/json", "multipart/form-data"}


class GuardMiddleware:
    """Refuses what no route should see."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = {host.lower() for host in settings.allowed_hosts}
        self.max_body_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = request_id = uuid4().hex
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope, request.headers)
        if refusal:
            code, detail = refusal
            body = problem(code, detail, instance=scope["path"], request_id=request_id, errors=_errors(code, detail))
            response = problem_response(body)
            await response(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, self._limited(receive), send_with_headers)
        except Exception:
            log.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            if started:
                raise
            body = problem(
                "internal",
                "an unexpected error; the log has it under this request_id",
                instance=scope["path"],
                request_id=request_id,
            )
            await problem_response(body)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[str, str] | None:
        host = headers.get("host", "")
        if "*" not in self.hosts and _host_name(host) not in self.hosts:
            return "unknown_host", f"this service does not answer for host {host!r}; see ERPO_ALLOWED_HOSTS"
        if b"%00" in scope.get("query_string", b"") or "\0" in scope["path"]:
            return "bad_request", "the address holds a NUL character"
        if scope["method"] not in _MUTATIONS:
            return None
        if not _same_origin(headers, host):
            return "cross_site", "a page of another site may not change anything here"
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind and kind not in _BODY_TYPES:
            return "unsupported_media_type", f"send application/json (uploads: multipart/form-data), not {kind}"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            return "body_too_large", f"the body may have {self.max_body_bytes} bytes"
        has_body = length != "0" or "transfer-encoding" in headers
        if has_body and not kind:
            return "unsupported_media_type", "name the body's Content-Type: application/json or multipart/form-data"
        return None

    def _limited(self, receive: Receive) -> Receive:
        left = self.max_body_bytes

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body may have {self.max_body_bytes} bytes")
            return message

        return limited


def _errors(code: str, detail: str) -> list[dict[str, str]]:
    """The entry of a header that is wrong."""
    if code != "unsupported_media_type":
        return []
    mend = "send the header Content-Type: application/json (uploads: multipart/form-data)"
    return [{"pointer": "/header/content-type", "code": code, "message": detail, "mend": mend}]


def _host_name(host: str) -> str:
    """``localhost:8000`` -> ``localhost``, ``[::1]:8000`` -> ``[::1]``."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _same_origin(headers: Headers, host: str) -> bool:
    """Browsers always send one of both on a mutation; other clients send neither and carry no cookie."""
    if headers.get("sec-fetch-site", "none") == "cross-site":
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == host.strip().lower()
