"""Who calls: bearer keys with a scope, or the session cookie that a browser got for one.

Without any key, and only when the service is bound to a loopback address, everybody on this machine is admin.
"""

import ipaddress
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyCookie, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from erpo_core.errors import AccessError, NotFoundError
from service.db import keys
from service.db.engine import Database
from service.deps import parts_of

SCOPES = ("read", "submit", "admin")
COOKIE = "erpo_session"

_bearer = HTTPBearer(auto_error=False, description="`erpo keys create --scope read|submit|admin`")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="Set by `POST /session`.")


@dataclass(frozen=True)
class Principal:
    """The caller. ``owner`` stands on what it submits; None is the admin of a service without keys."""

    owner: str | None
    scope: str
    key_id: str | None = None

    @property
    def is_admin(self) -> bool:
        return self.scope == "admin"

    @property
    def sees_only(self) -> str | None:
        """The owner whose jobs the caller sees; None: all jobs."""
        return None if self.is_admin else self.owner

    def check_sees(self, owner: str | None, what: str) -> None:
        """Raises NotFoundError for what belongs to somebody else: its existence is not told either."""
        if not self.is_admin and owner != self.owner:
            raise NotFoundError(f"there is no {what}")


def is_loopback(host: str) -> bool:
    """Whether a bind address reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def find_principal(database: Database, secret: str | None, *, is_local: bool) -> Principal:
    """The caller that a key belongs to.

    Raises:
        AccessError: there is no such key, or none was given where one is needed.
    """
    with database.read() as session:
        if secret:
            key = keys.find_key(session, secret)
            if key is not None:
                return Principal(owner=key.owner or key.id, scope=key.scope, key_id=key.id)
            raise AccessError("this key is not valid (any more)")
        if is_local and not keys.has_keys(session):
            return Principal(owner=None, scope="admin")
    raise AccessError("send a key: `Authorization: Bearer ...`; `erpo keys create` makes one")


def caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None,
    cookie: Annotated[str | None, Depends(_cookie)] = None,
) -> Principal:
    """The caller of a request."""
    parts = parts_of(request)
    secret = bearer.credentials if bearer else cookie
    return find_principal(parts.database, secret, is_local=is_loopback(parts.settings.host))


def _require(scope: str):
    def check(principal: Annotated[Principal, Depends(caller)]) -> Principal:
        if SCOPES.index(principal.scope) < SCOPES.index(scope):
            raise AccessError(
                f"this needs a key of scope {scope}; yours is {principal.scope}", code="insufficient_scope"
            )
        return principal

    return check


Reader = Annotated[Principal, Depends(_require("read"))]
Submitter = Annotated[Principal, Depends(_require("submit"))]
