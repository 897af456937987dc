"""The machine-readable description, and a page that shows it without anything from another host."""

from typing import Any

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from service.reference import docs_html, docs_style
from service.schemas.common import Problem

_DESCRIPTION = """
Train reasoning language models with ERPO, evaluate them, and see token by token where they hesitate.

* `POST /jobs/train`, `/jobs/evaluate`, `/analyze/entropy` queue a job; `?dry_run=true` only validates and estimates.
* `GET /jobs/{id}/events` with `Accept: text/event-stream` follows it; `GET /runs/{id}` holds what it computed.
* Every error is a problem document (RFC 9457); `errors[]` names each wrong place by JSON pointer, and the mend.
* Every POST takes an `Idempotency-Key`. Lists are pages: `limit`, `cursor`, `next_cursor`.
"""


def install_openapi(app: FastAPI) -> None:
    """Let ``app`` describe itself, with our problem document in place of the framework's validation error."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
            app.openapi_schema = _with_problems(schema)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]


def add_docs(app: FastAPI) -> None:
    """``/docs``: every route with its parameters and body, made from the OpenAPI document on the server."""

    @app.get("/docs/style.css", include_in_schema=False)
    def style() -> Response:
        return Response(docs_style(), media_type="text/css")

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_html(app.openapi()))


def _with_problems(schema: dict[str, Any]) -> dict[str, Any]:
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    model = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= model.pop("$defs", {}) | {"Problem": model}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path in schema["paths"].values():
        for operation in path.values():
            invalid = operation.get("responses", {}).get("422")
            if invalid is not None:
                invalid["description"] = "The request cannot be honoured as written; `errors` says where and the mend"
                invalid["content"] = content
    return schema
