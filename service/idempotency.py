"""``Idempotency-Key`` on every POST: a repeated request gets the stored answer and has no second effect.

The key is taken in a transaction of its own before anything happens; the answer is stored in the transaction of the
effect. An error stores nothing: the same key may try again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service.auth import Submitter
from service.db import idempotency as rows
from service.db.engine import Database
from service.deps import Db


@dataclass(frozen=True)
class Answer:
    """What an effect answers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> JSONResponse:
        """As a response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class Once:
    """Runs the effect of one request at most once per key and caller."""

    def __init__(self, database: Database, principal: str, key: str | None, fingerprint: str) -> None:
        self._database = database
        self._principal = principal
        self._key = key
        self._fingerprint = fingerprint

    def about(self, content_digest: str) -> "Once":
        """The same, with what a form has brought as part of the request."""
        fingerprint = hashlib.sha256(f"{self._fingerprint}\n{content_digest}".encode()).hexdigest()
        return Once(self._database, self._principal, self._key, fingerprint)

    def run(self, effect: Callable[[Session], Answer], before: Callable[[], None] | None = None) -> Answer:
        """The stored answer of an earlier request, or that of ``effect``, run in one transaction after ``before()``.

        Raises:
            ConflictError: ``idempotency_in_progress``.
            SpecError: ``idempotency_key_reused``: the key came with another request.
        """
        if self._key is None:
            if before:
                before()
            with self._database.write() as session:
                return effect(session)
        stored = self._begin()
        if stored is not None:
            return stored
        try:
            if before:
                before()
            with self._database.write() as session:
                answer = effect(session)
                rows.complete(session, self._principal, self._key, status=answer.status, body=answer.body)
                return answer
        except BaseException:
            with self._database.write() as session:
                rows.release(session, self._principal, self._key)
            raise

    def _begin(self) -> Answer | None:
        with self._database.write() as session:
            stored = rows.begin(session, self._principal, self._key, self._fingerprint)
        if stored is None:
            return None
        headers = {"Idempotency-Replayed": "true"}
        if stored.status == 202 and "id" in stored.body:
            headers["Location"] = f"/jobs/{stored.body['id']}"
        return Answer(stored.status, stored.body, headers)


async def _once(
    request: Request,
    database: Db,
    principal: Submitter,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Repeats of the request have no second effect.")
    ] = None,
) -> Once:
    body = b"" if _is_multipart(request) else await request.body()
    query = "&".join(sorted(f"{name}={value}" for name, value in request.query_params.multi_items() if name != "wait"))
    parts = (request.method, request.url.path, query, hashlib.sha256(body).hexdigest())
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Once(database, principal.key_id or "", idempotency_key, fingerprint)


def _is_multipart(request: Request) -> bool:
    # The form parser has consumed the body: such a route adds a digest of what it got, by `about`.
    return request.headers.get("content-type", "").startswith("multipart/")


OnlyOnce = Annotated[Once, Depends(_once)]
