"""Back to a checkpoint: what a run recorded after it is deleted, because a new attempt writes it again."""

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.db.measured import Checkpoint, Completion, Metric, MetricBucket, Pivot, RunSummary, Sequence, TraceBlob
from service.db.metrics import rebuild
from service.db.models import Run


def delete_after(s: Session, run_id: str, step: int) -> bool:
    """Delete this run's records of steps beyond ``step``; whether there were any."""
    late = select(Sequence.id).where(Sequence.run_id == run_id, Sequence.step > step)
    for table in (TraceBlob, Pivot):
        s.execute(delete(table).where(table.sequence_id.in_(late)))
    count = 0
    for table in (Sequence, Completion, Checkpoint, Metric):
        count += s.execute(delete(table).where(table.run_id == run_id, table.step > step)).rowcount
    if count:
        last = s.scalar(select(func.max(Sequence.n)).where(Sequence.run_id == run_id))
        s.get_one(Run, run_id).num_sequences = 0 if last is None else last + 1
        s.execute(delete(MetricBucket).where(MetricBucket.run_id == run_id, MetricBucket.last_step > step))
        s.execute(delete(RunSummary).where(RunSummary.run_id == run_id))
        rebuild(s, run_id)
    return bool(count)
