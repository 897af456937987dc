"""Answers of an evaluation, counted problem by problem."""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Integer, and_, case, cast, func, not_, select
from sqlalchemy.orm import Session

from service.db.measured import Completion
from service.db.paging import Page, decode_cursor, encode_cursor


@dataclass(frozen=True)
class ProblemCounts:
    """One problem: ``num_right`` of ``num_samples`` answers credited, ``num_boxed`` with an answer in a box."""

    prompt_id: str
    group: int
    num_samples: int
    num_right: int
    num_boxed: int
    num_truncated: int
    num_tokens: int
    prompt: str | None = None
    gold: str | None = None
    level: str | None = None
    subject: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return asdict(self)


def count_problems(s: Session, run_id: str, *, truncated_boxed: str) -> list[ProblemCounts]:
    """Every problem of an evaluation, without its text, in the order of the ids."""
    query = _counts(run_id, truncated_boxed).order_by(Completion.prompt_id)
    return [ProblemCounts(*row) for row in s.execute(query)]


def list_problems(s: Session, run_id: str, *, truncated_boxed: str, cursor: str | None = None, limit: int = 50) -> Page:
    """A page of problems in the order of the data set."""
    texts = (Completion.prompt, Completion.gold, Completion.level, Completion.subject)
    query = _counts(run_id, truncated_boxed, *(func.max(column) for column in texts))
    if cursor is not None:
        query = query.where(Completion.group > decode_cursor(cursor, int))
    rows = [ProblemCounts(*row) for row in s.execute(query.order_by(Completion.group).limit(limit + 1))]
    following = encode_cursor(rows[limit - 1].group) if len(rows) > limit else None
    return Page(rows[:limit], following)


def _counts(run_id: str, truncated_boxed: str, *more: Any) -> Any:
    right = Completion.verdict == "right"
    if truncated_boxed == "wrong":
        right = and_(right, not_(Completion.truncated))
    return (
        select(
            Completion.prompt_id,
            Completion.group,
            func.count(),
            func.sum(case((right, 1), else_=0)),
            func.sum(cast(Completion.boxed, Integer)),
            func.sum(cast(Completion.truncated, Integer)),
            func.sum(Completion.num_tokens),
            *more,
        )
        .where(Completion.run_id == run_id)
        .group_by(Completion.prompt_id, Completion.group)
    )
