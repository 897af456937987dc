"""Logs of children: chunks of bytes at offsets that run through all attempts of a job."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.models import Job, LogChunk


def log_size(s: Session, job_id: str) -> int:
    """Bytes stored."""
    return s.scalar(select(Job.log_bytes).where(Job.id == job_id)) or 0


def read_log(s: Session, job_id: str, start: int, end: int) -> bytes:
    """The bytes from ``start`` to ``end``; reads only the chunks that hold them."""
    first = s.scalar(
        select(LogChunk.offset)
        .where(LogChunk.job_id == job_id, LogChunk.offset <= start)
        .order_by(LogChunk.offset.desc())
        .limit(1)
    )
    if first is None:
        return b""
    chunks = s.scalars(
        select(LogChunk.data)
        .where(LogChunk.job_id == job_id, LogChunk.offset >= first, LogChunk.offset < end)
        .order_by(LogChunk.offset)
    )
    return b"".join(chunks)[start - first : end - first]
