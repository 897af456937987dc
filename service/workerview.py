"""Workers as the API tells them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from service.settings import Settings
from service.shape import time_json


def is_alive(worker: Any, settings: Settings) -> bool:
    """Whether it was heard of lately. The times are the database's own, so only gross clock errors mislead."""
    patience = timedelta(seconds=3 * max(settings.heartbeat_seconds, settings.sweep_seconds))
    return datetime.now(UTC) - worker.last_heartbeat_at < patience


def worker_json(worker: Any, current_job_id: str | None, settings: Settings) -> dict[str, Any]:
    """A worker row."""
    return {
        "id": worker.id,
        "host": worker.host,
        "queues": list(worker.queues or ()),
        "abilities": worker.abilities,
        "is_draining": worker.is_draining,
        "started_at": time_json(worker.started_at),
        "last_seen_at": time_json(worker.last_heartbeat_at),
        "current_job_id": current_job_id,
        "is_alive": is_alive(worker, settings),
    }
