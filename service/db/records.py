"""What children report becomes rows: one transaction for a batch, fenced by the attempt, safe to repeat."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from erpo_core import records as wire
from service.db.claims import own_job
from service.db.events import append_event
from service.db.ids import new_id
from service.db.jobs import set_status
from service.db.measured import Checkpoint, Completion, Pivot, Sequence, TraceBlob
from service.db.metrics import write_metrics
from service.db.models import Job, LogChunk, Run
from service.db.types import storable

_COMPLETION_FIELDS = (
    "group",
    "prompt",
    "completion",
    "gold",
    "level",
    "subject",
    "rewards",
    "reward",
    "advantage",
    "verdict",
    "boxed",
    "truncated",
    "num_tokens",
    "extra",
)
_SEQUENCE_FIELDS = (
    "group",
    "prompt",
    "completion",
    "num_tokens",
    "reward",
    "advantage",
    "tokens",
    "stats",
    "group_stats",
    "histogram",
)
_ORIGIN_FIELDS = (
    "model_digest",
    "adapter_digest",
    "tokenizer_digest",
    "temperature",
    "dtype",
    "head_dtype",
    "exact",
    "gold",
    "verdict",
    "special_positions",
)


def apply_records(s: Session, *, job_id: str, run_id: str, attempt: int, records: list[wire.Record]) -> None:
    """Store a batch in order.

    Raises:
        FencedError: the attempt does not own the job (any more); nothing of the batch is stored.
        ValueError: a record of a run that is none of the job's.
    """
    job = own_job(s, job_id, attempt)
    if job.status == "starting":
        set_status(s, job, "running")
    run = s.get_one(Run, run_id)
    metrics: dict[int, dict[str, float | None]] = defaultdict(dict)
    for record in records:
        if isinstance(record, wire.Metrics):
            metrics[record.step].update(record.values)
        else:
            # Metrics are held together, but never past a record that speaks of their steps.
            _store_metrics(s, job, metrics)
            _WRITERS[type(record)](s, job, _run_of(s, job, record) or run, record)
    _store_metrics(s, job, metrics)


def _run_of(s: Session, job: Job, record: wire.Record) -> Run | None:
    """The run that a record names, if it names one."""
    named = getattr(record, "run_id", None)
    if named is None:
        return None
    if named not in job.run_ids:
        raise ValueError(f"{named} is no run of {job.id}")
    return s.get_one(Run, named)


def append_log(s: Session, job_id: str, attempt: int, data: bytes, cap: int) -> None:
    """Store a piece of the log and tell listeners where it lies; what is beyond ``cap`` is dropped, and said once.

    Raises:
        FencedError: the attempt does not own the job (any more).
    """
    job = own_job(s, job_id, attempt)
    if job.log_bytes >= cap or not data:
        return
    kept = data[: cap - job.log_bytes]
    if len(kept) < len(data) or job.log_bytes + len(kept) == cap:
        kept += b"\n[the log is full; what follows is not kept]\n"
    s.add(LogChunk(job_id=job_id, offset=job.log_bytes, attempt=attempt, data=kept))
    start, job.log_bytes = job.log_bytes, job.log_bytes + len(kept)
    append_event(s, job, "log.line", data={"start": start, "end": job.log_bytes})


def _store_metrics(s: Session, job: Job, metrics: dict[int, dict[str, float | None]]) -> None:
    if not metrics:
        return
    write_metrics(s, job.run_id, metrics)
    last = max(metrics)
    names = sorted({name for values in metrics.values() for name in values})
    data = {"step_min": min(metrics), "step_max": last, "names": names, "values": metrics[last]}
    append_event(s, job, "metric.batch", data=data)
    metrics.clear()


def _resolved(s: Session, job: Job, run: Run, record: wire.Resolved) -> None:
    run.resolved = {**(run.resolved or {}), **record.data}


def _progress(s: Session, job: Job, run: Run, record: wire.Progress) -> None:
    job.progress = {**record.data, "phase": record.phase, "done": record.done, "total": record.total}
    append_event(s, job, "progress", data=job.progress)


def _completions(s: Session, job: Job, run: Run, record: wire.Completions) -> None:
    query = select(Completion).where(Completion.run_id == run.id, Completion.step == record.step)
    query = query.where(Completion.prompt_id.in_({row["prompt_id"] for row in record.rows}))
    stored = {(row.prompt_id, row.sample): row for row in s.scalars(query)}
    for body in record.rows:
        key = (storable(body["prompt_id"]), body["sample"])
        row = stored.get(key)
        if row is None:
            row = Completion(id=new_id("cmp"), run_id=run.id, step=record.step, prompt_id=key[0], sample=key[1])
            stored[key] = row
            s.add(row)
        _fill(row, body, _COMPLETION_FIELDS)
    append_event(s, job, "completion.batch", data={"step": record.step, "count": len(record.rows)})


def _trace(s: Session, job: Job, run: Run, record: wire.Trace) -> None:
    meta = record.meta
    key = {"step": record.step, "prompt_id": meta["prompt_id"], "sample": meta["sample"]}
    row = s.scalars(select(Sequence).filter_by(run_id=run.id, **key)).one_or_none()
    if row is None:
        last = s.scalar(select(func.max(Sequence.n)).where(Sequence.run_id == run.id))
        row = Sequence(id=new_id("seq"), run_id=run.id, n=0 if last is None else last + 1, **key)
        s.add(row)
    _fill(row, meta, _SEQUENCE_FIELDS)
    row.origin = {name: meta[name] for name in _ORIGIN_FIELDS if name in meta}
    s.flush()
    s.merge(TraceBlob(sequence_id=row.id, data=record.payload))
    s.execute(delete(Pivot).where(Pivot.sequence_id == row.id))
    for pivot in meta.get("pivots", ()):
        s.add(Pivot(sequence_id=row.id, run_id=run.id, n=row.n, **_pivot(pivot)))
    run.num_sequences = max(run.num_sequences or 0, row.n + 1)
    append_event(s, job, "trace.batch", data={"step": record.step, "n": row.n})


def _pivot(body: dict[str, Any]) -> dict[str, Any]:
    names = ("position", "entropy", "logp", "token", "alternatives")
    return {name: body[name] for name in names if body.get(name) is not None}


def _checkpoint(s: Session, job: Job, run: Run, record: wire.Checkpoint) -> None:
    row = s.scalars(select(Checkpoint).filter_by(run_id=run.id, step=record.step)).one_or_none()
    if row is None:
        row = Checkpoint(id=new_id("ckpt"), run_id=run.id, step=record.step)
        s.add(row)
    row.attempt, row.path, row.files, row.data = job.attempt, record.path, record.files, record.data
    data = {"checkpoint_id": row.id, "step": record.step, "files": len(record.files)}
    append_event(s, job, "checkpoint.created", f"checkpoint of step {record.step}", data=data)


def _event(s: Session, job: Job, run: Run, record: wire.Event) -> None:
    if record.type == "checkpoint.removed":
        # Each attempt writes into a folder of its own: what an earlier one left at this step was not removed.
        own = (Checkpoint.run_id == run.id, Checkpoint.attempt == job.attempt)
        s.execute(delete(Checkpoint).where(*own, Checkpoint.step == record.data["step"]))
    append_event(s, job, record.type, record.message, level=record.level, data=record.data)


def _result(s: Session, job: Job, run: Run, record: wire.Result) -> None:
    run.result = record.data


def _ended(s: Session, job: Job, run: Run, record: wire.Ended) -> None:
    """The supervisor decides how the job ended, once no process of the attempt is left."""


def _fill(row: Any, body: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name in body and body[name] is not None:
            setattr(row, name, body[name])


_WRITERS: dict[type, Callable[..., None]] = {
    wire.Resolved: _resolved,
    wire.Progress: _progress,
    wire.Completions: _completions,
    wire.Trace: _trace,
    wire.Checkpoint: _checkpoint,
    wire.Event: _event,
    wire.Result: _result,
    wire.Ended: _ended,
}
