"""Jobs as their users see and steer them. What workers do to a job is in :mod:`service.db.claims`."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, String, cast, func, select
from sqlalchemy.orm import Session

from erpo_core.errors import ConflictError, NotFoundError
from service.db.events import append_event
from service.db.ids import new_id
from service.db.models import Job, Run
from service.db.paging import Page, read_page
from service.db.states import ACTIVE, check_transition
from service.db.types import now, storable


def create_job(
    s: Session,
    *,
    kind: str,
    spec: dict[str, Any],
    options: dict[str, Any],
    owner: str | None = None,
    more: Sequence[dict[str, Any]] = (),
) -> Job:
    """A queued job and its run. ``spec`` is the specification without ``job``, ``options`` is that part.

    ``more``: specifications of further runs of the same job, which differ from ``spec`` in the model alone.
    """
    model = spec.get("model")
    created_at = now()
    job_id = new_id("job")
    runs = [_new_run(job_id, kind, one, created_at) for one in (spec, *more)]
    job = Job(
        id=job_id,
        run_id=runs[0].id,
        more_run_ids=[run.id for run in runs[1:]],
        kind=kind,
        owner=owner,
        name=options.get("name"),
        tags=list(options.get("tags", ())),
        model=model["run"] if isinstance(model, dict) else str(model),
        priority=options.get("priority", 0),
        depends_on=list(options.get("depends_on", ())),
        time_limit_seconds=options.get("time_limit_seconds"),
        max_retries=options.get("max_retries", 2),
        num_retries=0,
        attempt=0,
        heartbeat_seq=0,
        event_seq=0,
        log_bytes=0,
        status="queued",
        created_at=created_at,
        queued_at=created_at,
    )
    if job.depends_on:
        job.status_reason = "waiting_for_dependency"
    s.add_all(runs)
    s.flush()
    s.add(job)
    s.flush()
    append_event(s, job, "job.status", "queued", data={"from": None, "to": "queued", "reason": job.status_reason})
    return job


def _new_run(job_id: str, kind: str, spec: dict[str, Any], created_at: datetime) -> Run:
    model = spec.get("model")
    target = model["run"] if isinstance(model, dict) else None
    return Run(id=new_id("run"), job_id=job_id, kind=kind, spec=spec, target=target, created_at=created_at)


def get_job(s: Session, job_id: str) -> Job:
    """Raises NotFoundError for an id that names nothing."""
    job = s.get(Job, job_id)
    if job is None or job.deleted_at is not None:
        raise NotFoundError(f"there is no job {job_id}")
    return job


def get_run(s: Session, run_id: str, *, or_deleted: bool = False) -> Run:
    """Raises NotFoundError for an id that names nothing, and for that of a deleted run unless ``or_deleted``."""
    run = s.get(Run, run_id)
    if run is None or (run.deleted_at is not None and not or_deleted):
        raise NotFoundError(f"there is no run {run_id}")
    return run


def lock_job(s: Session, job_id: str) -> Job:
    """The job's row, locked until the transaction ends. Raises NotFoundError."""
    job = s.scalars(
        select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    ).one_or_none()
    if job is None or job.deleted_at is not None:
        raise NotFoundError(f"there is no job {job_id}")
    return job


def set_status(s: Session, job: Job, status: str, reason: str | None = None) -> Job:
    """One transition of a locked job, and its event.

    Raises:
        ConflictError: the state machine forbids it.
    """
    check_transition(job.status, status)
    before, job.status, job.status_reason = job.status, status, reason
    if status == "queued":
        job.queued_at, job.finished_at, job.error, job.desired_status = now(), None, None, None
    if job.is_terminal:
        job.finished_at, job.desired_status = now(), None
    append_event(
        s,
        job,
        "job.status",
        f"{status}: {reason}" if reason else status,
        level="error" if status == "failed" else "info",
        data={"from": before, "to": status, "reason": reason, "error": job.error},
    )
    return job


def list_jobs(
    s: Session,
    *,
    kind: str | None = None,
    status: str | None = None,
    tag: str | None = None,
    model: str | None = None,
    owner: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page:
    """Jobs, newest first; each filter that is given must hold."""
    query = select(Job).where(Job.deleted_at.is_(None))
    for column, value in ((Job.kind, kind), (Job.status, status), (Job.model, model), (Job.owner, owner)):
        if value is not None:
            query = query.where(column == value)
    if tag is not None:
        query = query.where(has_tag(tag))
    if created_after is not None:
        query = query.where(Job.created_at >= created_after)
    if created_before is not None:
        query = query.where(Job.created_at < created_before)
    return read_page(s, query, Job.id, cursor=cursor, limit=limit)


def has_tag(tag: str) -> ColumnElement[bool]:
    """Whether a job carries a tag; tags are a JSON list of texts."""
    # LIKE would ignore the case on SQLite; replace() is exact on both databases.
    text = cast(Job.tags, String)
    return func.replace(text, json.dumps(storable(tag), ensure_ascii=False), "") != text


def count_queued(s: Session) -> int:
    """Jobs that wait."""
    return s.scalar(select(func.count()).select_from(Job).where(Job.status == "queued", Job.deleted_at.is_(None)))


def request_cancel(s: Session, job_id: str, mode: str = "checkpoint") -> Job:
    """Cancel: at once where no attempt runs, else the supervisor is asked to. A cancelled job stays as it is.

    Raises:
        ConflictError: the job has succeeded or failed.
    """
    job = lock_job(s, job_id)
    if job.status == "cancelled":
        return job
    if job.status not in ACTIVE:
        return set_status(s, job, "cancelled", "user_request")
    job.desired_status = "cancelled_now" if mode == "now" else "cancelled"
    return job if job.status == "cancelling" else set_status(s, job, "cancelling", "user_request")


def request_pause(s: Session, job_id: str) -> Job:
    """Checkpoint and leave the device. Raises ConflictError where there is nothing to pause."""
    job = lock_job(s, job_id)
    if job.status in ("pausing", "paused"):
        return job
    if job.status not in ACTIVE:
        return set_status(s, job, "paused", "user_request")
    set_status(s, job, "pausing", "user_request")
    job.desired_status = "paused"
    return job


def resume_job(s: Session, job_id: str) -> Job:
    """Queue a paused job again. Raises ConflictError in any other state."""
    job = lock_job(s, job_id)
    if job.status != "paused":
        raise ConflictError(f"only a paused job can be resumed; this one is {job.status}", state=job.status)
    return set_status(s, job, "queued", "resumed")


def retry_job(s: Session, job_id: str) -> Job:
    """Queue a failed or cancelled job again. Raises ConflictError in any other state."""
    job = lock_job(s, job_id)
    if job.status not in ("failed", "cancelled"):
        raise ConflictError(
            f"only a failed or cancelled job can be retried; this one is {job.status}", state=job.status
        )
    job.num_retries = 0
    return set_status(s, job, "queued", "retried")


def update_job(s: Session, job_id: str, **changes: Any) -> Job:
    """Change ``name``, ``tags`` or ``priority``."""
    job = lock_job(s, job_id)
    for name in ("name", "tags", "priority"):
        if name in changes:
            setattr(job, name, list(changes[name]) if name == "tags" else changes[name])
    return job


def delete_job(s: Session, job_id: str) -> None:
    """Hide a finished job and its runs. Files stay: what others have trained on its checkpoints lies on them.

    Raises:
        ConflictError: it may still run.
    """
    job = lock_job(s, job_id)
    if not job.is_terminal:
        raise ConflictError(
            f"only a finished job can be deleted; this one is {job.status}: cancel it", state=job.status
        )
    job.deleted_at = now()
    for run_id in job.run_ids:
        s.get_one(Run, run_id).deleted_at = now()
