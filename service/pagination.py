"""Keyset pagination: ``limit`` (50, at most 200) and an opaque ``cursor``; ``{data, next_cursor, has_more}``."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from fastapi import Query

DEFAULT_LIMIT = 50
MAX_LIMIT = 200

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Rows of a page.")]
Cursor = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before.")]


def page_json(rows: Iterable[Any], next_cursor: str | None, shape: Callable[[Any], dict]) -> dict[str, Any]:
    """A page in the API's shape."""
    return {"data": [shape(row) for row in rows], "next_cursor": next_cursor, "has_more": next_cursor is not None}
