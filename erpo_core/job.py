"""What a job's entry function receives beside its specification and its sink, and how it leaves early."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class ModelInput:
    """A model reference after resolution: the base to load, and the adapter to put on it, if any."""

    base: str
    adapter_path: Path | None = None


@dataclass(frozen=True)
class JobInputs:
    """Everything a child needs from outside, resolved by the worker after its claim.

    ``work_dir`` belongs to this attempt alone; ``cache_dir`` is shared by all jobs of a host and may be
    emptied at will.
    """

    job_id: str
    run_id: str
    attempt: int
    work_dir: Path
    cache_dir: Path
    model: ModelInput
    data_root: Path | None = None
    model_roots: tuple[Path, ...] = ()
    resume_from: Path | None = None
    stored_rows: tuple[dict[str, Any], ...] = ()
    """Completion rows that earlier attempts have stored."""
    stored_traces: tuple[dict[str, Any], ...] = ()
    """Traces that they have stored: ``prompt_id``, ``sample``, ``blob`` (of the codec, base64) and ``pivots``."""
    source: dict[str, Any] | None = None
    """The stored sequence or the stored answers that the specification names, as the kind of job wants them."""
    resolved: dict[str, Any] = field(default_factory=dict)
    """What earlier attempts have reported that the names of the specification are."""
    also: tuple["JobInputs", ...] = ()
    """Those of the job's further runs, where it has several. They differ in ``run_id``, ``model``, what is stored."""

    @property
    def stored(self) -> frozenset[tuple[str, int]]:
        """(prompt_id, sample) of the stored answers."""
        return frozenset((row["prompt_id"], row["sample"]) for row in self.stored_rows)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "JobInputs":
        """The inverse of :meth:`to_json`."""
        model = body["model"]
        return cls(
            job_id=body["job_id"],
            run_id=body["run_id"],
            attempt=body["attempt"],
            work_dir=Path(body["work_dir"]),
            cache_dir=Path(body["cache_dir"]),
            model=ModelInput(model["base"], _path(model["adapter_path"])),
            data_root=_path(body["data_root"]),
            model_roots=tuple(Path(root) for root in body["model_roots"]),
            resume_from=_path(body["resume_from"]),
            stored_rows=tuple(body["stored_rows"]),
            stored_traces=tuple(body["stored_traces"]),
            source=body["source"],
            resolved=body["resolved"],
            also=tuple(map(cls.from_json, body["also"])),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "job_id": self.job_id,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "work_dir": str(self.work_dir),
            "cache_dir": str(self.cache_dir),
            "model": {"base": self.model.base, "adapter_path": _text(self.model.adapter_path)},
            "data_root": _text(self.data_root),
            "model_roots": [str(root) for root in self.model_roots],
            "resume_from": _text(self.resume_from),
            "stored_rows": list(self.stored_rows),
            "stored_traces": list(self.stored_traces),
            "source": self.source,
            "resolved": self.resolved,
            "also": [inputs.to_json() for inputs in self.also],
        }


class Stop(Protocol):
    """Has somebody asked the job to leave? Asked between its parts, and while answers grow."""

    @property
    def requested(self) -> bool: ...


class LeftEarlyError(Exception):
    """The job was asked to leave, and what it was at is given up. What it has reported stays."""


def leave_if_asked(stop: Stop) -> None:
    """Raises LeftEarlyError once the job is asked to leave."""
    if stop.requested:
        raise LeftEarlyError


def leaves_early(run: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A job's entry function, which then returns ``{"stopped": True}`` where LeftEarlyError ends it."""

    @wraps(run)
    def run_or_leave(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return run(*args, **kwargs)
        except LeftEarlyError:
            return {"stopped": True}

    return run_or_leave


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _text(value: Path | None) -> str | None:
    return None if value is None else str(value)
