"""Tables of jobs, runs, events, logs, keys and workers. Those of measured data are in :mod:`service.db.measured`."""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.db.states import ACTIVE, is_terminal
from service.db.types import Blob, Json, LongText, ShortText, UtcDateTime, now

Id = ShortText(40)


class Base(DeclarativeBase):
    """One metadata for both databases."""

    type_annotation_map: ClassVar = {datetime: UtcDateTime, dict[str, Any]: Json, list[Any]: Json, bytes: Blob}


class Run(Base):
    """What is tracked: it survives pause, resume and retry."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str | None] = mapped_column(Id, index=True)
    kind: Mapped[str] = mapped_column(ShortText(20))
    spec: Mapped[dict[str, Any]]
    target: Mapped[str | None] = mapped_column(Id, index=True)
    """The run whose checkpoint this one works on."""
    resolved: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    project: Mapped[str | None] = mapped_column(ShortText(200))
    notes: Mapped[str | None] = mapped_column(LongText)
    origin: Mapped[str] = mapped_column(ShortText(20), default="job", server_default="job")
    """``job``: computed here; ``external``: reported by a trainer that runs elsewhere."""
    init_from: Mapped[str | None] = mapped_column(Id)
    """The checkpoint that the first weights came from."""
    num_sequences: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime] = mapped_column(default=now)
    deleted_at: Mapped[datetime | None]


class Job(Base):
    """One order to compute."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_queue", "status", "queue", "priority", "queued_at"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    more_run_ids: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")
    """Of an evaluation of several checkpoints; ``run_id`` is the first."""
    kind: Mapped[str] = mapped_column(ShortText(20))
    owner: Mapped[str | None] = mapped_column(ShortText(64), index=True)
    name: Mapped[str | None] = mapped_column(ShortText(200))
    tags: Mapped[list[Any]] = mapped_column(default=list)
    model: Mapped[str] = mapped_column(ShortText(200), default="")
    queue: Mapped[str] = mapped_column(ShortText(40), default="default")
    priority: Mapped[int] = mapped_column(Integer, default=0)
    depends_on: Mapped[list[Any]] = mapped_column(default=list)
    time_limit_seconds: Mapped[float | None]
    max_retries: Mapped[int] = mapped_column(Integer, default=2)
    num_retries: Mapped[int] = mapped_column(Integer, default=0)

    status: Mapped[str] = mapped_column(ShortText(20), default="queued")
    status_reason: Mapped[str | None] = mapped_column(ShortText(60))
    desired_status: Mapped[str | None] = mapped_column(ShortText(20))
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    worker_id: Mapped[str | None] = mapped_column(ShortText(200))
    heartbeat_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_expires_at: Mapped[datetime | None]
    event_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    log_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]

    created_at: Mapped[datetime] = mapped_column(default=now)
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    @property
    def run_ids(self) -> list[str]:
        """Every run, in order."""
        return [self.run_id, *self.more_run_ids]

    @property
    def is_terminal(self) -> bool:
        """True once the job will not change by itself any more."""
        return is_terminal(self.status)

    @property
    def stalled(self) -> bool:
        """True where an attempt owns the job and its lease has run out: no worker has been heard for a lease."""
        return self.status in ACTIVE and self.lease_expires_at is not None and self.lease_expires_at < now()


class JobEvent(Base):
    """The history of a job. ``seq`` counts from 1 in each job, without gaps."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    run_id: Mapped[str] = mapped_column(Id)
    seq: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int] = mapped_column(Integer)
    type: Mapped[str] = mapped_column(ShortText(60))
    level: Mapped[str] = mapped_column(ShortText(10), default="info")
    message: Mapped[str] = mapped_column(LongText, default="")
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=now)


class LogChunk(Base):
    """A piece of a job's log; ``offset`` counts bytes over all attempts."""

    __tablename__ = "log_chunks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    offset: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(Integer)
    data: Mapped[bytes]


class ApiKey(Base):
    """A bearer key; only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    digest: Mapped[str] = mapped_column(ShortText(64), unique=True)
    owner: Mapped[str | None] = mapped_column(ShortText(64))
    scope: Mapped[str] = mapped_column(ShortText(10))
    name: Mapped[str | None] = mapped_column(ShortText(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    revoked_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """A POST that came with a key: taken first, completed in the transaction of its effect."""

    __tablename__ = "idempotency_keys"

    principal: Mapped[str] = mapped_column(ShortText(64), primary_key=True)
    key: Mapped[str] = mapped_column(ShortText(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(ShortText(64))
    status: Mapped[int | None]
    body: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime]


class Worker(Base):
    """A worker that has said that it lives."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(ShortText(200), primary_key=True)
    host: Mapped[str] = mapped_column(ShortText(200))
    pid: Mapped[int] = mapped_column(Integer)
    queues: Mapped[list[Any]]
    abilities: Mapped[list[Any] | None]
    is_draining: Mapped[bool] = mapped_column(Boolean, default=False)
    started_at: Mapped[datetime] = mapped_column(default=now)
    last_heartbeat_at: Mapped[datetime] = mapped_column(default=now)


class Dataset(Base):
    """An uploaded data set; its rows are a JSONL file among the data."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    owner: Mapped[str | None] = mapped_column(ShortText(64))
    name: Mapped[str] = mapped_column(ShortText(200))
    sha256: Mapped[str] = mapped_column(ShortText(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    num_rows: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(default=now)
