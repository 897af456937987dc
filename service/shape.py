"""Database rows as the API's JSON. Numbers that are not finite become null; times end with Z."""

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np

from service.db.states import ACTIVE


def time_json(value: datetime | None) -> str | None:
    """RFC 3339 UTC."""
    if value is None:
        return None
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def numbers(column: np.ndarray) -> list[int | float | None]:
    """A column as JSON numbers; floats with the fewest digits that give the same number back in the column's type."""
    if column.dtype.kind in "iu":
        return column.tolist()
    return [value if math.isfinite(value) else None for value in map(float, column.astype(str).tolist())]


def job_json(job: Any) -> dict[str, Any]:
    """A job row."""
    links = {"self": f"/jobs/{job.id}", "events": f"/jobs/{job.id}/events", "logs": f"/jobs/{job.id}/logs"}
    run_id = job.run_id
    links |= {"run": run_path(job.kind, run_id), "metrics": f"/runs/{run_id}/metrics"}
    return {
        "id": job.id,
        "run_id": run_id,
        "run_ids": job.run_ids,
        "kind": job.kind,
        "name": job.name,
        "tags": list(job.tags or ()),
        "priority": job.priority,
        "status": job.status,
        "status_reason": job.status_reason,
        "desired_status": job.desired_status,
        "is_terminal": job.is_terminal,
        "attempt": job.attempt,
        "progress": finite(job.progress),
        "error": job.error,
        "created_at": time_json(job.created_at),
        "queued_at": time_json(job.queued_at),
        "started_at": time_json(job.started_at),
        "finished_at": time_json(job.finished_at),
        "stalled": _is_stalled(job),
        "depends_on": list(job.depends_on or ()),
        "links": links,
    }


def _is_stalled(job: Any) -> bool:
    """A worker holds the job but has not been heard of for the length of its lease."""
    return job.status in ACTIVE and job.lease_expires_at is not None and job.lease_expires_at < datetime.now(UTC)


def run_path(kind: str, run_id: str) -> str:
    """Where a run of this kind is read and looked at."""
    prefix = {"evaluate": "/evaluations", "train": "/runs"}.get(kind, f"/analyze/{kind}")
    return f"{prefix}/{run_id}"


def run_json(run: Any, status: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A run row with the status of its job and the summary of its metrics."""
    path = f"/runs/{run.id}"
    links = {
        "self": run_path(run.kind, run.id),
        "metrics": f"{path}/metrics",
        "completions": f"{path}/completions",
        "checkpoints": f"{path}/checkpoints",
        "traces": f"{path}/traces",
    }
    return {
        "id": run.id,
        "job_id": run.job_id,
        "kind": run.kind,
        "status": status,
        "spec": run.spec,
        "resolved": finite(run.resolved),
        "result": finite(run.result),
        "summary": finite(summary),
        "created_at": time_json(run.created_at),
        "links": links,
    }


def event_json(event: Any) -> dict[str, Any]:
    """An event row: the envelope."""
    return {
        "id": event.id,
        "seq": event.seq,
        "type": event.type,
        "level": event.level,
        "created_at": time_json(event.created_at),
        "job_id": event.job_id,
        "run_id": event.run_id,
        "attempt": event.attempt,
        "message": event.message,
        "data": finite(event.data or {}),
    }


def checkpoint_json(checkpoint: Any) -> dict[str, Any]:
    """A checkpoint row; where its files lie on disk is nobody's business."""
    path = f"/runs/{checkpoint.run_id}/checkpoints"
    return {
        "id": checkpoint.id,
        "step": checkpoint.step,
        "files": [_file_json(file) for file in checkpoint.files],
        "data": finite(checkpoint.data or {}),
        "created_at": time_json(checkpoint.created_at),
        "links": {"archive": f"{path}/{checkpoint.step}/archive"},
    }


def _file_json(file: dict[str, Any]) -> dict[str, Any]:
    name = str(file.get("name") or file.get("path") or "").rsplit("/", 1)[-1]
    return {key: value for key, value in file.items() if key != "path"} | {"name": name}


def completion_json(row: Any) -> dict[str, Any]:
    """A sampled answer."""
    return finite(
        {
            "step": row.step,
            "prompt_id": row.prompt_id,
            "group": row.group,
            "sample": row.sample,
            "prompt": row.prompt,
            "completion": row.completion,
            "gold": row.gold,
            "level": row.level,
            "subject": row.subject,
            "rewards": row.rewards or {},
            "reward": row.reward,
            "advantage": row.advantage,
            "verdict": row.verdict,
            "boxed": row.boxed,
            "truncated": row.truncated,
            "num_tokens": row.num_tokens,
            "extra": row.extra or {},
        }
    )


def problem_json(row: Any) -> dict[str, Any]:
    """A problem of an evaluation with its counts."""
    body = row.as_dict()
    return body | {"mean_length": body.pop("num_tokens") / row.num_samples}


def benchmark_json(row: Any, is_present: bool) -> dict[str, Any]:
    """A benchmark of the registry."""
    names = ("name", "num_problems", "license", "source", "file", "hub")
    return {name: getattr(row, name) for name in names} | {"is_present": is_present}


def dataset_json(row: Any) -> dict[str, Any]:
    """An uploaded data set."""
    return {
        "id": row.id,
        "name": row.name,
        "num_problems": row.num_rows,
        "size_bytes": row.size_bytes,
        "sha256": row.sha256,
        "created_at": time_json(row.created_at),
    }
