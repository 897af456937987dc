"""Keyset pages: a cursor is the last row's key, opaque to clients."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select
from sqlalchemy.orm import Session

from erpo_core.errors import SpecError
from service.db.types import MAX_SMALL_INTEGER


@dataclass(frozen=True)
class Page:
    """Rows, and the cursor of the next page if there is one."""

    rows: list[Any]
    next_cursor: str | None


def encode_cursor(key: str | int) -> str:
    """A key as an opaque text."""
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def decode_cursor(cursor: str, kind: type) -> Any:
    """The key of a cursor.

    Raises:
        SpecError: ``invalid_cursor``.
    """
    try:
        key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error):
        key = None
    if type(key) is not kind or (kind is int and abs(key) > MAX_SMALL_INTEGER):
        raise SpecError(
            "this cursor is not one of this list",
            pointer="/query/cursor",
            mend="use the next_cursor of the page before",
            code="invalid_cursor",
        )
    return key


def read_page(s: Session, query: Select, column, *, cursor: str | None, limit: int, newest_first: bool = True) -> Page:
    """One page of ``query`` in the order of ``column``, which is unique in it."""
    if cursor is not None:
        key = decode_cursor(cursor, column.type.python_type)
        query = query.where(column < key if newest_first else column > key)
    query = query.order_by(column.desc() if newest_first else column).limit(limit + 1)
    rows = list(s.scalars(query))
    following = encode_cursor(getattr(rows[limit - 1], column.key)) if len(rows) > limit else None
    return Page(rows[:limit], following)
