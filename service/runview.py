"""A run with everything that its one-document view tells."""

from typing import Any

from sqlalchemy.orm import Session

from service.db import jobs as job_rows
from service.db import metrics as metric_rows
from service.shape import job_json, run_json


def run_summary_json(session: Session, run: Any) -> dict[str, Any]:
    """A run in a list."""
    job = job_rows.get_job(session, run.job_id)
    return run_json(run, job.status, metric_rows.read_summary(session, run.id))


def run_detail(session: Session, run: Any) -> dict[str, Any]:
    """A run with its job and the number of its traces."""
    job = job_rows.get_job(session, run.job_id)
    body = run_json(run, job.status, metric_rows.read_summary(session, run.id))
    return body | {"job": job_json(job), "num_sequences": run.num_sequences}
