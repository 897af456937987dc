"""Idempotency keys: the row is taken before the effect, and completed with the answer in the effect's transaction."""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert as insert_postgresql
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.orm import Session

from erpo_core.errors import ConflictError, SpecError
from service.db.models import IdempotencyKey
from service.db.types import now

KEPT = timedelta(hours=24)
TAKEN_OVER_AFTER = timedelta(seconds=60)


def begin(s: Session, principal: str, key: str, fingerprint: str) -> IdempotencyKey | None:
    """Take a key: None if it is the caller's now, or the row with the stored answer.

    Raises:
        ConflictError: ``idempotency_in_progress``: another request with this key runs.
        SpecError: ``idempotency_key_reused``: the key came with another request before.
    """
    s.execute(delete(IdempotencyKey).where(IdempotencyKey.expires_at < now()))
    values = {
        "principal": principal,
        "key": key,
        "fingerprint": fingerprint,
        "created_at": now(),
        "expires_at": now() + KEPT,
    }
    insert = insert_postgresql if s.get_bind().dialect.name == "postgresql" else insert_sqlite
    inserted = insert(IdempotencyKey).values(**values).on_conflict_do_nothing().returning(IdempotencyKey.key)
    if s.scalar(inserted) is not None:
        return None
    row = s.get(IdempotencyKey, (principal, key), with_for_update=True)
    if row is None:
        raise _in_progress()
    if row.fingerprint != fingerprint:
        raise SpecError(
            "this Idempotency-Key came with another request",
            pointer="/header/Idempotency-Key",
            mend="send a new key with a new request",
            code="idempotency_key_reused",
        )
    if row.status is not None:
        return row
    if now() - row.created_at > TAKEN_OVER_AFTER:
        row.created_at = now()
        return None
    raise _in_progress()


def complete(s: Session, principal: str, key: str, *, status: int, body: dict[str, Any]) -> None:
    """Store the answer of a successful effect, in its transaction.

    Raises:
        ConflictError: another request took the key over and was faster; the effect must not be committed.
    """
    row = s.get(IdempotencyKey, (principal, key), with_for_update=True, populate_existing=True)
    if row is None or row.status is not None:
        raise _in_progress()
    row.status, row.body = status, body


def release(s: Session, principal: str, key: str) -> None:
    """Give back a key whose effect did not happen."""
    row = s.get(IdempotencyKey, (principal, key))
    if row is not None and row.status is None:
        s.delete(row)


def _in_progress() -> ConflictError:
    return ConflictError("a request with this Idempotency-Key is being worked on", code="idempotency_in_progress")
