"""API keys: shown once, stored as a hash. A key has 256 random bits, so a plain hash cannot be guessed."""

import hashlib
import secrets

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from service.db.ids import new_id
from service.db.models import ApiKey
from service.db.types import now


def create_key(s: Session, *, scope: str, owner: str | None = None, name: str | None = None) -> tuple[ApiKey, str]:
    """A new key and its secret, which is not to be had again."""
    secret = f"erpo_{secrets.token_urlsafe(32)}"
    key = ApiKey(id=new_id("key"), digest=_digest(secret), scope=scope, owner=owner, name=name)
    s.add(key)
    return key, secret


def find_key(s: Session, secret: str) -> ApiKey | None:
    """The key of a secret. Looked up by hash: the time it takes tells nothing about other keys."""
    return s.scalars(select(ApiKey).where(ApiKey.digest == _digest(secret), ApiKey.revoked_at.is_(None))).one_or_none()


def has_keys(s: Session) -> bool:
    """Whether any key is valid."""
    return bool(s.scalar(select(exists().where(ApiKey.revoked_at.is_(None)))))


def list_keys(s: Session) -> list[ApiKey]:
    """Every key, newest first; never a secret."""
    return list(s.scalars(select(ApiKey).order_by(ApiKey.id.desc()).limit(1000)))


def revoke_key(s: Session, key_id: str) -> bool:
    """End a key; false if there is none."""
    key = s.get(ApiKey, key_id)
    if key is None:
        return False
    key.revoked_at = key.revoked_at or now()
    return True


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
