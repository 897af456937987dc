"""What workers do to jobs: claim, heartbeat, finish, expire. Every write is fenced by the attempt's number."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from erpo_core.errors import FencedError, NotFoundError
from service.db.events import append_event
from service.db.jobs import lock_job, set_status
from service.db.measured import Checkpoint
from service.db.models import Job, Run, Worker
from service.db.rewind import delete_after
from service.db.states import ACTIVE
from service.db.types import now

_CANDIDATES = 10_000
"""Jobs looked at for one claim: more than a queue holds, so that those which wait for others hide nothing."""
KEEPS_RECORDS = ("evaluate", "entropy", "perturbation", "branch")
"""Kinds whose next attempt goes on from the answers and traces that are stored."""
_UNDER_WAY = {"pausing": "paused", "cancelling": "cancelled"}
"""What a job becomes whose attempt ends without having been asked to."""


@dataclass(frozen=True)
class Claim:
    """A job that an attempt owns. ``run_id`` and ``spec`` are those of its first run, where it has several."""

    job_id: str
    run_id: str
    attempt: int
    kind: str
    spec: dict[str, Any]
    time_limit_seconds: float | None


@dataclass(frozen=True)
class Lease:
    """A running attempt, as a sweeper watches it."""

    job_id: str
    attempt: int
    heartbeat_seq: int


def claim_next(s: Session, *, queues: list[str], worker_id: str, lease_seconds: float) -> Claim | None:
    """The best eligible job: highest priority, then longest waiting, every dependency succeeded."""
    worker = s.get(Worker, worker_id)
    if worker is not None and worker.is_draining:
        return None
    waiting = s.execute(
        select(Job.id, Job.depends_on)
        .where(Job.status == "queued", Job.queue.in_(queues), Job.deleted_at.is_(None))
        .order_by(Job.priority.desc(), Job.queued_at, Job.id)
        .limit(_CANDIDATES)
    ).all()
    for job_id, depends_on in waiting:
        parents = _parents(s, depends_on)
        if parents == "waiting":
            continue
        job = _lock_queued(s, job_id)
        if job is None:
            continue
        if parents == "succeeded":
            return _claim(s, job, worker_id, lease_seconds)
        set_status(s, job, "cancelled", "dependency_failed")
    return None


def _lock_queued(s: Session, job_id: str) -> Job | None:
    """The job's row, locked, if it waits still and nobody else is about to take it.

    Only this row is locked: a worker that claims at the same moment passes over it to the next job.
    """
    query = select(Job).where(Job.id == job_id, Job.status == "queued", Job.deleted_at.is_(None))
    query = query.with_for_update(skip_locked=True).execution_options(populate_existing=True)
    return s.scalars(query).one_or_none()


def _parents(s: Session, depends_on: list[str]) -> str:
    """``succeeded``: all of them; ``failed``: one has ended otherwise or is unknown; else ``waiting``."""
    if not depends_on:
        return "succeeded"
    query = select(Run.id, Job.status).join(Job, Job.id == Run.job_id).where(Run.id.in_(depends_on))
    known = dict(s.execute(query).all())
    statuses = {known.get(run_id, "failed") for run_id in depends_on}
    if statuses & {"failed", "cancelled"}:
        return "failed"
    return "succeeded" if statuses == {"succeeded"} else "waiting"


def _claim(s: Session, job: Job, worker_id: str, lease_seconds: float) -> Claim:
    job.attempt += 1
    job.worker_id = worker_id
    job.heartbeat_seq += 1
    job.lease_expires_at = now() + timedelta(seconds=lease_seconds)
    job.started_at = job.started_at or now()
    job.progress = None
    set_status(s, job, "starting")
    if job.attempt > 1:
        _rewind(s, job)
    run = s.get_one(Run, job.run_id)
    return Claim(job.id, run.id, job.attempt, job.kind, run.spec, job.time_limit_seconds)


def _rewind(s: Session, job: Job) -> None:
    """The new attempt writes the steps after its checkpoint again. What it goes on from instead stays."""
    if job.kind in KEEPS_RECORDS:
        return
    last = s.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.run_id == job.run_id))
    # Without a checkpoint the run begins anew: what it recorded at step 0 goes as well.
    to_step = -1 if last is None else last
    if delete_after(s, job.run_id, to_step):
        message = "back to the beginning" if last is None else f"back to step {to_step}"
        append_event(s, job, "run.rewound", message, data={"to_step": to_step})


def own_job(s: Session, job_id: str, attempt: int) -> Job:
    """The job's row, locked, if ``attempt`` owns it.

    Raises:
        FencedError: it does not (any more).
    """
    try:
        job = lock_job(s, job_id)
    except NotFoundError as error:
        raise FencedError(error.message) from error
    if job.attempt != attempt or job.status not in ACTIVE:
        raise FencedError(f"{job_id} is {job.status} at attempt {job.attempt}, not {attempt}", state=job.status)
    return job


def drop_checkpoint(s: Session, job_id: str, attempt: int, step: int) -> None:
    """Forget a checkpoint whose files are damaged or gone, and go back to the newest of the others.

    Raises:
        FencedError: the attempt does not own the job any more.
    """
    message = f"the files of the checkpoint of step {step} are damaged or gone: it is passed over"
    _rewind(s, _forget_checkpoint(s, job_id, attempt, step, "checkpoint.damaged", message, level="warn"))


def remove_checkpoint(s: Session, job_id: str, attempt: int, step: int) -> None:
    """Forget a checkpoint that makes room for later ones.

    Raises:
        FencedError: the attempt does not own the job any more.
    """
    message = f"the checkpoint of step {step} makes room for later ones"
    _forget_checkpoint(s, job_id, attempt, step, "checkpoint.removed", message)


def _forget_checkpoint(s: Session, job_id: str, attempt: int, step: int, event: str, message: str, **level: str) -> Job:
    job = own_job(s, job_id, attempt)
    s.execute(delete(Checkpoint).where(Checkpoint.run_id == job.run_id, Checkpoint.step == step))
    append_event(s, job, event, message, data={"step": step}, **level)
    return job


def heartbeat(s: Session, job_id: str, attempt: int, lease_seconds: float) -> str | None:
    """Renew the lease; what the user wants: ``paused``, ``cancelled``, ``cancelled_now`` or None.

    Raises:
        FencedError: the attempt does not own the job any more.
    """
    job = own_job(s, job_id, attempt)
    job.heartbeat_seq += 1
    job.lease_expires_at = now() + timedelta(seconds=lease_seconds)
    return job.desired_status


def mark_running(s: Session, job_id: str, attempt: int) -> None:
    """The child has reported: ``starting`` becomes ``running``. Raises FencedError."""
    job = own_job(s, job_id, attempt)
    if job.status == "starting":
        set_status(s, job, "running")


def finish_attempt(
    s: Session,
    job_id: str,
    attempt: int,
    *,
    outcome: str,
    reason: str | None = None,
    error: dict[str, Any] | None = None,
) -> None:
    """How an attempt ended: ``succeeded``, ``failed``, ``cancelled``, ``paused`` or ``requeued``.

    Raises:
        FencedError: the attempt does not own the job any more.
    """
    job = own_job(s, job_id, attempt)
    job.lease_expires_at, job.worker_id = None, None
    if outcome == "failed":
        job.error = error
    if outcome in ("requeued", "paused"):
        # What the user asked for in the last moment holds: the job does not go back into the queue, nor wait for it.
        outcome = _UNDER_WAY.get(job.status, "queued" if outcome == "requeued" else outcome)
    set_status(s, job, outcome, reason)
    job.desired_status = None


def running_leases(s: Session) -> list[Lease]:
    """Every attempt that owns a job."""
    rows = s.execute(select(Job.id, Job.attempt, Job.heartbeat_seq).where(Job.status.in_(ACTIVE)))
    return [Lease(*row) for row in rows]


def expire_attempt(s: Session, job_id: str, attempt: int, heartbeat_seq: int | None = None) -> str | None:
    """Take the job from a silent worker: ``queued`` again, or ``failed: worker_lost`` after ``max_retries``.

    Args:
        heartbeat_seq: the counter that stood still; a heartbeat since then keeps the job where it is.

    Returns:
        The new status; None if the attempt does not own the job any more, or has been heard since.
    """
    try:
        job = own_job(s, job_id, attempt)
    except FencedError:
        return None
    if heartbeat_seq is not None and job.heartbeat_seq != heartbeat_seq:
        return None
    wanted = _UNDER_WAY.get(job.status)
    job.lease_expires_at, job.worker_id = None, None
    if wanted is not None:
        set_status(s, job, wanted, "worker_lost")
    elif job.num_retries < job.max_retries:
        job.num_retries += 1
        set_status(s, job, "queued", "worker_lost")
    else:
        job.error = {"code": "worker_lost", "message": "the worker fell silent", "log_tail": ""}
        set_status(s, job, "failed", "worker_lost")
    job.desired_status = None
    return job.status


def unclaimed_jobs(s: Session, older_than: float) -> list[str]:
    """Ids of jobs that have been queued for more than ``older_than`` seconds."""
    query = select(Job.id).where(Job.status == "queued", Job.deleted_at.is_(None))
    query = query.where(Job.queued_at < now() - timedelta(seconds=older_than))
    return list(s.scalars(query.order_by(Job.priority.desc(), Job.queued_at).limit(_CANDIDATES)))


def register_worker(
    s: Session, worker_id: str, *, host: str, pid: int, queues: list[str], abilities: list[str] | None = None
) -> None:
    """A worker starts. ``abilities``: what its jobs may use (``cuda``, ``cuda:8``, ``vllm``); None: not known."""
    facts = {"host": host, "pid": pid, "queues": queues, "abilities": abilities}
    s.merge(Worker(id=worker_id, is_draining=False, started_at=now(), **facts))
    s.flush()
    beat_worker(s, worker_id)


def beat_worker(s: Session, worker_id: str) -> None:
    """A worker lives."""
    worker = s.get(Worker, worker_id)
    if worker is not None:
        worker.last_heartbeat_at = now()


def list_workers(s: Session, alive_within: float | None = None) -> list[Worker]:
    """Workers, the last heard first; only those heard within ``alive_within`` seconds, if given."""
    query = select(Worker).order_by(Worker.last_heartbeat_at.desc()).limit(1000)
    if alive_within is not None:
        query = query.where(Worker.last_heartbeat_at >= now() - timedelta(seconds=alive_within))
    return list(s.scalars(query))
