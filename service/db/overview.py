"""Counts over all jobs, for operators."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.models import Job
from service.db.states import ACTIVE


def count_jobs(s: Session) -> list[tuple[str, str, int]]:
    """(kind, status, number) of every combination that occurs."""
    query = select(Job.kind, Job.status, func.count()).where(Job.deleted_at.is_(None))
    return [tuple(row) for row in s.execute(query.group_by(Job.kind, Job.status))]


def current_jobs(s: Session) -> dict[str, str]:
    """{worker id: id of the job that it works on}."""
    query = select(Job.worker_id, Job.id).where(Job.status.in_(ACTIVE), Job.worker_id.is_not(None))
    return dict(s.execute(query).all())
