"""Browser sessions: a key becomes a cookie, because page loads and EventSource cannot send a bearer key."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.auth import COOKIE, Reader, find_principal, is_loopback
from service.db import keys
from service.deps import AppSettings, Db
from service.schemas.common import problems
from service.schemas.registries import SessionInfo, SessionRequest

router = APIRouter(prefix="/session", tags=["session"])
_SECONDS = 7 * 24 * 3600


@router.post("", response_model=SessionInfo, responses=problems(401, 422))
def open_session(request: Request, order: SessionRequest, database: Db) -> Any:
    """Exchange a key for a cookie of the same scope (HttpOnly, SameSite=Strict)."""
    principal = find_principal(database, order.key, is_local=False)
    info = {"scope": principal.scope, "owner": principal.owner, "auth_required": True}
    response = JSONResponse(info, headers={"Cache-Control": "no-store"})
    is_secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, order.key, max_age=_SECONDS, httponly=True, samesite="strict", secure=is_secure)
    return response


@router.get("", response_model=SessionInfo, responses=problems(401))
def get_session(principal: Reader, database: Db, settings: AppSettings) -> Any:
    """Who the caller is."""
    with database.read() as session:
        required = not is_loopback(settings.host) or keys.has_keys(session)
    return {"scope": principal.scope, "owner": principal.owner, "auth_required": required}


@router.delete("", status_code=204)
def close_session() -> Response:
    """Forget the cookie."""
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response
