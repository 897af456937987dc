"""Liveness, readiness, and numbers for Prometheus."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.auth import Reader
from service.db import claims as claim_rows
from service.deps import AppSettings, Bell, Db
from service.errors import database_errors
from service.prometheus import render_metrics
from service.schemas.common import problems
from service.schemas.registries import Ready
from service.workerview import is_alive

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready, "description": "Jobs cannot be taken"}})
def readyz(database: Db, bell: Bell, settings: AppSettings) -> Any:
    """Database, broker and workers. Without the database: 503. Without broker or worker jobs are taken, and wait."""
    checks: dict[str, Any] = {"database": "ok", "broker": "ok", "workers": 0}
    try:
        with database.read() as session:
            rows = claim_rows.list_workers(session)
            checks["workers"] = sum(is_alive(row, settings) for row in rows)
    except database_errors() as error:
        checks["database"] = type(error).__name__
    if not bell.broker_url:
        checks["broker"] = "none"
    elif not bell.is_reachable():
        checks["broker"] = "unreachable"
    is_ready = checks["database"] == "ok"
    is_whole = is_ready and checks["broker"] == "ok" and checks["workers"]
    status = "ready" if is_whole else "degraded" if is_ready else "unavailable"
    return JSONResponse({"status": status, "checks": checks}, 200 if is_ready else 503)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **problems(401)})
def metrics(database: Db, settings: AppSettings, principal: Reader) -> Response:
    """Jobs by kind and status, live workers: for Prometheus."""
    with database.read() as session:
        content = render_metrics(session, settings)
    return Response(content, headers={"Cache-Control": "no-store"}, media_type=CONTENT_TYPE_LATEST)
