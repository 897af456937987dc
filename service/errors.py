"""Every error as ``application/problem+json`` (RFC 9457), and the one table from error codes to HTTP statuses."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from erpo_core.errors import (
    AccessError,
    ConflictError,
    ErpoError,
    NotFoundError,
    SpecError,
    UnavailableError,
)
from service.validation import describe_errors

log = logging.getLogger(__name__)

STATUS_OF_CODE: dict[str, int] = {
    "bad_request": 400,
    "invalid_cursor": 400,
    "unauthenticated": 401,
    "insufficient_scope": 403,
    "cross_site": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "illegal_transition": 409,
    "fenced": 409,
    "idempotency_in_progress": 409,
    "events_expired": 410,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "range_not_satisfiable": 416,
    "unknown_host": 421,
    "invalid_spec": 422,
    "invalid_request": 422,
    "invalid_dataset": 422,
    "unknown_reference": 422,
    "unknown_model": 422,
    "forbidden_path": 422,
    "quota_exceeded": 422,
    "idempotency_key_reused": 422,
    "queue_full": 429,
    "corrupt_trace": 500,
    "internal": 500,
    "format_unavailable": 501,
    "unavailable": 503,
}
_STATUS_OF_CLASS: tuple[tuple[type[ErpoError], int], ...] = (
    (SpecError, 422),
    (NotFoundError, 404),
    (ConflictError, 409),
    (AccessError, 401),
    (UnavailableError, 503),
)
_CODE_OF_STATUS = {
    400: "bad_request",
    401: "unauthenticated",
    403: "insufficient_scope",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "invalid_request",
}
PROBLEM = "application/problem+json"


class RequestError(ErpoError):
    """The request itself is refused before any job is looked at: its headers, size, cursor or range."""

    code = "bad_request"


def status_of(error: ErpoError) -> int:
    """The HTTP status of an error: by its code, else by its class, else 500."""
    if error.code in STATUS_OF_CODE:
        return STATUS_OF_CODE[error.code]
    return next((status for cls, status in _STATUS_OF_CLASS if isinstance(error, cls)), 500)


def problem(
    code: str,
    detail: str,
    *,
    status: int | None = None,
    instance: str = "",
    request_id: str = "",
    errors: list[dict[str, str]] | None = None,
    **extensions: Any,
) -> dict[str, Any]:
    """A problem document as plain JSON values."""
    status = status or STATUS_OF_CODE.get(code, 500)
    return {
        "type": f"urn:erpo:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "request_id": request_id,
        "errors": errors or [],
        **extensions,
    }


def problem_response(body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that carries a problem document."""
    extra = dict(headers or {})
    if body["status"] == 401:
        extra.setdefault("WWW-Authenticate", "Bearer")
    if body["status"] in (429, 503) or body["code"] == "idempotency_in_progress":
        extra.setdefault("Retry-After", "2")
    return JSONResponse(body, body["status"], headers=extra, media_type=PROBLEM)


def problem_of(error: ErpoError, request: Request) -> dict[str, Any]:
    """The problem document of one of our own errors."""
    status = status_of(error)
    errors, extensions = [], {}
    if isinstance(error, SpecError):
        errors = [{"pointer": error.pointer, "code": error.code, "message": error.message, "mend": error.mend}]
    if isinstance(error, ConflictError) and error.state:
        extensions["state"] = error.state
    return problem(error.code, error.message, status=status, errors=errors, **_place(request), **extensions)


def database_errors() -> tuple[type[Exception], ...]:
    """What the database layer raises while the database is out of reach."""
    return OperationalError, InterfaceError, PoolTimeout, UnavailableError, ConnectionError


def install_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` a problem document, those of the framework included."""

    @app.exception_handler(ErpoError)
    def _own(request: Request, error: ErpoError) -> JSONResponse:
        if status_of(error) >= 500:
            log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
        return problem_response(problem_of(error, request))

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = describe_errors(error.errors(), error.body)
        code = "invalid_spec" if any(_in_body(item) for item in error.errors()) else "invalid_request"
        detail = "; ".join(f"{item['pointer'] or 'body'}: {item['message']}" for item in errors[:3])
        return problem_response(problem(code, detail, errors=errors, **_place(request)))

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODE_OF_STATUS.get(error.status_code, "internal" if error.status_code >= 500 else "bad_request")
        detail = _http_detail(error, request)
        body = problem(code, detail, status=error.status_code, **_place(request))
        return problem_response(body, dict(error.headers or {}))

    def _away(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, error)
        return problem_response(problem("unavailable", "the database is out of reach; try again", **_place(request)))

    for cls in database_errors():
        if cls is not UnavailableError:
            app.add_exception_handler(cls, _away)


def _place(request: Request) -> dict[str, str]:
    return {"instance": request.url.path, "request_id": getattr(request.state, "request_id", "")}


def _in_body(item: dict[str, Any]) -> bool:
    return bool(item.get("loc")) and item["loc"][0] == "body"


def _http_detail(error: HTTPException, request: Request) -> str:
    if error.status_code == 404 and error.detail == "Not Found":
        return f"there is no {request.url.path}; the routes are listed at /docs"
    if error.status_code == 405 and error.detail == "Method Not Allowed":
        return f"{request.method} is not allowed on {request.url.path}"
    return str(error.detail)
