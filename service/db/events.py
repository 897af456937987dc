"""The history of jobs. The writer holds the job's row, so ``seq`` has no gaps and nothing commits out of order."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.ids import new_id
from service.db.models import Job, JobEvent
from service.db.types import clamp


def append_event(
    s: Session, job: Job, type_: str, message: str = "", *, level: str = "info", data: dict[str, Any] | None = None
) -> JobEvent:
    """Add to the history of a locked job."""
    job.event_seq += 1
    event = JobEvent(
        id=new_id("evt"),
        job_id=job.id,
        run_id=job.run_id,
        seq=job.event_seq,
        attempt=job.attempt,
        type=type_,
        level=level,
        message=message,
        data=data or {},
    )
    s.add(event)
    return event


def list_events(s: Session, job_id: str, after_seq: int = 0, limit: int = 50) -> list[JobEvent]:
    """Events after ``after_seq`` in order."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > clamp(after_seq))
    return list(s.scalars(query.order_by(JobEvent.seq).limit(limit)))


def latest_seqs(s: Session, job_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last event of each job."""
    return dict(s.execute(select(Job.id, Job.event_seq).where(Job.id.in_(list(job_ids)))).all())
