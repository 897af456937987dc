"""Tables of what runs measure: metrics, completions, checkpoints and token traces."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Index, Integer, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.db.models import Base, Id
from service.db.types import LongText, ShortText, now


class Metric(Base):
    """One number of one step. A value that was not finite is null."""

    __tablename__ = "metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(ShortText(120), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    value: Mapped[float | None]


class MetricBucket(Base):
    """Minimum, maximum, first and last of ``width`` steps, kept as the steps arrive."""

    __tablename__ = "metric_buckets"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(ShortText(120), primary_key=True)
    width: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    count: Mapped[int] = mapped_column(Integer)
    min: Mapped[float | None]
    max: Mapped[float | None]
    first: Mapped[float | None]
    last: Mapped[float | None]
    last_step: Mapped[int] = mapped_column(BigInteger)


class RunSummary(Base):
    """Last, least and greatest value of each metric of a run."""

    __tablename__ = "run_summary"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(ShortText(120), primary_key=True)
    last: Mapped[float | None]
    min: Mapped[float | None]
    max: Mapped[float | None]
    steps: Mapped[int] = mapped_column(BigInteger)


class Completion(Base):
    """One sampled answer."""

    __tablename__ = "completions"
    __table_args__ = (
        UniqueConstraint("run_id", "step", "prompt_id", "sample"),
        Index("ix_completions_page", "run_id", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    step: Mapped[int] = mapped_column(BigInteger)
    prompt_id: Mapped[str] = mapped_column(ShortText(200))
    group: Mapped[int] = mapped_column(Integer, default=0)
    sample: Mapped[int] = mapped_column(Integer)
    prompt: Mapped[str] = mapped_column(LongText, default="")
    completion: Mapped[str] = mapped_column(LongText)
    gold: Mapped[str | None] = mapped_column(LongText)
    level: Mapped[str | None] = mapped_column(ShortText(40))
    subject: Mapped[str | None] = mapped_column(ShortText(200))
    rewards: Mapped[dict[str, Any]] = mapped_column(default=dict)
    reward: Mapped[float | None] = mapped_column(Float)
    advantage: Mapped[float | None] = mapped_column(Float)
    verdict: Mapped[str | None] = mapped_column(ShortText(40))
    boxed: Mapped[bool] = mapped_column(Boolean, default=False)
    truncated: Mapped[bool] = mapped_column(Boolean, default=False)
    num_tokens: Mapped[int] = mapped_column(Integer, default=0)
    extra: Mapped[dict[str, Any] | None]
    """What reward functions said of it beside their rewards."""


class Checkpoint(Base):
    """A checkpoint whose files were complete before this row was written."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("run_id", "step"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    attempt: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    path: Mapped[str] = mapped_column(LongText)
    files: Mapped[list[Any]]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Sequence(Base):
    """A traced sequence; ``n`` counts from 0 in each run. Its channels are in :class:`TraceBlob`."""

    __tablename__ = "sequences"
    __table_args__ = (UniqueConstraint("run_id", "n"), UniqueConstraint("run_id", "step", "prompt_id", "sample"))

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    n: Mapped[int] = mapped_column(Integer)
    step: Mapped[int] = mapped_column(BigInteger)
    prompt_id: Mapped[str] = mapped_column(ShortText(200))
    group: Mapped[int] = mapped_column(Integer, default=0)
    sample: Mapped[int] = mapped_column(Integer)
    prompt: Mapped[str] = mapped_column(LongText, default="")
    completion: Mapped[str] = mapped_column(LongText, default="")
    num_tokens: Mapped[int] = mapped_column(Integer)
    reward: Mapped[float | None] = mapped_column(Float)
    advantage: Mapped[float | None] = mapped_column(Float)
    tokens: Mapped[list[Any]] = mapped_column(default=list)
    stats: Mapped[dict[str, Any]] = mapped_column(default=dict)
    group_stats: Mapped[dict[str, Any]] = mapped_column(default=dict)
    histogram: Mapped[list[Any]] = mapped_column(default=list)
    origin: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Digests, temperature and dtypes under which the numbers hold; the right answer and special tokens, if known."""


class TraceBlob(Base):
    """All channels of one sequence in the format of :mod:`erpo_core.codec`."""

    __tablename__ = "trace_blobs"

    sequence_id: Mapped[str] = mapped_column(ForeignKey("sequences.id"), primary_key=True)
    data: Mapped[bytes]


class Pivot(Base):
    """A Critical Decision Pivot with the alternatives that the model saw there."""

    __tablename__ = "pivots"
    __table_args__ = (Index("ix_pivots_entropy", "run_id", "entropy"),)

    sequence_id: Mapped[str] = mapped_column(ForeignKey("sequences.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    run_id: Mapped[str] = mapped_column(Id)
    n: Mapped[int] = mapped_column(Integer)
    entropy: Mapped[float]
    logp: Mapped[float | None]
    token: Mapped[str] = mapped_column(LongText, default="")
    alternatives: Mapped[list[Any]] = mapped_column(default=list)
