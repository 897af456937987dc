"""Token traces: sequences of a run, ranges of their channels, pivots, histograms."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, defer

from erpo_core.codec import TraceReader
from erpo_core.errors import NotFoundError
from service.db.measured import Completion, Pivot, Sequence, TraceBlob
from service.db.paging import Page, read_page
from service.db.types import MAX_SMALL_INTEGER, clamp


def list_sequences(
    s: Session, run_id: str, *, step: int | None = None, cursor: str | None = None, limit: int = 50
) -> Page:
    """Sequences by ``n``, without the texts of their tokens, which may not be read from these rows."""
    query = select(Sequence).where(Sequence.run_id == run_id).options(defer(Sequence.tokens, raiseload=True))
    if step is not None:
        query = query.where(Sequence.step == clamp(step))
    return read_page(s, query, Sequence.n, cursor=cursor, limit=limit, newest_first=False)


def count_sequences(s: Session, run_id: str) -> int:
    """How many sequences a run has traced."""
    return s.scalar(select(func.count()).select_from(Sequence).where(Sequence.run_id == run_id))


def get_sequence(s: Session, run_id: str, n: int) -> Sequence:
    """Raises NotFoundError where the run has no sequence ``n``."""
    row = None
    if 0 <= n <= MAX_SMALL_INTEGER:
        row = s.scalars(select(Sequence).filter_by(run_id=run_id, n=n)).one_or_none()
    if row is None:
        raise NotFoundError(f"run {run_id} has no sequence {n}")
    return row


def find_sequence(s: Session, sequence_id: str) -> Sequence:
    """Raises NotFoundError where there is no such sequence."""
    row = s.get(Sequence, sequence_id)
    if row is None:
        raise NotFoundError(f"there is no sequence {sequence_id}")
    return row


def gold_of(s: Session, sequence: Sequence) -> str | None:
    """The right answer of a sequence's problem: of its trace, or of the stored answer that it is the trace of."""
    if sequence.origin.get("gold"):
        return sequence.origin["gold"]
    query = select(Completion.gold).where(Completion.run_id == sequence.run_id, Completion.step == sequence.step)
    query = query.where(Completion.prompt_id == sequence.prompt_id, Completion.sample == sequence.sample)
    return s.scalars(query).first()


def trace_reader(s: Session, sequence: Sequence) -> TraceReader:
    """Reads ranges of a stored blob; only the bytes that hold them leave the database."""

    def read(offset: int, length: int) -> bytes:
        part = func.substr(TraceBlob.data, offset + 1, length)
        return bytes(s.scalar(select(part).where(TraceBlob.sequence_id == sequence.id)) or b"")

    return TraceReader(read)


def entropy_channel(reader: TraceReader) -> str:
    """The channel that pivots are found on: entropies, or what they are at least where no more is known."""
    return "entropy" if "entropy" in reader.channels else "entropy_low"


def list_pivots(s: Session, sequence: Sequence, start: int = 0, end: int | None = None) -> list[Pivot]:
    """Pivots of a sequence by position, within a range."""
    query = select(Pivot).where(Pivot.sequence_id == sequence.id, Pivot.position >= start)
    if end is not None:
        query = query.where(Pivot.position < end)
    return list(s.scalars(query.order_by(Pivot.position)))


def top_pivots(s: Session, run_id: str, top: int) -> list[Pivot]:
    """The most uncertain pivots of a run."""
    query = select(Pivot).where(Pivot.run_id == run_id)
    return list(s.scalars(query.order_by(Pivot.entropy.desc(), Pivot.n, Pivot.position).limit(top)))


def all_pivots(s: Session, run_id: str) -> Iterator[tuple[Pivot, int]]:
    """Every stored pivot of a run with the number of tokens of its sequence."""
    query = select(Pivot, Sequence.num_tokens).join(Sequence, Sequence.id == Pivot.sequence_id)
    yield from s.execute(query.where(Pivot.run_id == run_id).order_by(Pivot.n, Pivot.position))


def token_texts(s: Session, run_id: str, n: int) -> list[str]:
    """The texts of a sequence's tokens, which lists of sequences leave out."""
    return s.scalar(select(Sequence.tokens).where(Sequence.run_id == run_id, Sequence.n == n)) or []


def stored_traces(s: Session, run_id: str) -> Iterator[dict[str, Any]]:
    """Whole traces with their pivots, for an attempt that goes on from them."""
    pivots: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pivot in s.scalars(select(Pivot).where(Pivot.run_id == run_id).order_by(Pivot.n, Pivot.position)):
        facts = {"position": pivot.position, "entropy": pivot.entropy, "token": pivot.token}
        pivots[pivot.sequence_id].append(facts)
    query = select(Sequence.id, Sequence.prompt_id, Sequence.sample, TraceBlob.data)
    query = query.join(TraceBlob, TraceBlob.sequence_id == Sequence.id).where(Sequence.run_id == run_id)
    for sequence_id, prompt_id, sample, blob in s.execute(query.order_by(Sequence.n)):
        yield {"prompt_id": prompt_id, "sample": sample, "blob": blob, "pivots": pivots[sequence_id]}


def histogram(s: Session, run_id: str) -> list[int]:
    """Counts of the sequences' histograms, added up; empty where nothing was traced."""
    total: list[int] = []
    for counts in s.scalars(select(Sequence.histogram).where(Sequence.run_id == run_id)):
        total = [a + b for a, b in zip(total, counts, strict=True)] if total else list(counts)
    return total
