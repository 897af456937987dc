"""The numbers of ``GET /metrics``, counted when asked for: they are the database's, the same from every API process."""

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy.orm import Session

from service.db import claims as claim_rows
from service.db import overview
from service.settings import Settings
from service.workerview import is_alive


def render_metrics(session: Session, settings: Settings) -> bytes:
    """The text exposition format."""
    registry = CollectorRegistry()
    jobs = Gauge("erpo_jobs", "Jobs by kind and status.", ["kind", "status"], registry=registry)
    for kind, status, count in overview.count_jobs(session):
        jobs.labels(kind, status).set(count)
    workers = Gauge("erpo_workers_alive", "Workers heard of lately.", registry=registry)
    workers.set(sum(is_alive(row, settings) for row in claim_rows.list_workers(session)))
    return generate_latest(registry)
