"""What a child process reports, and how it travels: numbered frames of a JSON header and a binary payload.

A frame is ``u32 header length | u32 payload length | header (UTF-8 JSON) | payload``, integers big-endian. The child
sends records numbered from 1; the recorder answers ``{"ack": n}`` once record n and all before it are in the database.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

_LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 32 * 2**20
MAX_PAYLOAD_BYTES = 256 * 2**20
_NUMBER_BYTES = 64
"""Room for a record's number in its header."""


@dataclass(frozen=True)
class Resolved:
    """What the names of the specification turned out to be: digests, sizes, versions, device, seeds. Once, first.

    ``run_id``, here and below: which of the job's runs it belongs to, where there are several; else its only one.
    """

    kind: ClassVar[str] = "resolved"
    data: dict[str, Any]
    run_id: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far it is.

    ``phase``: ``load``, ``train``, ``evaluate``, ``generate``, ``score``, ``pivots``, ``solve``, ``continue``,
    ``verify``, ``save``.
    """

    kind: ClassVar[str] = "progress"
    phase: str
    done: int
    total: int
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Scalars of one step. A value that is not finite travels as ``None``."""

    kind: ClassVar[str] = "metrics"
    step: int
    values: dict[str, float | None]


@dataclass(frozen=True)
class Completions:
    """Sampled answers of one step (training) or of a batch of problems (evaluation, step 0).

    Each row: ``prompt_id`` str, ``group`` int, ``sample`` int, ``prompt`` str, ``completion`` str, ``gold`` str | None,
    ``rewards`` {name: float | None}, ``reward`` float | None, ``advantage`` float | None, ``verdict`` str | None,
    ``boxed`` bool, ``truncated`` bool, ``num_tokens`` int; in a training ``extra``, what reward functions gave to TRL's
    ``log_extra``; in an evaluation ``level`` and ``subject`` of the problem, str | None. (step, prompt_id, sample)
    names a row once and for all. A step may have several of these records.
    """

    kind: ClassVar[str] = "completions"
    step: int
    rows: list[dict[str, Any]]
    run_id: str | None = None


@dataclass(frozen=True)
class Trace:
    """Per-token channels of one sequence. ``payload`` is a blob of :mod:`erpo_core.codec`.

    ``meta``: ``prompt_id``, ``group``, ``sample``, ``prompt``, ``completion``, ``num_tokens``, ``reward``,
    ``advantage``, ``stats`` {h_mean, h_p50, h_p95, h_max}, ``histogram`` [64 counts], ``group_stats`` {...}, ``tokens``
    [text of each token], ``gold`` str | None, ``special_positions`` [tokens that are never pivots], ``pivots``
    [{position, entropy, token, logp, alternatives: [{token, token_id, logp}]}], and of the whole set:
    ``model_digest``, ``adapter_digest``, ``tokenizer_digest``, ``temperature``, ``dtype``, ``head_dtype``, ``exact``.
    """

    kind: ClassVar[str] = "trace"
    step: int
    meta: dict[str, Any]
    payload: bytes = b""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its files are synced and their sha256 are in the manifest."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    files: list[dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something worth telling. ``level``: ``info``, ``warn``, ``error``."""

    kind: ClassVar[str] = "event"
    type: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The summary of a finished job, stored on its run."""

    kind: ClassVar[str] = "result"
    data: dict[str, Any]
    run_id: str | None = None


@dataclass(frozen=True)
class Ended:
    """The last record. ``status``: ``succeeded``, ``failed``, ``stopped`` (asked to leave, checkpoint written)."""

    kind: ClassVar[str] = "ended"
    status: str
    code: str | None = None
    message: str | None = None


Record = Resolved | Progress | Metrics | Completions | Trace | Checkpoint | Event | Result | Ended
_KINDS: dict[str, type] = {
    cls.kind: cls for cls in (Resolved, Progress, Metrics, Completions, Trace, Checkpoint, Event, Result, Ended)
}


class Sink(Protocol):
    """Where ``erpo_core`` puts what it has to report."""

    def emit(self, record: Record) -> None:
        """Queue a record. Returns at once unless the receiver is far behind; of a Checkpoint, once it is stored: the
        files of older ones may then be deleted."""


def encode_frame(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """One frame as bytes."""
    head = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTHS.pack(len(head), len(payload)) + head + payload


def read_frame(read_exactly) -> tuple[dict[str, Any], bytes]:
    """Read one frame. ``read_exactly(n)`` returns n bytes or raises ``EOFError``.

    Raises:
        ValueError: a length is beyond the protocol's bounds.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(read_exactly(_LENGTHS.size))
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"frame of {header_bytes} + {payload_bytes} bytes is beyond the protocol's bounds")
    return json.loads(read_exactly(header_bytes)), read_exactly(payload_bytes) if payload_bytes else b""


def to_wire(record: Record) -> tuple[dict[str, Any], bytes]:
    """A record as frame header and payload."""
    body = asdict(record)
    payload = body.pop("payload", b"")
    return {"kind": record.kind, **_finite(body)}, payload


def to_frames(record: Record) -> Iterator[tuple[dict[str, Any], bytes]]:
    """A record as headers and payloads: one, but of answers that are too many for one header several records."""
    header, payload = to_wire(record)
    is_divisible = isinstance(record, Completions) and len(record.rows) > 1
    if not is_divisible or len(json.dumps(header)) <= MAX_HEADER_BYTES - _NUMBER_BYTES:
        yield header, payload
        return
    half = len(record.rows) // 2
    yield from to_frames(replace(record, rows=record.rows[:half]))
    yield from to_frames(replace(record, rows=record.rows[half:]))


def from_wire(header: dict[str, Any], payload: bytes) -> Record:
    """The record of a frame.

    Raises:
        ValueError: the kind is unknown.
    """
    cls = _KINDS.get(header.get("kind", ""))
    if cls is None:
        raise ValueError(f"unknown record kind {header.get('kind')!r}")
    names = {f.name for f in fields(cls)}
    values = {name: value for name, value in header.items() if name in names}
    if "payload" in names:
        values["payload"] = payload
    return cls(**values)


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
