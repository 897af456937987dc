"""Pages, problems and times."""

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field

Row = TypeVar("Row")


class Page(BaseModel, Generic[Row]):
    """A page of a list."""

    data: list[Row]
    next_cursor: str | None = Field(None, description="Give it as `cursor` to get the next page.")
    has_more: bool = False


class ProblemError(BaseModel):
    """One wrong place of a request."""

    pointer: str = Field(description="JSON pointer into the body; `/query/...` for a query parameter.")
    code: str
    message: str
    mend: str = Field(description="What to write instead.")


class Problem(BaseModel):
    """Every error (RFC 9457, `application/problem+json`)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable, for programs: `invalid_spec`, `unknown_reference`, `not_found`, ...")
    request_id: str
    errors: list[ProblemError] = []
    state: str | None = Field(None, description="The job's status, where that forbids the action.")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route for its error statuses."""
    return {
        status: {"description": _MEANING[status], "content": {"application/problem+json": {"schema": _PROBLEM}}}
        for status in statuses
    }


_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_MEANING = {
    400: "The cursor or the request is malformed",
    401: "No valid key",
    403: "The key's scope is too small",
    404: "The id names nothing that the caller may see",
    409: "The job's state forbids it, or the same idempotency key is in flight",
    413: "The body is too large",
    416: "The range lies outside",
    422: "The request cannot be honoured as written; `errors` names each place and the mend",
    429: "Too many jobs are waiting",
    501: "A library that this format needs is not installed",
    503: "Database out of reach",
}
